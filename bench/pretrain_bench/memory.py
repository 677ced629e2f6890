"""A container's memory limit, drawn so tight around what it uses that its next page is too much.

The kernel then kills a process of the container, as it does when a job was given too little memory.
Limits are changed in the control group itself, on cgroup v1 and v2; the cluster is not told.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pretrain_bench.client import BenchError
from pretrain_devcluster.cgroups import machine_hierarchies

STEP = 2**20  # bytes by which a limit is drawn tighter at a time
FLOOR = 0.9  # of the anonymous memory; a rank has more than a tenth of it
KILL_SECONDS = 60.0  # for a process to want one more page
LOOK_SECONDS = 0.005


@dataclass(frozen=True)
class MemoryGroup:
    """The memory control group of a container.

    Attributes:
        limit, usage, events: its files for the limit in bytes, for the bytes in use, and for how
            often the kernel has killed.
        anonymous: what its statistics call memory that can't be written to disk, in bytes.
    """

    limit: Path
    usage: Path
    events: Path
    anonymous: str

    @classmethod
    def of(cls, pid: int) -> Self:
        """The group that a process is in. Raises BenchError if it can't be found."""
        roots = machine_hierarchies()
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                folder = next(root for root in roots if root.name == "memory") / path.lstrip("/")
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control")
                return cls(*(folder / name for name in names), anonymous="total_rss")
            if not controllers and len(roots) == 1:
                folder = roots[0] / path.lstrip("/")
                names = ("memory.max", "memory.current", "memory.events")
                return cls(*(folder / name for name in names), anonymous="anon")
        raise BenchError(f"process {pid} is in no memory control group")

    def kills(self) -> int:
        """How often the kernel has killed a process of the group."""
        return _number(self.events, "oom_kill")

    def exhaust(self) -> float:
        """Draw the limit tight until a process is killed, and put it back.

        Returns:
            When the kill was seen, in seconds since the epoch.

        Raises:
            BenchError: nothing was killed.
        """
        usual, before = self.limit.read_text(), self.kills()
        # With one process killed there must be room for the others, however late that is seen.
        floor = int(FLOOR * _number(self.limit.with_name("memory.stat"), self.anonymous))
        deadline = time.monotonic() + KILL_SECONDS
        try:
            while self.kills() == before:
                if time.monotonic() > deadline:
                    raise BenchError(f"no process of {self.limit.parent} ran out of memory")
                self._tighten(floor)
                time.sleep(LOOK_SECONDS)
            return time.time()
        finally:
            self.limit.write_text(usual.replace("9223372036854771712", "-1"))

    def _tighten(self, floor: int) -> None:
        """A little less than is used now. cgroup v1 refuses what can't be had without a kill."""
        with contextlib.suppress(OSError):
            self.limit.write_text(str(max(floor, int(self.usage.read_text()) - STEP)))


def _number(file: Path, name: str) -> int:
    """One of the counters in a file of a line each."""
    return int(dict(line.split() for line in file.read_text().splitlines())[name])
