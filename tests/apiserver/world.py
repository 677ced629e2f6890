"""Workers as the stand-in knows them: what they are, what befalls them, and what they say.

A job's ranks make steps together and write checkpoints into a volume that is a number. What happens
beside that is scripted by step, so that a run is the same however long the operator was away.
"""

import asyncio
import itertools
import os
import time
from dataclasses import dataclass, field

from aiohttp import web

from pretrain_api.wire import (
    Assignment,
    CheckpointReport,
    ExitCode,
    Failure,
    Progress,
    Result,
    TerminationMessage,
)

from .api import Body

TICK_SECONDS = 0.05  # a step

_numbers = itertools.count(1)


def _address() -> str:
    """An address that no other pod of this process has, and hardly one of another process."""
    number = next(_numbers)
    return f"127.{1 + os.getpid() % 250}.{number // 250}.{1 + number % 250}"


@dataclass(frozen=True)
class Fail:
    """The container of a worker ends with this code."""

    worker: int
    code: int


@dataclass(frozen=True)
class Lose:
    """A worker and the kubelet of its node fall silent; the node is said not to be ready."""

    worker: int


@dataclass(frozen=True)
class Wait:
    """Training stands at this step until the test lets it go on."""


Deed = Fail | Lose | Wait


@dataclass
class Run:
    """One job as its workers know it: what is on the volume, and what is yet to happen."""

    script: dict[int, Deed]
    steps: int
    interval: int = 10
    checkpoint: int = 0
    fence: int = 0
    standing: asyncio.Event = field(default_factory=asyncio.Event)
    complaints: list[str] = field(default_factory=list)

    def progress(self, worker: "Worker") -> Progress:
        """What the ranks of a worker know."""
        if not worker.started:
            return Progress()
        kept = self.checkpoint
        report = CheckpointReport(step=kept, time=time.time(), path=f"step-{kept}", bytes=kept)
        return Progress(
            step=worker.step,
            steps=self.steps,
            tokens=worker.step * 1024,
            loss=10 - worker.step / 100,
            first_loss=10.0,
            step_seconds=TICK_SECONDS,
            resumed_from=worker.resumed,
            checkpoint=report if kept else None,
            ledger=f"{worker.step:016x}",
        )


@dataclass(eq=False)
class Worker:
    """One pod from its creation to its end."""

    pod: Body
    index: int
    address: str = field(default_factory=_address)
    site: web.TCPSite | None = None
    assignment: Assignment | None = None
    step: int = 0
    started: int = 0  # generation in which its ranks run or ran last
    resumed: int | None = None
    beat: float = field(default_factory=time.monotonic)
    silent: bool = False
    paused: bool = False
    ending: bool = False
    over: bool = False

    @property
    def name(self) -> str:
        return self.pod["metadata"]["name"]

    @property
    def uid(self) -> str:
        return self.pod["metadata"]["uid"]

    @property
    def leaving(self) -> bool:
        return "deletionTimestamp" in self.pod["metadata"]

    @property
    def generation(self) -> int:
        return self.assignment.generation if self.assignment else 0


def last_words(worker: Worker, progress: Progress, code: int) -> TerminationMessage:
    """What the agent of a worker leaves behind when its container ends with this code."""
    results = {0: Result.COMPLETE, ExitCode.CONFIG: Result.CONFIG}
    results[ExitCode.PREEMPTED] = Result.PREEMPTED
    result = results.get(code, Result.FAILED)
    rank = worker.assignment.rank if worker.assignment else None
    failure = None
    if result in (Result.FAILED, Result.CONFIG):
        said = f"the script says so at step {progress.step}"
        reason = "Config" if result is Result.CONFIG else "RankFailed"
        failure = Failure(rank=rank, exit_code=code, reason=reason, message=said)
    return TerminationMessage(
        result=result,
        generation=worker.generation,
        rank=rank,
        exit_code=code,
        progress=progress,
        failure=failure,
    )
