"""Experts on several ranks: what travels arrives, biases agree, and keys that can't be are refused.

That layouts compute what one process does is told in test_matrix.py. There a near-tie between two
experts could be decided by rounding, and no tolerance would help. So its model and seed are such
that no choice in its ten steps is near: a test here measures how near.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain_api.config import RunConfig
from pretrain_api.wire import Order
from pretrain_trainer.alive import unwatched
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.moe import Router, mixtures
from pretrain_trainer.parallel.expert import dispatched
from pretrain_trainer.settings import Place
from pretrain_trainer.step import fetch, run_step
from pretrain_trainer.supervision import Supervision
from pretrain_trainer.trainer import build_trainer
from pretrain_trainer.world import joined_world

Ranks = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]

EXPERTS = 6  # over 3 ranks


def sent_and_answered(config: RunConfig, draws: int) -> list[tuple[Tensor, Tensor, int]]:
    """Rows of random loads, some of them empty: answers and gradients, expected and got."""
    found = []
    with joined_world(config, Place.from_environment(os.environ)) as world:
        rank, group = world.place.rank, dist.group.WORLD
        assert group is not None
        factors = torch.arange(1.0, EXPERTS + 1)  # an expert multiplies by its number
        here = factors.view(3, -1)[rank]
        taken = []

        def own(rows: Tensor, counts: Tensor) -> Tensor:
            taken.append(int(counts.sum()))
            assert rows.shape[0] == taken[-1]
            return rows * here.repeat_interleave(counts).unsqueeze(1)

        for seed in range(draws):
            draw = torch.Generator().manual_seed(1000 * seed + rank)
            counts = torch.randint(0, 5, (EXPERTS,), generator=draw)
            counts *= torch.randint(0, 2, (EXPERTS,), generator=draw)
            if seed == 0:
                counts.zero_()  # nobody has anything to say
            if seed == 1:
                counts = torch.tensor([7, 0, 0, 0, 0, 0])  # all to one expert
            rows = torch.randn(int(counts.sum()), 4, generator=draw).requires_grad_()
            factor = factors.repeat_interleave(counts).unsqueeze(1)
            got = dispatched(rows, counts, own, group)
            (grad,) = torch.autograd.grad(got.sum(), rows)
            found.append((rows.detach() * factor, got.detach(), taken[-1]))
            found.append((factor.expand(-1, 4), grad, 0))
        return found


def test_every_row_reaches_its_expert_and_comes_back(ranks: Ranks, run_config: MakeConfig) -> None:
    config = run_config(training={"global_batch_size": 3})
    results = ranks(3, sent_and_answered, config, 8)
    for result in results:
        assert all(torch.equal(expected, got) for expected, got, _ in result)
    for step in zip(*results, strict=True):
        if any(taken for *_, taken in step):  # no row is dropped or made up on the way
            assert sum(taken for *_, taken in step) == sum(len(rows) for rows, *_ in step)


def biases(config: RunConfig) -> tuple[list[list[float]], list[list[int]]]:
    """Of every layer after all steps; and what is still counted."""
    with joined_world(config, Place.from_environment(os.environ)) as world:
        trainer = build_trainer(config, world, Supervision(world.place))
        machine = trainer.machine
        for _ in range(config.training.steps):
            data = fetch(machine.loader, unwatched)
            run_step(machine, trainer.state, config.training, Order.NONE, data)
        machine.loader.close()
        mixed = [moe for part in machine.parts for moe in mixtures(part)]
        return [m.expert_bias.tolist() for m in mixed], [m.step_load.tolist() for m in mixed]


def test_biases_are_the_same_on_every_rank_and_layout(ranks: Ranks, run_config: MakeConfig) -> None:
    """Also where the choice is computed twice, by recomputation or on ranks that split experts."""
    steps = {"training": {"steps": 4}, "model": {"flavor": "tiny_moe"}}
    ((expected, left),) = ranks(1, biases, run_config(**steps))
    assert left == [[0] * 4] * 2
    assert all(any(layer) for layer in expected)
    recompute = {"activation_checkpoint": {"mode": "full"}}
    ep = {"expert_parallel_degree": 2}
    for size, sections in (
        (2, {"parallelism": ep, **recompute}),
        (
            4,
            {
                "parallelism": ep
                | {"tensor_parallel_degree": 2, "data_parallel_replicate_degree": 2}
            },
        ),
        (2, {"parallelism": {"tensor_parallel_degree": 2}}),
    ):
        for found, _ in ranks(size, biases, run_config(**steps, **sections)):
            assert found == expected, sections


def nearest_choice(config: RunConfig) -> float:
    """Of all choices in all steps: the least by which an expert that was chosen was ahead.

    In units of the spread of the scores, because rounding is relative to what is rounded.
    """
    found = []
    forward = Router.forward

    def look(router: Router, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scores = router.gate(x).sigmoid()
            last, first = (scores + bias).topk(router.shape.top_k + 1).values.T[-2:]
            found.append(float((last - first).min() / scores.std()))
        return forward(router, x, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "forward", look)
        biases(config)
    return min(found)


def test_no_choice_of_the_matrix_is_near_enough_for_rounding(
    ranks: Ranks, run_config: MakeConfig
) -> None:
    training = {"steps": 10, "global_batch_size": 8}  # as test_matrix.py has it
    config = run_config(training=training, model={"flavor": "tiny_moe"})
    (nearest,) = ranks(1, nearest_choice, config)
    # Losses of layouts differ by less than 1e-6, so do scores; this is well above.
    assert nearest > 2e-5


def refused(config: RunConfig) -> str:
    """What is said about a configuration."""
    with joined_world(config, Place.from_environment(os.environ)) as world:
        with pytest.raises(BadInputError) as caught:
            build_trainer(config, world, Supervision(world.place))
        return str(caught.value)


def test_forced_balance_needs_experts(ranks: Ranks, run_config: MakeConfig) -> None:
    config = run_config(training={"debug_moe_force_load_balance": True})
    assert ranks(1, refused, config) == [
        "training.debug_moe_force_load_balance: llama3 tiny has no experts; leave it at its default"
    ]


def test_forced_balance_is_equal(ranks: Ranks, run_config: MakeConfig) -> None:
    config = run_config(
        model={"flavor": "tiny_moe"},
        training={"debug_moe_force_load_balance": True},
        parallelism={"expert_parallel_degree": 2},
    )
    for found, _ in ranks(2, biases, config):
        assert found == [[0.0] * 4] * 2
