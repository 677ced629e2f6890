"""Real supervisors with toy ranks on the loopback: start, assign, watch and end them.

A cold start takes most of a test's time, so supervisors that a test leaves alive serve the next one
too, warm, in generations of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pretrain_agent import process, settings
from pretrain_api import names
from pretrain_api.wire import (
    Assignment,
    Failure,
    HangDeadlines,
    Order,
    Phase,
    TerminationMessage,
    WorkerStatus,
)
from pretrain_devcluster.controlplane import free_port

DEADLINE = 150.0  # a cold start takes 6 seconds alone and many times that on a busy machine
POLL = 0.02
GRACE = 30.0  # seconds
HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, deadline: float = DEADLINE) -> T:
    """Poll until ``condition`` is true, and return what it returned."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {deadline} s for {what}"
        time.sleep(POLL)
    return value


def environment(**extra: str) -> dict[str, str]:
    """Environment in which child processes find our packages and the toy, with one thread each."""
    folders = [REPOSITORY / "api", REPOSITORY / "trainer", HERE]
    path = os.pathsep.join(map(str, folders))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


@dataclass
class Worker:
    """One supervisor process and the files around it."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    http_port: int
    meeting_port: int
    processes: int
    reusable: bool
    first_byte: int = 0  # of its log that is this test's
    before: WorkerStatus = field(default_factory=WorkerStatus)  # when this test took it over
    known: set[int] = field(default_factory=set)  # pids of everything ever seen below it
    boards: set[Path | None] = field(default_factory=set)  # what a killed supervisor leaves behind

    def status(self) -> WorkerStatus:
        """How it says it is."""
        return WorkerStatus.model_validate_json(self.answer("/status"))

    def answer(self, path: str) -> bytes:
        """What it answers, as soon as it does: on a busy machine that may take several attempts."""
        url = f"http://127.0.0.1:{self.http_port}{path}"

        def ask() -> bytes | None:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return answer.read()
            except OSError:
                return None

        return until(ask, f"{self.name} to answer {path}\n{self.log()}")

    def tree(self) -> list[process.Process]:
        found = process.descendants(self.process.pid)
        self.known.update(member.pid for member in found)
        self.boards.update(board_folder(member.pid) for member in found)
        return found

    def launcher(self) -> int:
        """Pid of the launcher, this process's only child."""
        (pid,) = [m.pid for m in self.tree() if m.parent == self.process.pid]
        return pid

    def fork_server(self, rank_pid: int) -> int:
        """Pid of the process that forked a rank."""
        (pid,) = [m.parent for m in self.tree() if m.pid == rank_pid]
        return pid

    def warm(self) -> "Worker":
        """Wait until the launcher is ready to start ranks."""
        until(lambda: self.status().warm, f"{self.name} to be warm\n{self.log()}")
        return self

    def stepping(self) -> WorkerStatus:
        """Its status once its ranks are beyond the first step of their round."""

        def stepping() -> WorkerStatus | None:
            said = self.status()
            return said if said.phase is Phase.STEP else None

        return until(stepping, f"{self.name} to be beyond a first step\n{self.log()}")

    def wait(self) -> tuple[int, TerminationMessage]:
        """Exit code and termination message, once it has ended."""
        code = self.process.wait(DEADLINE)
        text = (self.folder / "termination").read_bytes()
        assert len(text) <= 4096
        return code, TerminationMessage.model_validate_json(text)

    def log(self) -> str:
        """What it and its ranks have written in this test."""
        return (self.folder / "log").read_bytes()[self.first_byte :].decode(errors="replace")

    def restarts(self) -> int:
        """In place, in this test."""
        return self.status().restarts_in_place - self.before.restarts_in_place

    def news(self) -> Failure | None:
        """The failure heard of in this test, if there was one."""
        failure = self.status().last_failure
        return None if failure == self.before.last_failure else failure

    def end(self) -> None:
        """Kill it, if it still lives, and note everything below it first."""
        self.tree()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def bury(self) -> None:
        """Complain about what outlived it, and clean up after it."""
        try:
            until(lambda: not self.leftovers(), "the processes below a dead supervisor to die", 10)
        finally:
            for folder in self.boards - {None}:
                shutil.rmtree(folder, ignore_errors=True)
            for pid in self.leftovers():
                os.kill(pid, signal.SIGKILL)

    def leftovers(self) -> set[int]:
        """Pids once seen below this worker that are still alive."""
        return {pid for pid in self.known if alive(pid)}


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def board_folder(pid: int) -> Path | None:
    """Where the board of a process's supervisor is, if it has one."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    prefix = f"{names.ENV_BOARD}=".encode()
    return next(
        (Path(os.fsdecode(v[len(prefix) :])).parent for v in variables if v.startswith(prefix)),
        None,
    )


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class Fleet:
    """All supervisors of a test run, and how far generations have got."""

    def __init__(self, folder: Path, memory: Path) -> None:
        self.folder = folder
        self.memory = memory  # where worlds keep their state
        self.output = folder / "output"  # the volume of all
        self.idle: list[Worker] = []
        self.generation = 0
        self.started = 0

    def take(self, name: str, processes: int, config: str) -> Worker | None:
        """A warm supervisor that another test has left, if there is one."""
        fitting = [worker for worker in self.idle if worker.processes == processes]
        if not fitting:
            return None
        worker = fitting[0]
        self.idle.remove(worker)
        worker.name = name
        worker.before = worker.status()
        worker.first_byte = (worker.folder / "log").stat().st_size
        (worker.folder / "run.json").write_text(config)
        return worker

    def start(self, name: str, processes: int, grace: float, config: str, **extra: str) -> Worker:
        self.started += 1
        folder = self.folder / f"worker-{self.started}"
        folder.mkdir()
        (folder / "run.json").write_text(config)
        http_port, meeting_port = free_port(), free_port()
        own = {
            names.ENV_CONFIG: str(folder / "run.json"),
            names.ENV_ASSIGNMENT: str(folder / "assignment"),
            names.ENV_PROCESSES: str(processes),
            names.ENV_HTTP_PORT: str(http_port),
            names.ENV_MEETING_PORT: str(meeting_port),
            names.ENV_TERMINATION_LOG: str(folder / "termination"),
            names.ENV_GRACE_SECONDS: str(grace),
            names.ENV_HOST: "127.0.0.1",
            settings.ENV_ENTRY_POINT: "toy_trainer:main",
            **extra,
        }
        with (folder / "log").open("wb") as log:
            started = subprocess.Popen(
                [sys.executable, "-m", "pretrain_agent"],
                env=environment(**own),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        reusable = grace == GRACE and not extra
        return Worker(name, folder, started, http_port, meeting_port, processes, reusable)

    def give_back(self, workers: Iterable[Worker]) -> None:
        """Keep what can serve another test, with its ranks stopped, and end the others."""
        self.generation += 1
        parked = Assignment(generation=self.generation, size=1, leader="127.0.0.1:1", nonce="")
        ended: list[Worker] = []
        for worker in workers:
            worker.tree()
            if worker.reusable and worker.process.poll() is None:
                replace(worker.folder / "assignment", parked.to_json())
                self.idle.append(worker)
            else:
                worker.end()
                ended.append(worker)
        for worker in ended:
            worker.bury()

    def close(self) -> None:
        for worker in self.idle:
            worker.end()
        for worker in self.idle:
            worker.bury()


def replace(path: Path, text: str) -> None:
    """Replace an assignment file at once, as the kubelet does."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(path)


