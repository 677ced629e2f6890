"""Real ranks that hang, and real ranks that are only slow."""

import os
import signal
import time
from typing import Any

from pretrain_api.wire import HangDeadlines, Phase

IMPATIENT = HangDeadlines(step=1.0)  # seconds, and all other deadlines as usual
SLOW = 4.0  # seconds: far more than a step gets


def test_ranks_that_hang_are_found_and_slow_ones_left_alone(world: Any) -> None:
    slow = {"do": "sleep", "seconds": SLOW, "once": True}
    faults = [
        {"rank": 0, "step": 1, "phase": Phase.STEP, **slow},  # the first one
        {"rank": 1, "step": 20, "phase": Phase.DATA, **slow},
        {"rank": 1, "step": 40, "phase": Phase.SAVE, **slow},
        {"rank": 1, "step": 60, "do": "hang", "once": True},
    ]
    world.configure(steps=10**6, save_every=40, faults=faults)
    a, b = (world.start(name).warm() for name in "ab")
    world.assign(1, "a", "b", hang=IMPATIENT)

    # slow in three phases, and no restart; then a rank that sleeps for good
    notes = world.running(1, 1, ranks=2)
    assert world.step() >= 59, world.logs()
    failure = a.status().last_failure
    assert (failure.rank, failure.reason) == (1, "Hung"), failure
    assert "after step 59 (limit 1 s)" in failure.message
    assert failure.message.splitlines()[-1].endswith("in <lambda>")  # toy_trainer.ACTIONS
    folder = "stacks/generation-1-round-0"
    assert folder in failure.message
    world.until((world.output / folder / "rank-0.txt").exists, "the stacks of rank 0")
    world.until((world.output / folder / "rank-1.txt").exists, "the stacks of rank 1")
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
