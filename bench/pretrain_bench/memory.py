"""A container's memory limit, drawn so tight around what it uses that its next page is too much.

The kernel then kills a process of the container, as it does when a job was given too little memory.
Limits are changed in the control group itself, on cgroup v1 and v2; the cluster is not told.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pretrain_bench.client import BenchError
from pretrain_devcluster.cgroups import machine_hierarchies

STEP = 2**20  # bytes by which a limit is drawn tighter at a time
KILL_SECONDS = 60.0  # for a process to want one more page
LOOK_SECONDS = 0.005


@dataclass(frozen=True)
class MemoryGroup:
    """The memory control group of a container.

    Attributes:
        limit, usage, events: its files for the limit in bytes, for the bytes in use, and for how
            often the kernel has killed.
    """

    limit: Path
    usage: Path
    events: Path

    @classmethod
    def of(cls, pid: int) -> Self:
        """The group that a process is in. Raises BenchError if it can't be found."""
        roots = machine_hierarchies()
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                folder = next(root for root in roots if root.name == "memory") / path.lstrip("/")
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control")
                return cls(*(folder / name for name in names))
            if not controllers and len(roots) == 1:
                folder = roots[0] / path.lstrip("/")
                return cls(*(folder / f"memory.{name}" for name in ("max", "current", "events")))
        raise BenchError(f"process {pid} is in no memory control group")

    def kills(self) -> int:
        """How often the kernel has killed a process of the group."""
        counts = dict(line.split() for line in self.events.read_text().splitlines())
        return int(counts["oom_kill"])

    def exhaust(self) -> float:
        """Draw the limit tight until a process is killed, and put it back.

        Returns:
            When the kill was seen, in seconds since the epoch.

        Raises:
            BenchError: nothing was killed.
        """
        usual, before = self.limit.read_text(), self.kills()
        deadline = time.monotonic() + KILL_SECONDS
        try:
            while self.kills() == before:
                if time.monotonic() > deadline:
                    raise BenchError(f"no process of {self.limit.parent} ran out of memory")
                self._tighten()
                time.sleep(LOOK_SECONDS)
            return time.time()
        finally:
            self.limit.write_text(usual.replace("9223372036854771712", "-1"))

    def _tighten(self) -> None:
        """A little less than is used now. cgroup v1 refuses what can't be had without a kill."""
        try:
            self.limit.write_text(str(int(self.usage.read_text()) - STEP))
        except OSError:
            return
