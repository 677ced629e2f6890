"""Long-running processes that outlive the command which starts them.

Each has a record on disk: its process id together with the kernel's start time of that process, so
that an id which the kernel has given to somebody else is never mistaken for ours and never killed.
There is no supervisor: `up` starts whatever is missing, which is all a development cluster needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain_devcluster.layout import Host, Layout
from pretrain_devcluster.shell import DevclusterError, wait_until

NETNS_FOLDER = Path("/run/netns")


@dataclass(frozen=True)
class Daemon:
    """A process to keep running in the network namespace of `host`."""

    name: str
    host: Host
    argv: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The full command: `nsenter` changes namespace and then becomes the program."""
        return ["nsenter", f"--net={NETNS_FOLDER / self.host.netns}", "--", *self.argv]


def _start_time(pid: int) -> str | None:
    """Kernel start time of a process in ticks; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _record(layout: Layout, name: str) -> Path:
    return layout.run / f"{name}.json"


def log_file(layout: Layout, name: str) -> Path:
    """File that gets the daemon's stdout and stderr."""
    return layout.logs / f"{name}.log"


def running(layout: Layout, name: str) -> int | None:
    """Returns the process id of a daemon that is alive, else None."""
    try:
        record = json.loads(_record(layout, name).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    started = record["start_time"]  # None: it had ended before it could be asked
    return record["pid"] if started is not None and _start_time(record["pid"]) == started else None


def recorded(layout: Layout) -> list[str]:
    """Names of all daemons with a record, alive or not."""
    return sorted(path.stem for path in layout.run.glob("*.json"))


def ensure(layout: Layout, daemon: Daemon) -> bool:
    """Starts the daemon unless it runs with the same command; returns whether it was started."""
    if running(layout, daemon.name) is not None:
        if json.loads(_record(layout, daemon.name).read_text())["command"] == daemon.command:
            return False
        stop(layout, daemon.name)
    layout.run.mkdir(parents=True, exist_ok=True)
    layout.logs.mkdir(parents=True, exist_ok=True)
    with log_file(layout, daemon.name).open("wb") as log:
        process = subprocess.Popen(
            daemon.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
        )
    record = {
        "pid": process.pid,
        "start_time": _start_time(process.pid),
        "command": daemon.command,
    }
    _record(layout, daemon.name).write_text(json.dumps(record))
    return True


def require_alive(layout: Layout, name: str) -> None:
    """Raises DevclusterError with the end of its log when a daemon has died."""
    if running(layout, name) is None:
        tail = log_file(layout, name).read_text(errors="replace").splitlines()[-5:]
        raise DevclusterError(f"{name} ended unexpectedly; its log ends with: {' | '.join(tail)}")


def stop(layout: Layout, name: str, sharply: bool = False) -> None:
    """Ends a daemon and forgets it; `sharply` gives it no chance to say good-bye."""
    pid = running(layout, name)
    if pid is not None:
        _signal(pid, signal.SIGKILL if sharply else signal.SIGTERM)
        try:
            wait_until(lambda: running(layout, name) is None, f"{name} ends", 5, poll=0.02)
        except DevclusterError:
            _signal(pid, signal.SIGKILL)
            wait_until(lambda: running(layout, name) is None, f"{name} is killed", 5, poll=0.02)
    _reap(pid)
    _record(layout, name).unlink(missing_ok=True)


def members(netns: str) -> Iterator[int]:
    """Yields the ids of all processes whose network namespace is the named one."""
    try:
        wanted = os.stat(NETNS_FOLDER / netns).st_ino
    except FileNotFoundError:
        return
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.stat(entry / "ns" / "net").st_ino == wanted:
                yield int(entry.name)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        except PermissionError:
            continue  # hidden even from root, so it is none that we started


def kill_members(netns: str, spared: Collection[int | None] = ()) -> None:
    """Kills whatever runs in a namespace, except those spared, and waits until it is gone."""

    def emptied() -> bool:
        left = [pid for pid in members(netns) if pid not in spared]
        for pid in left:
            _signal(pid, signal.SIGKILL)
        return not left

    wait_until(emptied, f"no process is left in {netns}", 15, poll=0.05)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself, which is what we want
        os.kill(pid, number)


def _reap(pid: int | None) -> None:
    """Collects the exit status where the daemon is a child of this very process."""
    if pid is None:
        return
    with contextlib.suppress(ChildProcessError):  # started by an earlier command
        os.waitpid(pid, os.WNOHANG)
