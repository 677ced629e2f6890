"""The planner's memory beside what the trainer's own model allocates: ``make check-memory``.

A model of any size is built as in training, by the trainer's ``parallelize``, in a world of any
size on this one process: tensors have shapes but no bytes, and collectives do nothing. What is
allocated is counted by torch's tracker. One thing is put in place of the CPU's: the norm, which on
a GPU is one kernel that keeps its input, and here would be a chain of operators that keep more.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

from pretrain_api.config import RunConfig
from pretrain_api.estimate.memory import Memory, memory
from pretrain_api.estimate.plan import DEBUG_VOCABULARY, GIB
from pretrain_api.mesh import resolve, shape_of
from pretrain_trainer.engine import Engine, Whole
from pretrain_trainer.models.attention import Documents
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.models.registry import build_model
from pretrain_trainer.optim import build_optimizer
from pretrain_trainer.parallel import parallelize
from pretrain_trainer.parallel.layout import local
from pretrain_trainer.parallel.mesh import Mesh, build_mesh
from pretrain_trainer.precision.convert import convert
from pretrain_trainer.trainer import place_model

CPU = torch.device("cpu")
LAYERS = 4  # that run, unless told otherwise
KEPT, PEAK = 0.01, 0.05  # largest errors allowed


@dataclass(frozen=True, slots=True)
class Case:
    """A model on a world, as the seeds lay it out."""

    flavor: str
    ranks: int
    parallelism: dict[str, Any]
    recompute: dict[str, str]
    local_batch_size: int = 1
    rank: int = 0
    seq_len: int = 8192

    @property
    def title(self) -> str:
        """One line."""
        degrees = [f"{key.removesuffix('_degree')} {n}" for key, n in self.parallelism.items()]
        told = [self.flavor, f"{self.ranks} ranks", *degrees, "recompute " + self.recompute["mode"]]
        return ", ".join([*told, f"{self.local_batch_size} x {self.seq_len}", f"rank {self.rank}"])

    @property
    def config(self) -> RunConfig:
        """The configuration of a run."""
        return RunConfig.model_validate({
            "model": {"flavor": self.flavor},
            "training": {
                "dataset": "c4",
                "local_batch_size": self.local_batch_size,
                "seq_len": self.seq_len,
            },
            "parallelism": self.parallelism,
            "activation_checkpoint": self.recompute,
        })  # fmt: skip


STATE, PASSES = ("parameters", "optimizer"), ("gradients", "kept", "peak")

FULL, NONE = {"mode": "full"}, {"mode": "none"}
BY_OPERATOR = {"mode": "selective", "selective_ac_option": "op"}
EVERY_SECOND = {"mode": "selective", "selective_ac_option": "2"}
TP8 = {"tensor_parallel_degree": 8}
CP8 = {"context_parallel_degree": 8}
PP8 = TP8 | {"pipeline_parallel_degree": 8}
CASES = (
    Case("8B", 8, {}, BY_OPERATOR, 2),
    Case("8B", 8, {}, NONE),
    Case("8B", 8, {}, EVERY_SECOND),
    Case("8B", 8, {"tensor_parallel_degree": 2}, FULL, 2),
    Case("8B", 8, CP8, FULL, seq_len=131_072),
    Case("70B", 256, {}, FULL),
    Case("70B", 256, TP8, FULL, 16),
    Case("70B", 256, TP8, BY_OPERATOR, 4),
    Case("405B", 512, {}, FULL),
    Case("405B", 512, TP8, FULL, 2),
    Case("405B", 512, TP8 | {"data_parallel_replicate_degree": 2}, BY_OPERATOR),
    Case("405B", 512, PP8, FULL, 32),
    Case("405B", 512, PP8, FULL, 32, rank=448),
)


@dataclass(frozen=True, slots=True)
class State:
    """Bytes of one rank that last."""

    parameters: int
    optimizer: int


@dataclass(frozen=True, slots=True)
class Passes:
    """Bytes of one rank that come and go: gradients, activations between the passes, the most."""

    gradients: int
    kept: int
    peak: int


def measure(
    config: RunConfig, ranks: int, rank: int, layers: int | None
) -> tuple[State, Passes | None]:
    """Build what one of ``ranks`` has of its model, and run a shorter one forward and backward.

    That one has ``layers`` blocks, or all if 0: the tracker takes seconds for each. A pipeline is
    only built, and so is all else without ``layers``. Nothing else may be distributed in this
    process, before or after: DTensor remembers meshes.
    """
    with _alone_among(ranks, rank), _as_on_a_gpu():
        mesh = build_mesh(resolve(config.parallelism, ranks), CPU)
        with _built(config, mesh) as (parts, engine, optimizer):
            state = State(
                parameters=_held(p for part in parts for p in part.parameters()),
                optimizer=_held(v for s in optimizer.state.values() for v in s.values()),
            )
        if layers is None or not isinstance(engine, Whole):
            return state, None
        with _built(config, mesh, layers) as ((model,), _, optimizer):
            return state, _passes(model, optimizer, config, mesh)


@contextmanager
def _built(
    config: RunConfig, mesh: Mesh, layers: int = 0
) -> Iterator[tuple[tuple[LanguageModel, ...], Engine, torch.optim.Optimizer]]:
    """What a rank trains with; within, tensors have no memory."""
    model = build_model(config.model, DEBUG_VOCABULARY, config.training.seq_len, torch.float32)
    for name in list(model.layers)[layers:] if layers else ():
        del model.layers[name]
    convert(model, config, CPU)
    # Meshes are made of real numbers, memory is not.
    with mock.patch.object(parallelize, "give_memory"):
        parts, engine = place_model(model, config, mesh, CPU)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in parts:
            parallelize.give_memory(part, CPU, offload=False)
        yield parts, engine, build_optimizer(parts, config.optimizer)


def _passes(
    model: LanguageModel, optimizer: torch.optim.Optimizer, config: RunConfig, mesh: Mesh
) -> Passes:
    """Go forward and backward once."""
    batch, length = config.training.local_batch_size, config.training.seq_len
    tracker = FSDPMemTracker(model, optimizer)
    with tracker:
        tokens = torch.zeros(batch, length // mesh.degrees.cp, dtype=torch.int64)
        documents = Documents(torch.zeros(batch, length, dtype=torch.int32))
        positions = torch.zeros(tokens.shape[1], dtype=torch.int64)
        loss = model(tokens, positions, tokens.clone(), documents)
        between = tracker.get_tracker_snapshot("current")[CPU]
        loss.backward()
    return Passes(
        gradients=_held(p.grad for p in model.parameters() if p.grad is not None),
        kept=sum(size for kind, size in between.items() if str(kind).endswith(".ACT")),
        peak=tracker.get_tracker_snapshot("peak")[CPU]["Total"],
    )


def predict(config: RunConfig, ranks: int, rank: int, layers: int = 0) -> Memory:
    """What the planner says of the same rank."""
    shape = shape_of(config.model)
    assert shape is not None, "the cases are of known models"
    degrees = resolve(config.parallelism, ranks)
    cut = dataclasses.replace(shape, n_layers=layers or shape.n_layers)
    stage = rank * degrees.pp // ranks
    return memory(config, cut, degrees, DEBUG_VOCABULARY)[stage]


@contextmanager
def _alone_among(ranks: int, rank: int) -> Iterator[None]:
    """One rank of a world that isn't there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Norms of one kernel, and no counting of shapes that DTensor only plans with."""
    plan = ShardingPropagator._propagate_tensor_meta_non_cached

    def unseen(*args: Any) -> Any:
        with _disable_current_modes():
            return plan(*args)

    name = ShardingPropagator._propagate_tensor_meta_non_cached.__name__
    with (
        mock.patch.object(nn.RMSNorm, "forward", _norm),
        mock.patch.object(ShardingPropagator, name, unseen),
    ):
        yield


