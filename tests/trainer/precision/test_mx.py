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
        (mx("nvfp4"), "quantize.linear.mx.recipe_name: there is no 'nvfp4', only mxfp8_emulated,"),
        (
            {"model": {"converters": ["quantize.grouped_mm.float8"]}},
            "quantize.grouped_mm.float8 needs a GPU of compute capability 9.0 or newer and there",
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


@pytest.mark.parametrize("converter", [grouped.FLOAT8, grouped.MX])
def test_weights_of_experts_are_wrapped_under_their_names(
    run_config: MakeConfig, converter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products themselves need hardware that tests don't have."""
    monkeypatch.setattr(grouped, "require_capability", lambda *_: None)
    kind = converter.rpartition(".")[2]

    def converted(fqns: list[str]) -> nn.Module:
        model = nn.ModuleDict({"experts": Experts()})
        config = run_config(
            model={"converters": [converter]}, quantize={"grouped_mm": {kind: {"fqns": fqns}}}
        )
        convert(model, config, torch.device("cuda"))  # pyright: ignore[reportArgumentType]  # enough of a model
        return model

    model = converted(["experts"])
    assert list(model.state_dict()) == ["experts.w1", "experts.gate.weight"]
    assert type(model.get_parameter("experts.w1").data).__name__.endswith("WrapperTensor")
    inside = plain(model.state_dict())["experts.w1"]
    assert type(inside) is torch.Tensor
    assert torch.equal(inside, torch.ones(4, 32, 16))
    for fqns, what in ([], "an empty list"), (["moe"], "moe"):
        with pytest.raises(BadInputError, match=rf"{converter}.fqns: {what} names no experts; "):
            converted(fqns)


def test_a_dense_model_has_no_experts(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "require_capability", lambda *_: None)
    config = run_config(
        model={"converters": [grouped.FLOAT8]},
        quantize={"grouped_mm": {"float8": {"fqns": ["experts"]}}},
    )
    with pytest.raises(BadInputError, match="experts names no experts; this model has none"):
        convert(meta(), config, torch.device("cuda"))


def test_a_machine_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(BadInputError, match=r"10\.0 or newer and there is NVIDIA H100, of 9\.0;"):
        layers.require_capability(torch.device("cuda"), (10, 0), "x", "do y")
    layers.require_capability(torch.device("cuda"), (9, 0), "x", "do y")
