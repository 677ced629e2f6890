"""Whole runs: every layout computes the same, and a run that was killed ends as if it wasn't."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain_api.config import RunConfig

Run = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]
Saved = Callable[[RunConfig, int], dict[str, Tensor]]

HSDP = {"data_parallel_replicate_degree": 2}
OFFLOAD = {"enable_cpu_offload": True}
TP = {"tensor_parallel_degree": 2}

LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "fsdp over 4": (4, {}),
    "fsdp over 2, accumulation of 2": (2, {}),
    "one rank, accumulation of 2": (1, {"training": {"local_batch_size": 2}}),
    "hsdp 2 x 2": (4, {"parallelism": HSDP}),
    "ddp over 2": (2, {"parallelism": HSDP}),
    "offload": (2, {"training": OFFLOAD}),
    "never reshard": (2, {"parallelism": {"fsdp_reshard_after_forward": "never"}}),
    "always reshard": (2, {"parallelism": {"fsdp_reshard_after_forward": "always"}}),
    "reshard over 2 of 4": (4, {"parallelism": {"fsdp_reshard_after_forward": 2}}),
    "tp 2": (2, {"parallelism": TP}),
    "tp 2, whole logits": (2, {"parallelism": TP | {"disable_loss_parallel": True}}),
    "fsdp 2 x tp 2": (4, {"parallelism": TP}),
    "hsdp 2 x tp 2": (4, {"parallelism": TP | HSDP}),
}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit; NaN equals NaN, as a first loss that isn't known yet is one."""
    assert left.keys() == right.keys()
    different = [
        name
        for name in left
        if left[name].dtype != right[name].dtype
        or left[name].numpy().tobytes() != right[name].numpy().tobytes()
    ]
    assert different == []


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The one-rank run, once for all layouts: its losses and its tensors."""
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_like_one_rank(
    run: Run, run_config: MakeConfig, saved: Saved, alone: dict[str, Any], layout: str
) -> None:
    if not alone:
        config = run_config(job={"dump_folder": run_config().job.dump_folder + "-alone"})
        alone |= {"losses": run(1, config).losses, "tensors": saved(config, 4)}
    size, changes = LAYOUTS[layout]
    config = run_config(**changes)
    outcome = run(size, config)
    assert list(outcome.losses) == [1, 2, 3, 4]
    assert outcome.losses == pytest.approx(alone["losses"], rel=1e-5)
    ours, theirs = saved(config, 4), alone["tensors"]
    assert torch.equal(ours["ledger.digest"], theirs["ledger.digest"])
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_loss_falls(run: Run, run_config: MakeConfig) -> None:
    config = run_config(
        training={"steps": 30}, optimizer={"lr": 2e-2}, checkpoint={"enable": False}
    )
    losses = run(1, config).losses
    assert losses[1] == pytest.approx(7.5, abs=0.5)  # of a guess among some 1,500 tokens
    assert losses[30] < 5


RESUMED: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "fsdp over 2, accumulation of 2": (2, {}),
    "hsdp 2 x 2": (4, {"parallelism": HSDP}),
    "accumulation of 4": (1, {}),
    "fsdp 2 x tp 2": (4, {"parallelism": TP}),
    "offload": (2, {"training": OFFLOAD}),
    "bfloat16, selective recomputation": (
        2,
        {
            "training": {"mixed_precision_param": "bfloat16"},
            "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
        },
    ),
}


@pytest.mark.parametrize("layout", RESUMED)
def test_killed_and_resumed_is_bitwise_the_undisturbed_run(
    run: Run, run_until_killed: Run, run_config: MakeConfig, saved: Saved, layout: str
) -> None:
    size, changes = RESUMED[layout]
    undisturbed = run_config(
        job={"dump_folder": run_config().job.dump_folder + "-undisturbed"}, **changes
    )
    config = run_config(**changes)
    expected = run(size, undisturbed)
    run_until_killed(size, config, kill_at=4)  # saved at 2; step 3 is lost
    outcome = run(size, config)
    assert list(outcome.losses) == [3, 4]
    assert {step: expected.losses[step] for step in (3, 4)} == outcome.losses
    assert_equal(saved(config, 4), saved(undisturbed, 4))
    assert outcome.reports[-1]["first_loss"] == expected.losses[1]


def test_two_then_four_then_one_rank_see_the_same_samples(
    run: Run, run_until_killed: Run, run_config: MakeConfig, saved: Saved
) -> None:
    steps = {"training": {"steps": 6}}
    undisturbed = run_config(job={"dump_folder": run_config().job.dump_folder + "-2"}, **steps)
    config = run_config(**steps)
    expected = run(2, undisturbed)
    run_until_killed(2, config, kill_at=3)
    run_until_killed(4, config, kill_at=5)
    outcome = run(1, config)
    assert list(outcome.losses) == [5, 6]
    assert outcome.losses == pytest.approx(
        {step: expected.losses[step] for step in (5, 6)}, rel=1e-5
    )
    ours, theirs = saved(config, 6), saved(undisturbed, 6)
    assert torch.equal(ours["ledger.digest"], theirs["ledger.digest"])
    assert outcome.reports[-1]["ledger"] == expected.reports[-1]["ledger"]
    assert torch.equal(ours["data_loader.cursors"], theirs["data_loader.cursors"])
    assert torch.equal(ours["train_state.tokens"], theirs["train_state.tokens"])
