"""Initial parameters: equal on every layout, and no rank draws much more than it holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain_api.config import RunConfig
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_trainer.init import BLOCK_ELEMENTS, initialise
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.parallel.parallelize import parallelize
from pretrain_trainer.settings import Place
from pretrain_trainer.world import joined_world

CPU = torch.device("cpu")
# Rows of 96 make blocks of 170 rows, which no shard's border respects; 5,001 rows can't be shared
# evenly.
SHAPE = LlamaShape(dim=96, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=5001, multiple_of=32)
# 190 MB in float32: enough to tell a whole model from a quarter of one.
BIG = LlamaShape(dim=512, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=40_000, multiple_of=32)


def initialised(config: RunConfig) -> tuple[dict[str, Tensor], int, int]:
    """Full parameters, numbers drawn, and elements held, by this rank."""
    import os

    with joined_world(config, Place.from_environment(os.environ)) as world:
        with torch.device("meta"):
            model = Llama3(SHAPE, seq_len=8)
        parallelize(model, config, world.mesh, world.device)
        drawn = initialise(model, seed=3, device=world.device)
        held = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
        full = {
            name: p.full_tensor().detach().clone()
            for name, p in model.named_parameters()
            if isinstance(p, DTensor)
        }
        return full, drawn, held


def alone(seed: int = 3) -> Llama3:
    model = Llama3(SHAPE, seq_len=8)
    initialise(model, seed, CPU)
    return model


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (4, {}),
    (4, {"data_parallel_replicate_degree": 2}),
    (4, {"data_parallel_replicate_degree": 4}),
    (4, {"fsdp_reshard_after_forward": 2}),
]


@pytest.mark.parametrize(("size", "parallelism"), LAYOUTS)
def test_equal_on_every_layout(
    ranks: Callable[..., Any],
    run_config: Callable[..., RunConfig],
    size: int,
    parallelism: dict[str, Any],
) -> None:
    config = run_config(parallelism=parallelism)
    expected = dict(alone().named_parameters())
    for full, _, _ in ranks(size, initialised, config):
        assert full.keys() == expected.keys()
        assert all(torch.equal(full[name], expected[name]) for name in expected)


def test_a_rank_draws_little_more_than_its_shard(
    ranks: Callable[..., Any], run_config: Callable[..., RunConfig]
) -> None:
    config = run_config()
    drawn_parameters = sum(1 for p in alone().parameters() if p.ndim > 1)
    whole = sum(p.numel() for p in alone().parameters() if p.ndim > 1)
    for size in (2, 4):
        results = ranks(size, initialised, config)
        for _, drawn, held in results:
            # One block at each end of each parameter's shard may reach beyond it.
            assert drawn <= held + 2 * BLOCK_ELEMENTS * drawn_parameters
            assert drawn < 1.5 * whole / size
        assert sum(held for _, _, held in results) == sum(p.numel() for p in alone().parameters())


def started_big(config: RunConfig) -> tuple[int, float]:
    """Peak of this rank's memory in bytes, and CPU seconds, from meta model to drawn weights."""
    import os
    import time

    def memory(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

    with joined_world(config, Place.from_environment(os.environ)) as world:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is held now
        before, started = memory("VmRSS:"), time.process_time()
        with torch.device("meta"):
            model = Llama3(BIG, seq_len=8)
        parallelize(model, config, world.mesh, world.device)
        initialise(model, seed=3, device=world.device)
        return memory("VmHWM:") - before, time.process_time() - started


def test_peak_memory_and_time_of_a_start_scale_with_the_shard(
    ranks: Callable[..., Any], run_config: Callable[..., RunConfig]
) -> None:
    config = run_config()
    with torch.device("meta"):
        whole = sum(4 * p.numel() for p in Llama3(BIG, seq_len=8).parameters())
    ((memory_alone, seconds_alone),) = ranks(1, started_big, config)
    assert memory_alone >= 0.9 * whole
    quarters = ranks(4, started_big, config)
    slack = 24 * 2**20  # bytes: torch's own tables and the allocator's arenas
    assert all(memory <= whole / 4 + slack for memory, _ in quarters)
    # A quarter of the numbers takes about a quarter of the CPU time; more where cores are shared.
    assert min(seconds for _, seconds in quarters) < 0.6 * seconds_alone


def test_scratch_memory_is_a_block_not_a_parameter() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            if "empty" in str(func) or "clone" in str(func):
                self.elements = max(self.elements, result.numel())
            return result

    model = Llama3(SHAPE, seq_len=8)
    with Largest() as seen:
        initialise(model, 3, CPU)
    assert 0 < seen.elements <= BLOCK_ELEMENTS


def test_values_follow_seed_name_and_distribution() -> None:
    model, again, other = alone(), alone(), alone(seed=4)
    parameters, twins = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(parameters[name], twins[name]) for name in parameters)
    assert not torch.equal(model.output.weight, other.output.weight)
    first = model.layers["0"]
    assert not torch.equal(first.attention.wk.weight, first.attention.wv.weight)
    rows = model.tok_embeddings.weight
    assert len(rows.unique(dim=0)) == len(rows)  # no block repeats another
    assert rows.std().item() == pytest.approx(1.0, abs=0.01)
    assert first.attention.wq.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert first.feed_forward.w2.weight.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.05)
    assert model.output.weight.abs().max().item() <= 3 * 96**-0.5
    assert torch.equal(model.norm.weight, torch.ones(96))


def test_bfloat16_parameters_are_the_rounded_twins() -> None:
    half = Llama3(SHAPE, seq_len=8).bfloat16()
    initialise(half, 3, CPU)
    assert torch.equal(half.output.weight, alone().output.weight.bfloat16())
