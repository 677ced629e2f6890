"""MXFP8 is near the truth, and what the hardware can't do is refused by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pretrain_api.config import RunConfig
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.precision import grouped, layers
from pretrain_trainer.precision.convert import convert
from pretrain_trainer.precision.float8 import eight_bit_flops, plain
from pretrain_trainer.precision.mx import MXLinear

from ..core.watched import watched_steps
from .measures import decibels

Ranks = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]

LEAST_DECIBELS = 26  # measured: 29.9
SPLIT_DECIBELS = 50  # measured: 55.2
EXPERTS_DECIBELS = 46  # in bfloat16; measured: 183 (fsdp), 77.7 (ep), 50.3 (ep out of tp)
SMALL = LlamaShape(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32)


def mx(recipe: str = "mxfp8_emulated", **options: Any) -> dict[str, Any]:
    """Sections that switch it on."""
    return {
        "model": {"converters": ["quantize.linear.mx"]},
        "quantize": {"linear": {"mx": {"recipe_name": recipe, **options}}},
        "checkpoint": {"enable": False},
        "training": {"steps": 1},
    }


def meta() -> Llama3:
    with torch.device("meta"):
        return Llama3(SMALL, seq_len=64)


def test_emulated_products_are_near_the_truth_on_any_layout(
    ranks: Ranks, run_config: MakeConfig
) -> None:
    plain_run = {"checkpoint": {"enable": False}, "training": {"steps": 1}}
    ((truth, losses),) = ranks(1, watched_steps, run_config(**plain_run))
    ((alone, near),) = ranks(1, watched_steps, run_config(**mx()))
    sharded = ranks(2, watched_steps, run_config(**mx()))
    measured = decibels(truth, alone)
    print(f"mxfp8: {measured:.1f} dB")
    assert LEAST_DECIBELS < measured < 60
    assert near == pytest.approx(losses, rel=1e-4)
    for name, value in alone.items():
        room = 2e-5 * float(np.abs(value).max())
        np.testing.assert_allclose(sharded[0][0][name], value, rtol=0, atol=room, err_msg=name)


def test_split_products_are_near_whole_ones(ranks: Ranks, run_config: MakeConfig) -> None:
    """Sums over ranks end in other last bits; a cast turns a few of those into other numbers."""
    sections = mx()
    sections["model"]["flavor"] = "debugmodel"  # wide enough to be split between ranks
    ((alone, _),) = ranks(1, watched_steps, run_config(**sections))
    split = run_config(**sections, parallelism={"tensor_parallel_degree": 2})
    ((tensor_parallel, _), *_) = ranks(2, watched_steps, split)
    measured = decibels(alone, tensor_parallel)
    print(f"mxfp8, tensor parallel, to one process: {measured:.1f} dB")
    assert measured > SPLIT_DECIBELS


def test_names_stay(run_config: MakeConfig) -> None:
    model = meta()
    convert(model, run_config(**mx(filter_fqns=["output", "wk"])), torch.device("cpu"))
    assert list(model.state_dict()) == list(meta().state_dict())
    assert sum(isinstance(module, MXLinear) for module in model.modules()) == 6 * SMALL.n_layers
    assert eight_bit_flops(model) == 0  # emulated


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (mx("mxfp8_cublas"), "quantize.linear.mx needs a GPU of compute capability 10.0 or newer"),
        (
            mx("nvfp4"),
            "quantize.linear.mx.recipe_name: there is no 'nvfp4', only mxfp8_emulated, "
            "mxfp8_cublas, mxfp8_cublas_rceil; torchao has NVFP4 for inference only, on GPUs of",
        ),
        (
            {"model": {"converters": ["quantize.grouped_mm.mx"]}},
            "quantize.grouped_mm.mx needs a GPU of compute capability 10.0 or newer and there is",
        ),
    ],
)
def test_what_this_machine_cannot_do_is_refused(
    run_config: MakeConfig, sections: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInputError) as caught:
        convert(meta(), run_config(**sections), torch.device("cpu"))
    assert sentence in str(caught.value)


class Experts(nn.Module):
    """What an expert layer looks like from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.ones(4, 32, 16))
        self.gate = nn.Linear(16, 4, bias=False)


def experts(*fqns: str) -> dict[str, Any]:
    """Sections that switch it on for experts."""
    return {
        "model": {"converters": [grouped.CONVERTER], "flavor": "tiny_moe"},
        "quantize": {"grouped_mm": {"mx": {"recipe_name": "mxfp8_emulated", "fqns": list(fqns)}}},
        "checkpoint": {"enable": False},
        "training": {"steps": 2, "mixed_precision_param": "bfloat16"},
    }


def test_weights_of_experts_are_wrapped_under_their_names(run_config: MakeConfig) -> None:
    def converted(*fqns: str) -> nn.Module:
        model = nn.ModuleDict({"experts": Experts()})
        convert(model, run_config(**experts(*fqns)), torch.device("cpu"))  # pyright: ignore[reportArgumentType]  # enough of a model
        return model

    model = converted("experts")
    assert list(model.state_dict()) == ["experts.w1", "experts.gate.weight"]
    assert type(model.get_parameter("experts.w1").data).__name__.endswith("WrapperTensor")
    inside = plain(model.state_dict())["experts.w1"]
    assert type(inside) is torch.Tensor
    assert torch.equal(inside, torch.ones(4, 32, 16))
    with pytest.raises(BadInputError, match=r"grouped_mm.mx.fqns: an empty list names no experts"):
        converted()
    with pytest.raises(BadInputError, match=r"grouped_mm.mx.fqns: moe names no experts; "):
        converted("moe")
    sections = experts("experts") | {"training": {"mixed_precision_param": "float32"}}
    with pytest.raises(BadInputError, match=r"training.mixed_precision_param: the products of"):
        convert(meta(), run_config(**sections), torch.device("cpu"))


def test_experts_train_near_the_truth_on_any_layout(ranks: Ranks, run_config: MakeConfig) -> None:
    sections = experts("experts")
    truth_run = {**sections, "model": {"flavor": "tiny_moe"}}
    ((truth, losses),) = ranks(1, watched_steps, run_config(**truth_run))
    ((alone, near),) = ranks(1, watched_steps, run_config(**sections))
    assert LEAST_DECIBELS < decibels(truth, alone) < 60
    assert near == pytest.approx(losses, rel=1e-3)
    for name, degrees in (
        ("fsdp 2", {}),
        ("ep 2", {"expert_parallel_degree": 2}),
        ("ep 2 out of tp 2", {"tensor_parallel_degree": 2, "expert_parallel_degree": 2}),
    ):
        seen = ranks(2, watched_steps, run_config(**sections, parallelism=degrees))
        measured = decibels(alone, seen[0][0])
        print(f"experts in mxfp8, {name}, to one process: {measured:.1f} dB")
        assert measured > EXPERTS_DECIBELS
        total = np.sum([losses for _, losses in seen], axis=0)
        assert total == pytest.approx(near, rel=1e-3)


def test_a_dense_model_has_no_experts(run_config: MakeConfig) -> None:
    sections = experts("experts")
    del sections["model"]["flavor"]
    with pytest.raises(BadInputError, match="experts names no experts; this model has none"):
        convert(meta(), run_config(**sections), torch.device("cpu"))


def test_a_machine_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(BadInputError, match=r"10\.0 or newer and there is NVIDIA H100, of 9\.0;"):
        layers.require_capability(torch.device("cuda"), (10, 0), "x", "do y")
    layers.require_capability(torch.device("cuda"), (9, 0), "x", "do y")
