"""A PretrainJob as kubectl shows it, reduced to what the demo tells about it. Pure."""

import json
from dataclasses import dataclass
from typing import Any

from pretrain_api.status import CheckpointStatus, JobStatus


@dataclass(frozen=True)
class Snapshot:
    """A job's status at one moment."""

    status: JobStatus

    @classmethod
    def parse(cls, text: str) -> "Snapshot":
        """From the JSON of `kubectl get pretrainjob NAME -o json`."""
        document: dict[str, Any] = json.loads(text)
        return cls(JobStatus.model_validate(document.get("status") or {}))

    @property
    def phase(self) -> str:
        """One word, Pending before the operator saw the job."""
        return str(self.status.phase or "Pending")

    @property
    def step(self) -> int:
        """Optimizer steps done, as last reported."""
        return self.status.progress.step if self.status.progress else 0

    @property
    def steps(self) -> int:
        """Optimizer steps in all, 0 while unknown."""
        return self.status.progress.steps if self.status.progress else 0

    @property
    def loss(self) -> float | None:
        """Loss of the last reported step."""
        return self.status.progress.loss if self.status.progress else None

    @property
    def first_loss(self) -> float | None:
        """Loss of the first step."""
        return self.status.progress.first_loss if self.status.progress else None

    @property
    def resumed_from(self) -> int | None:
        """Step of the checkpoint the present run started from."""
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
        return "  ".join(parts)


def bar(done: int, total: int, width: int = 24) -> str:
    """A bar of ``width`` characters, full when ``done`` reaches ``total``."""
    full = width * min(done, total) // total
    return "█" * full + "░" * (width - full)
