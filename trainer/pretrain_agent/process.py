"""Processes of this pod: adopt orphans, reap the dead, and leave nobody behind.

Ranks start helpers of their own (data workers, compilers) and may put them into sessions of their
own, so neither a process group nor a session is enough to find them. Instead the supervisor adopts
every orphan below it, as PID 1 does anyway, and so all of them stay its descendants until the end.
"""

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KILL_INTERVAL = 0.005  # seconds between two looks at who is left
TRACKER_SECONDS = 2.0


class Process(NamedTuple):
    """One line of the process table."""

    pid: int
    parent: int
    session: int
    state: str  # a letter as in ps(1); Z is a zombie


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def adopt_orphans() -> None:
    """Make orphaned descendants children of this process, as they are of PID 1."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def process_table() -> Iterator[Process]:
    """Every process visible in this PID namespace."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (found := look_up(int(entry.name))) is not None:
            yield found


def look_up(pid: int) -> Process | None:
    """One process, or None when there is none with this id."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, parent, _, session = stat.rpartition(")")[2].split()[:4]
    return Process(pid, int(parent), int(session), state)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, so that sending it does not end the process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def descendants(root: int) -> list[Process]:
    """All living processes below ``root``, in no particular order."""
    children: dict[int, list[Process]] = {}
    for process in process_table():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    front = list(children.get(root, ()))
    while front:
        process = front.pop()
        front.extend(children.get(process.pid, ()))
        if process.state != "Z":
            found.append(process)
    return found


def kill(pid: int) -> None:
    """Send SIGKILL; a process that is already gone is fine."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def kill_orphans(session: int, spare: int) -> None:
    """Kill what dead ranks left behind: children of ours in ``session``, but not ``spare``.

    Processes in other sessions are left alone: someone may be debugging in this container.
    """
    for process in process_table():
        if process.parent == os.getpid() and process.session == session and process.pid != spare:
            kill(process.pid)


def kill_descendants(timeout: float) -> list[Process]:
    """Kill and reap everything below this process; returns what outlived ``timeout`` seconds.

    The look is repeated until nobody is left, because a process may fork while it is being killed.
    Python's resource trackers get a moment of their own: they end once those they serve are gone,
    and remove the semaphores that these left in shared memory.
    """
    now = time.monotonic()
    patience, deadline = now + TRACKER_SECONDS, now + timeout
    while living := descendants(os.getpid()):
        now = time.monotonic()
        for process in living:
            if now > patience or not _is_resource_tracker(process.pid):
                kill(process.pid)
        reap()
        if now > deadline:
            return living
        time.sleep(KILL_INTERVAL)
    reap()
    return []


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def reap() -> dict[int, int]:
    """Collect all dead children: exit code by pid, negative for a signal, as in subprocess."""
    dead: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return dead
        if pid == 0:
            return dead
        dead[pid] = os.waitstatus_to_exitcode(status)
