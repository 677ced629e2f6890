"""Several real supervisors with real ranks: meeting, and changes of membership."""

import time
from typing import Any

from pretrain_api.wire import ExitCode, Order, Result


def test_two_workers_restart_together_and_leave_with_the_code_of_the_rank_at_fault(
    world: Any,
) -> None:
    """Leaving for good keeps the exit code, which torch's ways of closing a rendezvous do not."""
    faults = [
        {"rank": 1, "step": 4, "do": "kill", "once": True},
        {"rank": 1, "step": 8, "do": "config"},
    ]
    world.configure(steps=100, faults=faults)
    workers = [world.start(name).warm() for name in "ab"]
    world.assign(1, "a", "b")
    for worker in workers:
        code, message = worker.wait()
        assert (code, message.result) == (ExitCode.CONFIG, Result.CONFIG)
        assert (message.failure.rank, message.failure.reason) == (1, "Config")
        assert message.failure.message.endswith("the toy does not like its configuration")
        assert message.restarts_in_place - worker.before.restarts_in_place == 1
    assert [note["world"] for note in world.starts(1, 1)] == [2, 2]


def test_workers_come_and_go_with_generations(world: Any) -> None:
    world.configure(steps=10**6)
    a, b, c = (world.start(name).warm() for name in "abc")
    world.assign(1, "a", "b", parked=("c",))
    world.running(1, 0, ranks=2)

    # the leader dies with its whole pod; a warm spare takes its place under another leader
    a.end()
    began = time.monotonic()
    world.assign(2, "b", "c")
    notes = world.running(2, 0, ranks=2)
    print(f"new generation: all run after {notes[-1]['time'] - began:.2f} s")
    assert b.status().generation == world.base + 2
    world.until(lambda: not a.leftovers(), "what was below the killed supervisor to die", 10)

    # 2 -> 1: the leaver is parked; an older generation changes nothing
    world.assign(3, "c", parked=("b",))
    (note,) = world.running(3, 0, ranks=1)
    assert note["world"] == 1
    world.until(lambda: b.status().generation == world.base + 3, "b to be parked")
    world.assign(1, "b")
    past = f"ignored generation {world.base + 1}, seen {world.base + 3}"
    world.until(lambda: past in b.log(), "b to ignore the past")
    assert (b.status().generation, b.status().rank) == (world.base + 3, None)

    # 1 -> 2, with another leader
    world.assign(4, "b", "c")
    notes = world.running(4, 0, ranks=2)
    assert [note["world"] for note in notes] == [2, 2]

    # a pause, told to one before the other: both save at the same step and stay for the next world
    world.order("b", Order.PAUSE)
    world.until(lambda: b.status().paused, "b to be paused")
    world.order("c", Order.PAUSE)
    world.until(lambda: c.status().paused, "c to be paused")
    step = world.step()
    assert (b.news(), c.news()) == (None, None)
    pids = {note["pid"] for note in notes}
    assert not pids & {member.pid for member in (*b.tree(), *c.tree())}
    world.assign(5, "c", "b")
    notes = world.running(5, 0, ranks=2)
    assert [note["world"] for note in notes] == [2, 2]
    assert world.step() > step
    world.assign(6, "b", "c")
    notes = world.running(6, 0, ranks=2)

    # drained by an order to one of them: ranks agree, all save at the same step
    world.order("b", Order.DRAIN)
    code, message = b.wait()
    assert (code, message.result) == (ExitCode.PREEMPTED, Result.PREEMPTED)
    assert message.progress.step == world.step()
    # the other one saved as well, and waits for what the operator makes of it
    (pid,) = [note["pid"] for note in notes if note["rank"] == 1]
    world.until(lambda: pid not in {member.pid for member in c.tree()}, "c's rank to leave")
    assert c.process.poll() is None
    assert c.news() is None

    world.configure(steps=world.step() + 5)
    world.assign(7, "c")
    code, message = c.wait()
    assert (code, message.result) == (ExitCode.OK, Result.COMPLETE)
    assert message.progress.step == world.step()
    for worker in (b, c):
        assert not worker.leftovers()
