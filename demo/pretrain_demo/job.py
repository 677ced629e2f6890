"""A PretrainJob as kubectl shows it, reduced to what the demo tells about it. Pure.

The status is written every few seconds at most. What the leader says about itself is fresher; it is
used where the API server lets us read it, and done without where it doesn't.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, Self

from pydantic import ValidationError

from pretrain_api import names
from pretrain_api.status import CheckpointStatus, JobStatus
from pretrain_api.wire import WorkerStatus


@dataclass(frozen=True)
class Snapshot:
    """A job at one moment: its status and, if known, what its leader said."""

    status: JobStatus
    leader: WorkerStatus | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the JSON of `kubectl get pretrainjob NAME -o json`."""
        document: dict[str, Any] = json.loads(text)
        return cls(JobStatus.model_validate(document.get("status") or {}))

    def heard(self, answer: str) -> Self:
        """The same with a leader's answer; without it if that is of another generation or none."""
        try:
            leader = WorkerStatus.model_validate_json(answer)
        except ValidationError:
            return self
        return replace(self, leader=leader) if leader.generation == self.generation else self

    def after(self, before: Self | None) -> Self:
        """The same, with what the leader said before if it is silent and the status is older.

        At the end of training the leader is gone some seconds before the status has its last words.
        """
        said = before.leader if before and not self.leader else None
        if said is None or said.generation != self.generation or said.progress.step <= self.step:
            return self
        return replace(self, leader=said)

    @property
    def phase(self) -> str:
        """One word, Pending before the operator saw the job."""
        return str(self.status.phase or "Pending")

    @property
    def step(self) -> int:
        """Optimizer steps done, as last heard."""
        if self.leader and self.leader.progress.steps:
            return self.leader.progress.step
        return self.status.progress.step if self.status.progress else 0

    @property
    def steps(self) -> int:
        """Optimizer steps in all, 0 while unknown."""
        if self.leader and self.leader.progress.steps:
            return self.leader.progress.steps
        return self.status.progress.steps if self.status.progress else 0

    @property
    def loss(self) -> float | None:
        """Loss of the last step heard of."""
        if self.leader and self.leader.progress.loss is not None:
            return self.leader.progress.loss
        return self.status.progress.loss if self.status.progress else None

    @property
    def first_loss(self) -> float | None:
        """Loss of the first step."""
        return self.status.progress.first_loss if self.status.progress else None

    @property
    def resumed_from(self) -> int | None:
        """Step of the checkpoint the present run started from."""
        if self.leader and self.leader.progress.resumed_from is not None:
            return self.leader.progress.resumed_from
        return self.status.progress.resumed_from if self.status.progress else None

    @property
    def checkpoint(self) -> CheckpointStatus | None:
        """The newest committed checkpoint."""
        return self.status.checkpoint

    @property
    def generation(self) -> int:
        """Generation of the world."""
        return self.status.assignment.generation if self.status.assignment else 0

    @property
    def restarts(self) -> int:
        """Restarts of the world or of a pod."""
        return self.status.restarts.total if self.status.restarts else 0

    def pod(self, index: int) -> str | None:
        """Name of the pod that is worker ``index``, None before there is one."""
        members = self.status.assignment.workers if self.status.assignment else ()
        return next((member.pod for member in members if member.index == index), None)

    def holds(self, condition: str) -> bool:
        """Whether a condition of that type is True."""
        return any(c.type == condition and c.status == "True" for c in self.status.conditions)

    def reason(self, condition: str) -> str:
        """Reason and message of a condition, empty if it isn't there."""
        found = [c for c in self.status.conditions if c.type == condition]
        return f"{found[0].reason}: {found[0].message}" if found else ""

    def line(self) -> str:
        """The job in one line, for people."""
        parts = [f"{self.phase:<10}"]
        if self.steps:
            width = len(str(self.steps))
            parts.append(f"step {self.step:>{width}}/{self.steps} {bar(self.step, self.steps)}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.checkpoint:
            parts.append(f"checkpoint {self.checkpoint.step}")
        if self.restarts:
            parts.append(f"restarts {self.restarts}")
        return "  ".join(parts).rstrip()


def status_path(namespace: str, pod: str) -> str:
    """Where the API server forwards to a worker's /status."""
    return f"/api/v1/namespaces/{namespace}/pods/{pod}:{names.HTTP_PORT}/proxy/status"


def bar(done: int, total: int, width: int = 24) -> str:
    """A bar of ``width`` characters, full when ``done`` reaches ``total``."""
    full = width * min(done, total) // total
    return "█" * full + "░" * (width - full)
