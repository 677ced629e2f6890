"""Sections about the model: architecture, memory against compute, compilation, number formats."""

from difflib import get_close_matches
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from pretrain_api.flavors import llama3
from pretrain_api.schema import Names, PathText, Rule, Section, Text, or_else

# torchtitan's families that aren't built yet; any other name is a family of the user's own.
UNBUILT_FAMILIES: Final = ("llama3_ft", "llama4", "deepseek_v3", "qwen3", "gpt_oss", "flux")

CompileComponent = Literal["model", "loss"]
Converter = Literal[
    "quantize.linear.float8",
    "quantize.linear.mx",
    "quantize.grouped_mm.float8",
    "quantize.grouped_mm.mx",
]


_LINEAR: Final = ("quantize.linear.float8", "quantize.linear.mx")
_EXPERTS_IN_FLOAT8: Final = "quantize.grouped_mm.float8"


class Model(Section):
    """Which model is trained."""

    name: Annotated[str, Field(min_length=1, max_length=63)] = "llama3"
    """Model family. A family the operator doesn't know is left to the trainer to judge."""
    flavor: Annotated[str, Field(min_length=1, max_length=63)] = "debugmodel"
    """Size within the family, such as 8B."""
    hf_assets_path: PathText = "./tests/assets/tokenizer"
    """Folder with the Hugging Face tokenizer. In a cluster the default is the sample in the
    image."""
    tokenizer_path: Text | None = None
    """Older name of hf_assets_path; must stay unset."""
    converters: Annotated[tuple[Converter, ...], Field(strict=False, max_length=4)] = ()
    """Number formats to convert layers to before training; each has a section of its own, which has
    no effect otherwise."""
    print_after_conversion: bool = False
    """Write the model's structure to the log after the converters ran."""
    attn_mask_type: Literal["causal", "block_causal"] = "causal"
    """What a token attends to: all before it in its sequence, or only those of its own document
    (block_causal)."""

    rules: ClassVar = (
        Rule(
            path="name",
            cel=f"!has(self.name) || !(self.name in {list(UNBUILT_FAMILIES)})",
            message="this family is not supported yet; use llama3",
            holds=lambda m: m.name not in UNBUILT_FAMILIES,
            explain=lambda m: f"{m.name} is not supported yet; use llama3",
        ),
        Rule(
            path="flavor",
            cel="(has(self.name) && self.name != 'llama3') || !has(self.flavor) || "
            f"self.flavor in {list(llama3.FLAVORS)}",
            message=f"llama3 has the flavors {', '.join(llama3.FLAVORS)}",
            holds=lambda m: m.name != "llama3" or m.flavor in llama3.FLAVORS,
            explain=lambda m: _flavor_sentence(m.flavor),
        ),
        Rule(
            path="converters",
            cel="!has(self.converters) || "
            + " || ".join(f"!('{name}' in self.converters)" for name in _LINEAR),
            message=f"{_LINEAR[0]} and {_LINEAR[1]} are for the same layers; use one of them",
            holds=lambda m: not set(_LINEAR) <= set(m.converters),
        ),
        Rule(
            kind="unsupported",
            path="converters",
            cel=f"!has(self.converters) || !('{_EXPERTS_IN_FLOAT8}' in self.converters)",
            message=f"{_EXPERTS_IN_FLOAT8} is not supported yet, because torchao's kernel takes "
            "only multiples of 16 tokens for each expert; use quantize.grouped_mm.mx or remove it",
            holds=lambda m: _EXPERTS_IN_FLOAT8 not in m.converters,
        ),
    )


