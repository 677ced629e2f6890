"""One real supervisor with two real ranks: what a worker does about failures of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pretrain_agent.board import Board
from pretrain_api import names
from pretrain_api.wire import ExitCode, Phase, Result

TORCH_WAITS = 25  # seconds; left alone, torch takes 30 to give up on a rank that does not react


def test_dead_ranks_restart_in_place_and_sigterm_drains(world: Any) -> None:
    world.configure(steps=10**6, save_seconds=0.5)
    worker = world.start("a", processes=2)
    world.write("a", '{"generation": 1, "rank": 0, "si')  # half a file is no assignment
    assert worker.warm().status().phase is Phase.WAITING
    world.assign(1, "a")
    notes = world.running(1, 0, ranks=2)

    # a killed rank
    killed = time.monotonic()
    os.kill(notes[1]["pid"], signal.SIGKILL)
    notes = world.running(1, 1, ranks=2)
    print(f"kill -9 of one rank: all run again after {notes[-1]['time'] - killed:.2f} s")
    status = worker.stepping()
    assert (status.round, worker.restarts()) == (1, 1)
    assert (status.last_failure.signal, status.last_failure.rank) == ("SIGKILL", 1)
    assert status.progress.step > 0

    # a rank that died beside one that is stopped, for which torch would wait half a minute
    os.kill(notes[1]["pid"], signal.SIGSTOP)
    os.kill(notes[0]["pid"], signal.SIGKILL)
    killed = time.monotonic()
    notes = world.running(1, 2, ranks=2)
    assert max(note["time"] for note in notes) - killed < TORCH_WAITS

    # the fork server, and with it its children: the next one has to import everything again
    os.kill(worker.fork_server(notes[0]["pid"]), signal.SIGKILL)
    world.running(1, 3, ranks=2)
    assert worker.status().last_failure.reason == "Launcher"

    # a crash below Python
    notes = world.starts(1, 3)
    os.kill(notes[0]["pid"], signal.SIGABRT)
    world.running(1, 4, ranks=2)
    failure = worker.status().last_failure
    assert (failure.signal, failure.exit_code, failure.reason) == ("SIGABRT", 134, "RankFailed")

    metrics = worker.answer("/metrics").decode()
    restarts = worker.before.restarts_in_place + 4
    assert f"pretrain_restarts_in_place_total {restarts}.0" in metrics
    assert "pretrain_restart_seconds " in metrics
    assert "pretrain_loss " in metrics

    worker.process.send_signal(signal.SIGTERM)
    code, message = worker.wait()
    assert (code, message.result) == (ExitCode.PREEMPTED, Result.PREEMPTED)
    assert message.failure is None
    assert message.restarts_in_place == restarts
    assert message.progress.step == world.step()
    assert not worker.leftovers()


def test_a_rank_that_never_gets_further_ends_the_worker_with_its_exit_code(world: Any) -> None:
    faults = [
        {"rank": 0, "step": 3, "do": "raise", "once": True},
        {"rank": 1, "step": 5, "do": "exit 0", "once": True},
        {"rank": 0, "step": 7, "do": "vanish", "once": True},
        {"rank": 1, "step": 9, "do": "exit 7"},
    ]
    world.configure(steps=100, faults=faults)
    worker = world.start("a", processes=2)
    world.assign(1, "a")
    code, message = worker.wait()
    assert (code, message.result, message.exit_code) == (7, Result.FAILED, 7)
    assert (message.failure.rank, message.failure.exit_code) == (1, 7)
    restarts = message.restarts_in_place - worker.before.restarts_in_place
    assert restarts == 5  # three that helped, and two that did not
    assert message.progress.step == 8
    assert "[rank 1] toy starts at step 8" in worker.log()
    assert "ValueError: the toy is broken" in worker.log()
    assert "returned without its completion marker" in worker.log()
    assert "exit code 0 before the training was done" in worker.log()


def test_a_killed_launcher_leaves_no_orphans_and_is_reported(world: Any) -> None:
    world.configure(steps=10**6)
    worker = world.start("a")
    world.assign(1, "a")
    world.running(1, 0, ranks=1)
    os.kill(worker.launcher(), signal.SIGKILL)
    code, message = worker.wait()
    assert (code, message.result) == (1, Result.FAILED)
    assert (message.failure.reason, message.failure.signal) == ("Launcher", "SIGKILL")
    assert not worker.leftovers()


def test_a_slow_save_ends_with_the_grace_period(world: Any) -> None:
    world.configure(steps=10**6, save_seconds=3600)
    slow = world.start("slow", grace=2)
    world.assign(1, "slow")
    world.running(1, 0, ranks=1)
    slow.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code, message = slow.wait()
    assert 1 < time.monotonic() - began < TORCH_WAITS
    assert (code, message.result) == (ExitCode.PREEMPTED, Result.PREEMPTED)
    assert "grace period" in message.failure.message
    assert not slow.leftovers()


def test_sigterm_before_the_launcher_is_warm_ends_the_worker_as_asked(world: Any) -> None:
    """Alone, the launcher would just die of it: its handlers come with the first ranks."""
    worker = world.start("early", grace=60)
    assert not worker.status().warm
    worker.tree()
    worker.process.send_signal(signal.SIGTERM)
    code, message = worker.wait()
    assert (code, message.result) == (ExitCode.PREEMPTED, Result.PREEMPTED)
    assert not worker.leftovers()


def test_sigterm_while_the_agent_itself_starts_is_not_lost(world: Any) -> None:
    """As the first process of a container it would ignore what it has no handler for yet."""
    worker = world.start("earlier", grace=60)
    world.until(lambda: is_blocked(worker.process.pid, signal.SIGTERM), "signals to be kept")
    worker.process.send_signal(signal.SIGTERM)
    code, message = worker.wait()
    assert (code, message.result) == (ExitCode.PREEMPTED, Result.PREEMPTED)


def is_blocked(pid: int, number: signal.Signals) -> bool:
    """Whether a process has blocked a signal, and so takes it later."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = re.findall(r"^SigBlk:\s+(\w+)$", status, re.M)
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_taken_port_is_named(world: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        worker = world.start("late", **{names.ENV_MEETING_PORT: str(port)})
        code, message = worker.wait()
    assert (code, message.result) == (1, Result.FAILED)
    assert f"port {port} is taken" in message.failure.message


MARKERLESS = """
import sys
from multiprocessing import Process
from pretrain_agent import rank
def main(config): ...
if __name__ == "__main__":
    sys.path.insert(0, {folder!r})
    process = Process(target=rank.run, args=("markerless:main", "", {{}}))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def test_returning_without_the_completion_marker_is_a_failure(world: Any, tmp_path: Path) -> None:
    """An exit barrier reports success whatever happened before it."""
    board = Board.create(tmp_path / "board", 1)
    os.mkfifo(tmp_path / "rank-0")
    script = tmp_path / "markerless.py"
    script.write_text(MARKERLESS.format(folder=str(tmp_path)))
    own = {names.ENV_BOARD: str(tmp_path / "board"), "LOCAL_RANK": "0", "RANK": "0"}
    reader = os.open(tmp_path / "rank-0", os.O_RDONLY | os.O_NONBLOCK)
    ran = subprocess.run([sys.executable, str(script)], env=world.environment(**own), timeout=120)
    os.close(reader)
    assert ran.returncode == 1
    assert "completion marker" in board.failures()[0].message