class _Fused(torch.autograd.Function):
    """A norm whose input is all it keeps, as the GPU's is; here without values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
    """In place of a norm's forward pass. It needs no other rank's positions."""
    if not isinstance(x, DTensor):
        return _Fused.apply(x, self.weight)  # pyright: ignore[reportReturnType]
    weight = cast(DTensor, self.weight)
    own: Any = _Fused.apply(x.to_local(), weight.to_local())
    return DTensor.from_local(own, x.device_mesh, x.placements, run_check=False)


def _held(tensors: Iterator[Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def compare(
    config: RunConfig, ranks: int, rank: int, layers: int | None
) -> dict[str, tuple[int, int]]:
    """Predicted and measured bytes by component."""
    state, passes = measure(config, ranks, rank, layers)
    whole = predict(config, ranks, rank)
    found = {name: (getattr(whole, name), getattr(state, name)) for name in STATE}
    if passes is not None:
        cut = predict(config, ranks, rank, layers or 0)
        found |= {name: (getattr(cut, name), getattr(passes, name)) for name in PASSES}
    return found


def wrong(found: dict[str, tuple[int, int]]) -> list[str]:
    """Components that are too far off: state and gradients must be exact."""
    allowed = {"kept": KEPT, "peak": PEAK}
    return [
        name for name, (said, was) in found.items() if abs(said - was) > allowed.get(name, 0) * was
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the errors of every case; 1 if any is too large."""
    parser = argparse.ArgumentParser(prog="make check-memory", description=main.__doc__)
    parser.add_argument("--case", type=int, help="only this one, as JSON")
    parser.add_argument("--layers", type=int, default=LAYERS, help="that run; 0 is all")
    options = parser.parse_args(argv)
    if options.case is not None:
        case = CASES[options.case]
        print(json.dumps(compare(case.config, case.ranks, case.rank, options.layers)))
        return 0
    bad = False
    for number, case in enumerate(CASES):
        found = compared_apart(number, options.layers)
        bad |= bool(wrong(found))
        print(f"{case.title}{'' if not wrong(found) else '   TOO FAR OFF: ' + str(wrong(found))}")
        for name, (said, was) in found.items():
            error = f"{said / was - 1:+.1%}" if said != was else "exact"
            print(f"    {name:12}{said / GIB:9.3f} GiB, measured {was / GIB:9.3f}   {error}")
    return int(bad)


def compared_apart(number: int, layers: int) -> dict[str, tuple[int, int]]:
    """:func:`compare` in a process of its own. Raises CalledProcessError with what it said."""
    command = [sys.executable, "-m", __spec__.name, f"--case={number}", f"--layers={layers}"]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return {name: (said, was) for name, (said, was) in found.items()}


if __name__ == "__main__":
    sys.exit(main())