class World:
    """Workers of one job that share a toy state folder. Its generations count from 1."""

    def __init__(self, state: Path, fleet: Fleet) -> None:
        self.fleet = fleet
        self.base = fleet.generation  # the newest generation of earlier tests
        self.output = fleet.output
        self.state = state
        self.workers: dict[str, Worker] = {}
        self.configure(steps=10)

    def configure(self, **config: Any) -> None:
        """Write the toy's config; see toy_trainer."""
        job = {"dump_folder": str(self.output)}
        self.config = json.dumps({"state": str(self.state), "job": job, **config})
        for worker in self.workers.values():
            (worker.folder / "run.json").write_text(self.config)

    def start(self, name: str, processes: int = 1, grace: float = GRACE, **extra: str) -> Worker:
        """A supervisor that waits for an assignment; a new one is not warm yet."""
        usual = grace == GRACE and not extra
        worker = self.fleet.take(name, processes, self.config) if usual else None
        worker = worker or self.fleet.start(name, processes, grace, self.config, **extra)
        self.workers[name] = worker
        return worker

    def assign(
        self,
        generation: int,
        *members: str,
        parked: tuple[str, ...] = (),
        hang: HangDeadlines | None = None,
    ) -> None:
        """Give the members ranks in this order, the first being the leader."""
        leader = f"127.0.0.1:{self.workers[members[0]].meeting_port}"
        size, nonce = len(members), f"secret {generation}"
        number = self.base + generation
        self.fleet.generation = max(self.fleet.generation, number)
        for name in (*members, *parked):
            rank = members.index(name) if name in members else None
            self.write(
                name,
                Assignment(
                    generation=number, rank=rank, size=size, leader=leader, nonce=nonce, hang=hang
                ).to_json(),
            )

    def order(self, name: str, order: Order) -> None:
        """Add an order to the assignment that a worker has."""
        text = (self.workers[name].folder / "assignment").read_text()
        assignment = Assignment.model_validate_json(text)
        self.write(name, assignment.model_copy(update={"orders": order}).to_json())

    def write(self, name: str, text: str) -> None:
        """Put this into a worker's assignment file."""
        replace(self.workers[name].folder / "assignment", text)

    def starts(self, generation: int, number: int) -> list[dict[str, Any]]:
        """What ranks noted at their start in one round."""
        try:
            lines = (self.state / "starts").read_text().splitlines()
        except OSError:
            return []
        notes = [json.loads(line) for line in lines]
        wanted = (self.base + generation, number)
        return [note for note in notes if (note["generation"], note["round"]) == wanted]

    def step(self) -> int:
        """Steps done by the toy, all together."""
        try:
            return int((self.state / "step").read_text())
        except OSError:
            return 0

    def running(self, generation: int, number: int, ranks: int) -> list[dict[str, Any]]:
        """Wait until all ranks of a round have started and trained a step; returns their notes."""
        notes = until(
            lambda: len(found := self.starts(generation, number)) >= ranks and found,
            f"{ranks} ranks in round {number} of generation {generation}\n{self.logs()}",
        )
        before = self.step()
        until(lambda: self.step() > before, f"a step in round {number}\n{self.logs()}")
        for worker in self.workers.values():
            worker.tree()
        return sorted(notes, key=lambda note: note["rank"])

    until = staticmethod(until)
    is_alive = staticmethod(alive)
    environment = staticmethod(environment)

    def logs(self) -> str:
        return "\n".join(f"--- {name}\n{worker.log()}" for name, worker in self.workers.items())


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    # In memory: a step that waits for a busy disk is a rank that hangs. Ranks that are about to be
    # stopped still write after their test.
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pretrain-toy-") as memory:
        created = Fleet(tmp_path_factory.mktemp("fleet"), Path(memory))
        try:
            yield created
        finally:
            created.close()


@pytest.fixture
def world(fleet: Fleet) -> Iterator[World]:
    created = World(Path(tempfile.mkdtemp(dir=fleet.memory)), fleet)
    try:
        yield created
    finally:
        fleet.give_back(created.workers.values())
