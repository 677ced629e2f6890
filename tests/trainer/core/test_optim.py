"""Learning rates against tables worked out by hand; the optimizer's state before its first step."""

import pytest
import torch
from torch import nn

from pretrain_api.config import LRScheduler, Optimizer
from pretrain_trainer.optim import MOMENTS, build_optimizer, optimizer_state, schedule

TABLES = {
    "linear, no warmup": (
        LRScheduler(warmup_steps=0),
        4,
        [1, 0.75, 0.5, 0.25],
    ),
    "linear after warmup": (
        LRScheduler(warmup_steps=2),
        6,
        [0.5, 1, 1, 0.75, 0.5, 0.25],
    ),
    "cosine with a floor": (
        LRScheduler(warmup_steps=1, decay_type="cosine", min_lr_factor=0.2),
        4,
        [1, 1, 0.8, 0.4],
    ),
    "square root": (
        LRScheduler(warmup_steps=0, decay_type="sqrt"),
        4,
        [1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5],
    ),
    "warmup, stable, decay": (
        LRScheduler(warmup_steps=2, decay_ratio=0.4),
        10,
        [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
    ),
    "no decay": (
        LRScheduler(warmup_steps=2, decay_ratio=0.0),
        4,
        [0.5, 1, 1, 1],
    ),
    "decay that warmup leaves no room for": (
        LRScheduler(warmup_steps=3, decay_ratio=1.0),
        4,
        [1 / 3, 2 / 3, 1, 1],
    ),
    "warmup beyond the end": (
        LRScheduler(warmup_steps=100),
        4,
        [0.25, 0.5, 0.75, 1],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_schedule(name: str) -> None:
    config, steps, expected = TABLES[name]
    factor = schedule(config, steps)
    assert [factor(step) for step in range(steps)] == pytest.approx(expected)


def test_schedule_ends_at_the_floor_and_stays_there() -> None:
    factor = schedule(LRScheduler(warmup_steps=1, min_lr_factor=0.1), 5)
    assert factor(5) == factor(9) == pytest.approx(0.1)


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_early_state_is_the_state_torch_would_make(implementation: str) -> None:
    def trained(early: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = build_optimizer(
            [model], Optimizer.model_validate({"implementation": implementation})
        )
        if not early:
            optimizer.state.clear()
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return model, optimizer_state([model], optimizer)

    (ours, state), (theirs, expected) = trained(early=True), trained(early=False)
    assert torch.equal(ours.weight, theirs.weight)
    assert state.keys() == expected.keys()
    assert {f"state.weight.{moment}" for moment in MOMENTS} < state.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value)
        assert (state[key].dtype, state[key].device) == (value.dtype, value.device)
