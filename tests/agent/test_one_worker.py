"""One real supervisor with two real ranks: what a worker does about failures of its own."""

import os
import signal
import time
import urllib.request
from typing import Any

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
    status = worker.status()
    assert (status.round, status.restarts_in_place) == (1, 1)
    assert (status.last_failure.signal, status.last_failure.rank) == ("SIGKILL", 1)
    assert status.phase is Phase.STEP
    assert status.progress.step > 0

    # a rank that died beside one that is stopped
    os.kill(notes[1]["pid"], signal.SIGSTOP)
    os.kill(notes[0]["pid"], signal.SIGKILL)
    killed = time.monotonic()
    notes = world.running(1, 2, ranks=2)
    assert max(note["time"] for note in notes) - killed < TORCH_WAITS

    # the fork server, and with it its children: the next one has to import everything again
    os.kill(worker.fork_server(notes[0]["pid"]), signal.SIGKILL)
    world.running(1, 3, ranks=2)
    assert worker.status().last_failure.reason == "Launcher"

    url = f"http://127.0.0.1:{worker.http_port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        metrics = answer.read().decode()
    assert "pretrain_restarts_in_place_total 3.0" in metrics
    assert "pretrain_restart_seconds " in metrics
    assert "pretrain_loss " in metrics

    worker.process.send_signal(signal.SIGTERM)
    code, message = worker.wait()
    assert (code, message.result) == (ExitCode.PREEMPTED, Result.PREEMPTED)
    assert message.failure is None
    assert message.restarts_in_place == 3
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
    assert message.restarts_in_place == 5  # three that helped, and two that did not
    assert message.progress.step == 8
    assert "[rank 1] toy starts at step 8" in worker.log()
    assert "ValueError: the toy is broken" in worker.log()
    assert "returned without its completion marker" in worker.log()
    assert "exit code 0 before the training was done" in worker.log()


def test_returning_without_the_completion_marker_is_a_failure(world: Any) -> None:
    world.configure(steps=2, forget_marker=True)
    worker = world.start("a")
    world.assign(1, "a")
    code, message = worker.wait()
    assert (code, message.result) == (1, Result.FAILED)
    assert "completion marker" in message.failure.message


def test_a_killed_launcher_takes_everything_with_it_and_is_reported(world: Any) -> None:
    world.configure(steps=10**6)
    worker = world.start("a", processes=2)
    world.assign(1, "a")
    world.running(1, 0, ranks=2)
    os.kill(worker.launcher(), signal.SIGKILL)
    code, message = worker.wait()
    assert (code, message.result) == (1, Result.FAILED)
    assert (message.failure.reason, message.failure.signal) == ("Launcher", "SIGKILL")
    assert not worker.leftovers()


def test_a_killed_supervisor_leaves_no_orphans_and_a_slow_save_ends_with_the_grace_period(
    world: Any,
) -> None:
    world.configure(steps=10**6, save_seconds=3600)
    killed, slow = world.start("killed"), world.start("slow", grace=2)
    world.assign(1, "killed")
    world.running(1, 0, ranks=1)
    killed.process.kill()
    killed.process.wait()
    world.until(lambda: not killed.leftovers(), "the tree of a killed supervisor to die", 10)

    world.assign(2, "slow")
    world.running(2, 0, ranks=1)
    slow.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code, message = slow.wait()
    assert 1 < time.monotonic() - began < TORCH_WAITS
    assert (code, message.result) == (ExitCode.PREEMPTED, Result.PREEMPTED)
    assert "grace period" in message.failure.message
    assert not slow.leftovers()
