"""Recomputation and compilation change memory and time, never the numbers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pretrain_api.config import ActivationCheckpoint, RunConfig
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_trainer.init import initialise
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.precision.activation_checkpoint import checkpoint_activations

SHAPE = LlamaShape(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32)
MODES = {
    "none": ActivationCheckpoint(mode="none"),
    "every second layer": ActivationCheckpoint(mode="selective", selective_ac_option="2"),
    "costly operations": ActivationCheckpoint(mode="selective", selective_ac_option="op"),
    "full": ActivationCheckpoint(mode="full"),
}


def trained_once(model: Llama3, config: ActivationCheckpoint) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients and FLOPs of one step on a copy of ``model``."""
    model = copy.deepcopy(model)
    checkpoint_activations(model, config)
    tokens = torch.arange(48).view(2, 24)
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens).float().logsumexp(-1).mean()
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.detach(), gradients, counter.get_total_flops()


@pytest.fixture(scope="module")
def model() -> Llama3:
    model = Llama3(SHAPE, seq_len=24)
    initialise(model, 0, torch.device("cpu"))
    return model


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_recomputation_is_exact(model: Llama3, mode: str) -> None:
    loss, gradients, _ = trained_once(model, MODES["none"])
    same_loss, same_gradients, _ = trained_once(model, MODES[mode])
    assert torch.equal(same_loss, loss)
    assert len(gradients) == len(same_gradients) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))


def test_modes_recompute_as_much_as_they_say(model: Llama3) -> None:
    flops = {mode: trained_once(model, config)[2] for mode, config in MODES.items()}
    none, every_second, costly, full = (flops[mode] for mode in MODES)
    blocks_forward = full - none  # all blocks once more
    assert blocks_forward > 0
    assert every_second - none == blocks_forward // 2
    # Of a block's seven products every second is kept, and attention is.
    assert 0 < costly - none < blocks_forward * 0.6


def test_parameter_names_stay(model: Llama3) -> None:
    wrapped = copy.deepcopy(model)
    checkpoint_activations(wrapped, MODES["costly operations"])
    assert list(wrapped.state_dict()) == list(model.state_dict())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks_and_loss_train_alike(
    run: Callable[..., Any], run_config: Callable[..., RunConfig]
) -> None:
    selective = {"mode": "selective", "selective_ac_option": "op"}
    shared: dict[str, dict[str, Any]] = {
        "activation_checkpoint": selective,
        "checkpoint": {"enable": False},
        "training": {"steps": 2},
    }
    eager = run(1, run_config(**shared))
    compiled = run(
        1,
        run_config(compile={"enable": True}, **shared),
        timeout=500,
        TORCHINDUCTOR_COMPILE_THREADS="1",
    )
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert list(compiled.losses) == [1, 2]
