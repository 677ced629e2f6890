"""Real ranks and workers that hang, freeze or die at bad moments, and others that are only slow."""

import os
import signal
import time
from typing import Any

from pretrain_agent.hang import SILENT_SECONDS
from pretrain_api.wire import HangDeadlines, Phase, Result

IMPATIENT = HangDeadlines(step=2.0)  # seconds, and all other deadlines as usual
SLOW = 6.0  # seconds: far more than a step gets


def test_ranks_that_hang_are_found_and_slow_ones_left_alone(world: Any) -> None:
    slow = {"do": "sleep", "seconds": SLOW, "once": True}
    faults = [
        {"rank": 0, "step": 1, "phase": Phase.STEP, **slow},  # the first one
        {"rank": 1, "step": 20, "phase": Phase.DATA, **slow},
        {"rank": 1, "step": 40, "phase": Phase.SAVE, **slow},
        {"rank": 1, "step": 60, "do": "hang", "once": True},
        # It hangs where the other waits for it, so only who came there first tells them apart.
        {"rank": 0, "step": 60, "phase": Phase.DATA, **slow},
    ]
    world.configure(steps=10**6, save_every=40, faults=faults)
    a, b = (world.start(name).warm() for name in "ab")
    world.assign(1, "a", "b", hang=IMPATIENT)

    # slow in three phases, and no restart; then a rank that sleeps for good
    notes = world.running(1, 1, ranks=2)
    assert world.step() >= 59, world.logs()
    failure = a.status().last_failure
    assert (failure.rank, failure.reason) == (1, "Hung"), failure
    assert "after step 59 (limit 2 s)" in failure.message
    assert failure.message.splitlines()[-1].endswith("in <lambda>")  # toy_trainer.ACTIONS
    folder = f"stacks/generation-{world.base + 1}-round-0"
    assert folder in failure.message
    for rank in range(2):
        kept = world.output / folder / f"rank-{rank}.txt"
        world.until(lambda kept=kept: kept.exists() and kept.read_text(), f"stacks of rank {rank}")
    assert "all_reduce" in (world.output / folder / "rank-0.txt").read_text()
    world.until(lambda: "[rank 1] stacks of rank 1" in b.log(), "the stacks in the log")

    # a process that is stopped has no stacks, and is named before others that wait as long
    began = time.monotonic()
    os.kill(notes[1]["pid"], signal.SIGSTOP)
    world.running(1, 2, ranks=2)
    print(f"SIGSTOP of one rank: all run again after {time.monotonic() - began:.2f} s")
    failure = a.status().last_failure
    assert (failure.rank, failure.reason) == (1, "Hung"), failure
    assert "is stopped (state T)" in failure.message
    assert not world.is_alive(notes[1]["pid"])  # nothing is left that could be continued


def test_ranks_that_always_hang_end_the_world_with_that_reason(world: Any) -> None:
    world.configure(steps=100, faults=[{"rank": 0, "step": 3, "do": "hang"}])
    worker = world.start("a").warm()
    world.assign(1, "a", hang=HangDeadlines(step=1.0, first_step=1.0))
    code, message = worker.wait()
    assert (code, message.result, message.failure.reason) == (1, Result.FAILED, "Hung")
    assert message.restarts_in_place - worker.before.restarts_in_place == 2


def test_who_can_not_run_for_a_while_is_waited_for_and_not_judged(world: Any) -> None:
    world.configure(steps=10**6)
    a, b = (world.start(name).warm() for name in "ab")
    world.assign(1, "a", "b", hang=IMPATIENT)
    world.running(1, 0, ranks=2)

    # a supervisor alone: its ranks train on
    b.process.send_signal(signal.SIGSTOP)
    world.until(lambda: a.status().waiting_for == (1,), "b to be missed")
    assert a.status().waiting_seconds > SILENT_SECONDS
    before = world.step()
    world.until(lambda: world.step() > before, "training without b's supervisor")
    b.process.send_signal(signal.SIGCONT)
    world.until(lambda: not a.status().waiting_for, "b to be heard again")

    # a whole pod, for longer than a step may take: all wait, and nobody is to blame
    frozen = [b.process.pid, *(member.pid for member in b.tree())]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    world.until(lambda: a.status().waiting_for == (1,), "b to be missed again")
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    before = world.step()
    world.until(lambda: world.step() > before, "training to go on")
    assert (a.restarts(), b.restarts()) == (0, 0)

    # the leader: a store there would block its clients, but agents hear of a new generation
    a.process.send_signal(signal.SIGSTOP)
    world.assign(2, "b")
    world.running(2, 0, ranks=1)
    a.process.send_signal(signal.SIGCONT)
    world.assign(3, "a", "b")
    world.running(3, 0, ranks=2)


def test_a_rank_that_dies_while_others_recover_costs_one_more_round(world: Any) -> None:
    world.configure(steps=10**6)
    a, b = (world.start(name).warm() for name in "ab")
    world.assign(1, "a", "b")
    notes = world.running(1, 0, ranks=2)
    os.kill(notes[0]["pid"], signal.SIGKILL)
    (again,) = world.until(
        lambda: [note for note in world.starts(1, 1) if note["rank"] == 1], "rank 1 to start again"
    )
    os.kill(again["pid"], signal.SIGKILL)
    world.running(1, 2, ranks=2)
    assert (a.restarts(), b.restarts()) == (2, 2)
    failure = b.status().last_failure
    assert (failure.rank, failure.signal) == (1, "SIGKILL")
