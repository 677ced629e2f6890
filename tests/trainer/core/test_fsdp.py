"""What FSDP2 was told: seen in what is gathered, in which dtypes, and where shards live."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pretrain_api.config import RunConfig
from pretrain_trainer.settings import Place
from pretrain_trainer.supervision import Supervision
from pretrain_trainer.trainer import build_trainer
from pretrain_trainer.world import joined_world

Ranks = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]


def observed(config: RunConfig) -> dict[str, Any]:
    """Gathers of the second forward and backward pass, and dtypes and devices seen there."""
    from torch.distributed.tensor.debug import CommDebugMode

    with joined_world(config, Place.from_environment(os.environ)) as world:
        (model,) = build_trainer(config, world, Supervision(world.place)).machine.parts
        tokens = torch.arange(32).view(1, 32)
        seen: dict[str, Any] = {}
        for _ in range(2):
            with CommDebugMode() as forward:
                logits = model(tokens)
            with CommDebugMode() as backward:
                logits.float().mean().backward()
            for name, mode in (("forward", forward), ("backward", backward)):
                counts = mode.get_comm_counts()
                seen[name] = sum(n for op, n in counts.items() if "gather" in str(op))
        weight = model.layers["0"].attention.wq.weight
        local = weight.to_local()
        grad = weight.grad
        assert grad is not None
        return seen | {
            "logits": str(logits.dtype),
            "grad": str(grad.dtype),
            "rope": str(model.rope.dtype),
            "rows": local.shape[0],
            "devices": {local.device.type, grad.device.type},
        }


BLOCKS = 2  # of the tiny model; embedding and output are units beside them


@pytest.mark.parametrize(
    ("policy", "forward", "backward"),
    [
        ("default", BLOCKS + 2, BLOCKS + 1),  # what comes first in backward was kept
        ("always", BLOCKS + 2, BLOCKS + 2),
        ("never", BLOCKS + 2, 0),
    ],
)
def test_resharding_decides_what_is_gathered_again(
    ranks: Ranks, run_config: MakeConfig, policy: str, forward: int, backward: int
) -> None:
    config = run_config(parallelism={"fsdp_reshard_after_forward": policy})
    for seen in ranks(2, observed, config):
        assert (seen["forward"], seen["backward"]) == (forward, backward)


def test_mixed_precision_casts_parameters_but_not_gradients_or_positions(
    ranks: Ranks, run_config: MakeConfig
) -> None:
    (seen,) = ranks(1, observed, run_config(training={"mixed_precision_param": "bfloat16"}))
    assert (seen["logits"], seen["grad"], seen["rope"]) == (
        "torch.bfloat16",
        "torch.float32",
        "torch.float32",
    )


def test_a_rank_holds_its_share(ranks: Ranks, run_config: MakeConfig) -> None:
    assert [seen["rows"] for seen in ranks(2, observed, run_config())] == [16, 16]
    hybrid = run_config(parallelism={"data_parallel_replicate_degree": 2})
    assert [seen["rows"] for seen in ranks(2, observed, hybrid)] == [32, 32]
