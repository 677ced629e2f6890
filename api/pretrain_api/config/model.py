"""Sections about the model: architecture, memory against compute, compilation, number formats."""

from difflib import get_close_matches
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from pretrain_api.flavors import llama3
from pretrain_api.schema import Names, PathText, Rule, Section, Text

# torchtitan's families that aren't built yet; any other name is a family of the user's own.
UNBUILT_FAMILIES: Final = ("llama3_ft", "llama4", "deepseek_v3", "qwen3", "gpt_oss", "flux")

CompileComponent = Literal["model", "loss"]


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
    converters: Names = ()
    """Changes to the model before training, such as quantize.linear.float8."""
    print_after_conversion: bool = False
    """Write the model's structure to the log after the converters ran."""

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
    """For option op: linear layers whose shapes are always recomputed."""
    early_stop: bool = False
    """Stop recomputing as soon as the backward pass has what it needs."""
    memory_budget: Annotated[float, Field(ge=0, le=1)] = 0.5
    """For mode memory_budget: share of the activations' memory to keep."""
    visualize_memory_budget_pareto: bool = False
    """For mode memory_budget: draw memory against compute."""


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
    """How scales are shared. Unset is tensorwise."""
    filter_fqns: Names = ()
    """Layers that are left alone."""
    emulate: bool = False
    """Emulate float8 on hardware without it."""


class MXLinear(Section):
    """Microscaling formats for linear layers."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """Kernel for the cast along dimension 1."""
    recipe_name: Text = "mxfp8_cublas"
    """Format and kernels."""
    filter_fqns: Names = ("output",)
    """Layers that are left alone."""


class Float8GroupedMM(Section):
    """Float8 for the grouped products of experts."""

    fqns: Names = ()
    """Layers to convert."""


class MXGroupedMM(Section):
    """Microscaling formats for the grouped products of experts."""

    recipe_name: Literal["mxfp8"] = "mxfp8"
    """Format and kernels for the products of experts."""
    fqns: Names = ()
    """Layers to convert."""


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
    """Settings for experts in float8, which converter quantize.grouped_mm.float8 switches on."""
    mx: MXGroupedMM = MXGroupedMM()
    """Settings for experts in microscaling formats, which converter quantize.grouped_mm.mx switches
    on."""


class Quantize(Section):
    """Low precision training. model.converters switches it on."""

    linear: QuantizeLinear = QuantizeLinear()
    """Low precision for linear layers."""
    grouped_mm: QuantizeGroupedMM = QuantizeGroupedMM()
    """Low precision for the grouped products of experts."""
