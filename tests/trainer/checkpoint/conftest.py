"""Small managers, states and worlds for the checkpoint tests.

Ranks are forked, not spawned: a fork takes milliseconds, importing torch again takes seconds.
"""

import faulthandler
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # sharding a model imports it: better once than in every fork
import torch.distributed as dist

from pretrain_api.config import Checkpoint
from pretrain_trainer.checkpoint.manager import CheckpointManager
from pretrain_trainer.checkpoint.root import Identity

CHUNK = 512  # bytes; small enough that even toy tensors have several chunks
DEADLINE = 40  # seconds for a world of forked ranks

MakeManager = Callable[..., CheckpointManager]
MakeState = Callable[..., dict[str, Any]]


@pytest.fixture
def manager(tmp_path: Path) -> MakeManager:
    """Make a manager: keywords of Checkpoint and Identity, all with defaults."""
    return _manager_maker(tmp_path / "checkpoint")


@pytest.fixture
def manager_at() -> Callable[[Path], MakeManager]:
    """The same for another root."""
    return _manager_maker


@pytest.fixture
def state() -> MakeState:
    """Make a state whose numbers tell its step: ``state(7)``."""

    def make(step: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        return {
            "model": {
                "a.weight": torch.randn(17, 11, generator=generator),
                "a.bias": torch.randn(11, generator=generator, dtype=torch.bfloat16),
            },
            "optimizer": {"a.weight": {"exp_avg": torch.randn(17, 11, generator=generator)}},
            "train_state": {"step": torch.tensor(step), "tokens": torch.tensor(step * 100)},
            "ledger": torch.arange(step),
        }

    return make


@pytest.fixture
def same() -> Callable[[Any, Any], bool]:
    """Whether two states are equal bit for bit."""
    return _same


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """``run_ranks(size, work, *args)``: run work(rank, *args) in ``size`` ranks over gloo.

    Returns what each rank returned; a rank's exception becomes a failure of the test.
    """
    count = 0

    def run(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        nonlocal count
        count += 1
        return _run(size, tmp_path / f"store-{count}", work, args)

    return run


def _manager_maker(root: Path) -> MakeManager:
    def make(
        *,
        generation: int = 1,
        nonce: str = "secret",
        uid: str = "job-1",
        fingerprint: dict[str, str] | None = None,
        chunk_bytes: int = CHUNK,
        attempt: int = 0,
        recovering: bool = False,
        began: int | None = None,
        saved_step: int | None = None,
        **config: Any,
    ) -> CheckpointManager:
        identity = Identity(uid, generation, nonce, fingerprint or {}, attempt)
        section = Checkpoint(enable=True, **config)
        group = dist.group.WORLD if dist.is_initialized() else None
        return CheckpointManager(
            root,
            section,
            identity,
            group,
            recovering=recovering,
            began=began,
            saved_step=saved_step,
            chunk_bytes=chunk_bytes,
        )

    return make


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one.dtype == other.dtype and torch.equal(one, other)


def _run(size: int, store: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        context.Process(target=_rank, args=(rank, size, store, send, work, args))
        for rank, (_, send) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    try:
        answers = []
        for number, (receive, _) in enumerate(pipes):
            ready = wait([receive, ranks[number].sentinel], DEADLINE)
            assert receive in ready, f"rank {number} {'died' if ready else 'hangs'}"
            answers.append(receive.recv())
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    problems = [problem for problem, _ in answers if problem]
    assert not problems, "\n".join(problems)
    return [value for _, value in answers]


def _rank(
    rank: int, size: int, store: Path, send: Any, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    faulthandler.dump_traceback_later(DEADLINE - 10)  # where a rank hangs, if it does
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    # Before anything else has threads: after a fork, torch replaces its pool in the first call, and
    # aborts when several threads (of autograd) make it at once.
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=DEADLINE),
        )
        send.send(("", work(rank, *args)))
        dist.barrier()  # nobody closes its connections while another still talks
    except BaseException:
        send.send((f"rank {rank}: {traceback.format_exc()}", None))
