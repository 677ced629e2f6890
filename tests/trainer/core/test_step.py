"""What a step does when gradients are not finite, what ranks agree on, and when they talk."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_api.config import RunConfig
from pretrain_api.wire import Order
from pretrain_trainer import step as step_module
from pretrain_trainer.agreement import HASH_MODULUS, agree, count
from pretrain_trainer.alive import unwatched
from pretrain_trainer.checkpoint.errors import CheckpointError
from pretrain_trainer.data.errors import DataError
from pretrain_trainer.loss import cross_entropy_sum, valid_tokens
from pretrain_trainer.settings import Place
from pretrain_trainer.supervision import Supervision
from pretrain_trainer.trainer import Trainer, build_trainer
from pretrain_trainer.world import World, joined_world

MakeConfig = Callable[..., RunConfig]


def trainer_of(config: RunConfig, world: World) -> Trainer:
    return build_trainer(config, world, Supervision(world.place))


def take_step(trainer: Trainer) -> step_module.StepReport | None:
    machine, training = trainer.machine, trainer.config.training
    data = step_module.fetch(machine.loader, unwatched)
    return step_module.run_step(machine, trainer.state, training, Order.NONE, data)


def poisoned_steps(config: RunConfig, poisoned: list[int]) -> dict[str, Any]:
    """Take all steps; in the poisoned ones the loss is infinite on the last rank only."""
    place = Place.from_environment(os.environ)
    with joined_world(config, place) as world:
        trainer = trainer_of(config, world)
        machine, state = trainer.machine, trainer.state
        result: dict[str, Any] = {"changed": [], "norms": []}
        for number in range(1, config.training.steps + 1):
            bad = number in poisoned and place.rank == place.world_size - 1

            def poison(model: Any, inputs: Any, loss: Any, bad: bool = bad) -> Any:
                return loss * (math.inf if bad else 1.0)

            hook = machine.parts[-1].register_forward_hook(poison)
            norm = machine.parts[-1].norm
            assert norm is not None
            weight = norm.weight
            before = weight.full_tensor().clone()  # pyright: ignore[reportCallIssue]  # a DTensor
            try:
                report = take_step(trainer)
            except step_module.HopelessError as error:
                return result | {"error": str(error), "step": state.step}
            finally:
                hook.remove()
            assert report is not None
            after = weight.full_tensor()  # pyright: ignore[reportCallIssue]
            result["changed"].append(not torch.equal(before, after))
            result["norms"].append(report.grad_norm)
        return result | {"in_a_row": state.skipped_in_a_row, "step": state.step}


def test_a_step_without_finite_gradients_is_skipped_on_all_ranks(
    ranks: Callable[..., Any], run_config: MakeConfig
) -> None:
    config = run_config(checkpoint={"enable": False})
    for result in ranks(2, poisoned_steps, config, [2]):
        assert result["changed"] == [True, False, True, True]
        assert [math.isfinite(norm) for norm in result["norms"]] == [True, False, True, True]
        assert (result["in_a_row"], result["step"]) == (0, 4)


def test_too_many_skipped_steps_in_a_row_end_the_run(
    ranks: Callable[..., Any], run_config: MakeConfig
) -> None:
    config = run_config(training={"steps": 40}, checkpoint={"enable": False})
    poisoned = list(range(3, 40))
    (result,) = ranks(1, poisoned_steps, config, poisoned)
    assert result["changed"] == [True, True] + [False] * (step_module.MAX_SKIPPED - 1)
    assert "not finite in 10 steps in a row" in result["error"]


def test_policy_stop_ends_at_the_first(ranks: Callable[..., Any], run_config: MakeConfig) -> None:
    config = run_config(training={"non_finite": "stop"}, checkpoint={"enable": False})
    for result in ranks(2, poisoned_steps, config, [2]):
        assert result["error"] == (
            "step 2: gradients are not finite, and training.non_finite is stop"
        )


def communications(config: RunConfig) -> dict[str, int]:
    """Calls of each collective in one step, after a first one."""
    from torch.distributed.tensor.debug import CommDebugMode

    with joined_world(config, Place.from_environment(os.environ)) as world:
        trainer = trainer_of(config, world)
        take_step(trainer)
        with CommDebugMode() as seen:
            take_step(trainer)
        return {str(name): calls for name, calls in seen.get_comm_counts().items()}


def test_gradients_are_reduced_once_per_step(
    ranks: Callable[..., Any], run_config: MakeConfig
) -> None:
    def reductions(local_batch_size: int) -> int:
        config = run_config(
            training={"local_batch_size": local_batch_size}, checkpoint={"enable": False}
        )
        counts = ranks(2, communications, config)[0]
        return sum(n for name, n in counts.items() if "reduce_scatter" in name)

    assert reductions(local_batch_size=1) == reductions(local_batch_size=2) > 0


def agreed(orders: list[Order]) -> tuple[Any, str]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = count(10 + rank, HASH_MODULUS - 1 - rank, rank == 0, orders[rank])
    everybody = dist.group.WORLD
    assert everybody is not None
    total = agree(own, everybody)
    return (total.valid_tokens, total.sample_hash, total.ended), total.order.value


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        ([Order.NONE, Order.NONE], Order.NONE),
        ([Order.NONE, Order.SAVE], Order.SAVE),
        ([Order.DRAIN, Order.SAVE], Order.DRAIN),
        ([Order.DRAIN, Order.STOP], Order.STOP),
    ],
)
def test_ranks_agree_on_sums_and_on_the_gravest_order(
    ranks: Callable[..., Any], orders: list[Order], expected: Order
) -> None:
    for sums, order in ranks(2, agreed, orders):
        assert sums == (21, HASH_MODULUS - 3, 1)
        assert order == expected


def test_loss_is_a_sum_over_valid_positions() -> None:
    logits = torch.zeros(2, 3, 8)
    labels = torch.tensor([[1, 2, -100], [-100, -100, -100]])
    assert cross_entropy_sum(logits, labels).item() == pytest.approx(2 * math.log(8))
    assert valid_tokens(labels) == 2


def resumed(*configs: RunConfig) -> str:
    """Every rank starts with a configuration of its own; returns how that went."""
    place = Place.from_environment(os.environ)
    config = configs[place.rank]
    with joined_world(config, place) as world:
        try:
            trainer_of(config, world).resume()
        except (DataError, CheckpointError) as error:
            return f"{type(error).__name__}: {error}"
    return "resumed"


def test_no_rank_trains_beside_one_that_sees_other_samples(
    ranks: Callable[..., Any], run_config: MakeConfig, documents: Path, tmp_path: Path
) -> None:
    shorter = tmp_path / "shorter" / documents.name
    shorter.parent.mkdir()
    shorter.write_text("".join(documents.read_text().splitlines(keepends=True)[:-1]))
    first, last = ranks(
        2, resumed, run_config(), run_config(training={"dataset_path": str(shorter)})
    )
    assert last.startswith("DataError: this worker sees other samples than rank 0: data is ")
    assert first == f"CheckpointError: rank 1 failed: {last}"
    assert ranks(2, resumed, run_config(), run_config()) == ["resumed"] * 2