def _flavor_sentence(flavor: str) -> str:
    near = get_close_matches(flavor, llama3.FLAVORS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"llama3 has no flavor {flavor}, only {', '.join(llama3.FLAVORS)}{hint}"


class ActivationCheckpoint(Section):
    """Recomputing activations in the backward pass instead of keeping them."""

    mode: Literal["selective", "full", "memory_budget", "none"] = "selective"
    """What is recomputed: nothing, every layer, some (see selective_ac_option) or as much as a
    budget asks."""
    selective_ac_option: Annotated[str, Field(pattern=r"^(op|[1-9][0-9]{0,5})$")] = "2"
    """For mode selective: op keeps the results of costly operators, a number n recomputes every
    n-th layer."""
    per_op_sac_force_recompute_mm_shapes_by_fqns: Names = ("moe.router.gate",)
    """For option op: linear layers, by parts of their names; products with a weight of such a
    layer's shape are always recomputed."""
    early_stop: bool = False
    """Stop recomputing as soon as the backward pass has what it needs."""
    memory_budget: Annotated[float, Field(ge=0, le=1)] = 0.5
    """For mode memory_budget, which needs compile.enable: share of the activations' memory to
    keep."""
    visualize_memory_budget_pareto: bool = False
    """For mode memory_budget: draw memory against compute, into memory_budget_pareto in
    job.dump_folder."""


class Compile(Section):
    """Compilation with torch.compile."""

    enable: bool = False
    """Compile what components names."""
    components: Annotated[tuple[CompileComponent, ...], Field(strict=False, max_length=2)] = (
        "model",
        "loss",
    )
    """What is compiled: each transformer block (model), the loss."""
    backend: Annotated[str, Field(min_length=1, max_length=63)] = "inductor"
    """Compiler behind torch.compile that makes the kernels."""


class Float8Linear(Section):
    """Float8 for linear layers."""

    enable_fsdp_float8_all_gather: bool = False
    """Cast parameters to float8 before they are gathered, instead of after."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all parameters at once after the optimizer step."""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """What shares a scale: a whole tensor (tensorwise, which unset means), a row, or a row with the
    gradients of weights left in high precision."""
    filter_fqns: Names = ()
    """Layers that are left alone: parts of their names. auto_filter_small_kn stands for all that
    are too small to gain. Layers outside of blocks, and those with a size that is no multiple of
    16, always are."""
    emulate: bool = False
    """Compute the same numbers on hardware without float8, slowly."""

    rules: ClassVar = (
        Rule(
            path="enable_fsdp_float8_all_gather",
            cel="!(has(self.enableFsdpFloat8AllGather) && self.enableFsdpFloat8AllGather) || "
            "!has(self.recipeName) || self.recipeName == 'tensorwise'",
            message="gathers weights with one scale each; leave recipe_name at tensorwise",
            holds=lambda f: (
                not f.enable_fsdp_float8_all_gather or f.recipe_name in (None, "tensorwise")
            ),
        ),
        Rule(
            path="precompute_float8_dynamic_scale_for_fsdp",
            cel="!(has(self.precomputeFloat8DynamicScaleForFsdp) && "
            "self.precomputeFloat8DynamicScaleForFsdp) || "
            "(has(self.enableFsdpFloat8AllGather) && self.enableFsdpFloat8AllGather)",
            message="computes scales for the float8 all-gather; set enable_fsdp_float8_all_gather",
            holds=lambda f: (
                not f.precompute_float8_dynamic_scale_for_fsdp or f.enable_fsdp_float8_all_gather
            ),
        ),
        Rule(
            path="filter_fqns",
            cel="!has(self.filterFqns) || !('auto_filter_small_kn' in self.filterFqns) || "
            "!has(self.recipeName) || self.recipeName != 'rowwise_with_gw_hp'",
            message="nobody has measured which layers are too small for rowwise_with_gw_hp; name "
            "layers instead of auto_filter_small_kn",
            holds=lambda f: (
                "auto_filter_small_kn" not in f.filter_fqns or f.recipe_name != "rowwise_with_gw_hp"
            ),
        ),
    )


class MXLinear(Section):
    """Microscaling formats for linear layers."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """Kernel for the cast along dimension 1."""
    recipe_name: Text = "mxfp8_cublas"
    """Format and kernels: mxfp8_cublas, mxfp8_cublas_rceil (scales are rounded up) or
    mxfp8_emulated."""
    filter_fqns: Names = ("output",)
    """Layers that are left alone: parts of their names. Layers outside of blocks, and those with a
    size that is no multiple of 32, always are."""


class Float8GroupedMM(Section):
    """Float8 for the grouped products of experts; not supported yet."""

    fqns: Names = ()
    """Weights of experts to convert: parts of their names."""


class MXGroupedMM(Section):
    """Microscaling formats for the grouped products of experts."""

    recipe_name: Literal["mxfp8", "mxfp8_emulated"] = "mxfp8"
    """Format and kernels for the products of experts: mxfp8, or mxfp8_emulated for other
    hardware."""
    fqns: Names = ()
    """Weights of experts to convert: parts of their names."""


class QuantizeLinear(Section):
    """Low precision for linear layers."""

    float8: Float8Linear = Float8Linear()
    """Settings for linear layers in float8, which converter quantize.linear.float8 switches on."""
    mx: MXLinear = MXLinear()
    """Settings for linear layers in microscaling formats, which converter quantize.linear.mx
    switches on."""


class QuantizeGroupedMM(Section):
    """Low precision for the grouped products of experts."""

    float8: Float8GroupedMM = Float8GroupedMM()
    """Settings for experts in float8, which no converter switches on yet."""
    mx: MXGroupedMM = MXGroupedMM()
    """Settings for experts in microscaling formats, which converter quantize.grouped_mm.mx switches
    on."""


class Quantize(Section):
    """Low precision training. model.converters switches it on."""

    linear: QuantizeLinear = QuantizeLinear()
    """Low precision for linear layers."""
    grouped_mm: QuantizeGroupedMM = QuantizeGroupedMM()
    """Low precision for the grouped products of experts."""


# Rules over several sections, for the model that holds them all.
ACROSS_SECTIONS: Final = (
    Rule(
        path="activation_checkpoint.mode",
        cel=f"{or_else('activation_checkpoint.mode', repr('selective'))} != 'memory_budget' || "
        f"({or_else('compile.enable', 'false')} && "
        f"'model' in {or_else('compile.components', str(['model', 'loss']))} && "
        f"{or_else('compile.backend', repr('inductor'))} != 'eager')",
        message="memory_budget is planned by the compiler; set compile.enable, with model in "
        "compile.components and a backend other than eager, or use another mode",
        holds=lambda s: (
            s.activation_checkpoint.mode != "memory_budget"
            or (
                s.compile.enable
                and "model" in s.compile.components
                and s.compile.backend != "eager"
            )
        ),
    ),
)
