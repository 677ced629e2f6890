"""Processes inside pods, found from the machine: the devcluster's nodes share its kernel.

Nothing in a pod is asked or changed for it, so a fault hits exactly what a real one would.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

AGENT = "pretrain_agent"
OPERATOR = "pretrain_operator"
FORK_SERVER = "multiprocessing.forkserver"


@dataclass(frozen=True)
class Found:
    """A process of a pod."""

    pid: int  # as the machine numbers it
    inner: int  # as its own PID namespace does
    parent: int
    state: str  # a letter as in ps(1): T is stopped, Z has ended
    command: str


def of_pod(uid: str) -> list[Found]:
    """Every process of a pod's containers, by the pod's UID; none if it has ended."""
    return [found for found in _all_processes(uid)]


def _all_processes(uid: str) -> Iterator[Found]:
    marks = (uid, uid.replace("-", "_"))  # cgroupfs and systemd spell a group differently
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            groups = (process / "cgroup").read_text()
            if not any(mark in groups for mark in marks):
                continue
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            lines = (process / "status").read_text().splitlines()
        except OSError:
            continue  # it ended while we looked
        status = dict(line.split(":", 1) for line in lines if ":" in line)
        inner, state = status["NSpid"].split()[-1], status["State"].split()[0]
        yield Found(int(process.name), int(inner), int(status["PPid"]), state, command)


def pid_one(processes: list[Found], program: str) -> int:
    """PID 1 of the container that runs a program. Raises LookupError if it doesn't run."""
    for process in processes:
        if process.inner == 1 and program in process.command:
            return process.pid
    raise LookupError(f"no process 1 of {program} among {[p.command for p in processes]}")


def fork_server(processes: list[Found]) -> int:
    """The process that ranks are forked from. Raises LookupError if there is none."""
    servers = [p for p in processes if FORK_SERVER in p.command]
    pids = {p.pid for p in servers}
    first = next((p for p in servers if p.parent not in pids), None)
    if first is None:
        raise LookupError("the pod has no fork server")
    return first.pid


def ranks(processes: list[Found]) -> list[int]:
    """The ranks of a worker that are alive, by process id."""
    try:
        parent = fork_server(processes)
    except LookupError:
        return []
    return sorted(p.pid for p in processes if p.parent == parent and p.state != "Z")
