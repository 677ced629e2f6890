"""Two operators of one release: one at a time writes, whatever happens to the other."""

import asyncio

import pytest

from .crashpoints import deviations, end_of, undisturbed
from .faults import Hang
from .lab import Lab, NewLab
from .operators import Operator
from .proxy import Call
from .workflows import WORKER_FAILS
from .world import Wait

pytestmark = pytest.mark.cluster

SCRIPT = {10: Wait(), **WORKER_FAILS.script}  # training waits before the worker fails


async def both_watch(lab: Lab, other: Operator) -> None:
    """Until the second operator has looked at the Lease and found that it isn't its own."""

    async def standing_by() -> bool:
        return any(call.is_lease for call in other.proxy.calls) and await other.ready()

    await lab.until(standing_by, "a second operator stands by")


def decides_to_restart(call: Call) -> bool:
    return call.is_write and call.path.endswith("/status") and '"Restarting"' in str(call.body)


async def test_a_frozen_leader_writes_nothing_when_it_is_thawed(new_lab: NewLab) -> None:
    """It is frozen with a decision just written, and pods to create in its hands."""
    expected, _ = await undisturbed(new_lab, WORKER_FAILS)
    async with new_lab(SCRIPT) as lab, lab.another("b") as other:
        lab.operator.start()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(WORKER_FAILS.run(lab))
            await lab.until_standing()
            other.start()
            await both_watch(lab, other)
            assert other.proxy.writes == []

            deciding = Hang(decides_to_restart)
            lab.proxy.faults.append(deciding)
            lab.kubelet.go_on()
            await lab.until_true(deciding.caught.is_set, "a failure has been seen")
            lab.operator.freeze()
            deciding.free.set()  # the answer waits in the socket, and with it something to do
            before = len(lab.proxy.writes)
            await lab.until_true(lambda: bool(other.proxy.writes), "the other takes over")
            asked = len(lab.proxy.calls)
            lab.operator.thaw()
            await lab.until_true(
                lambda: any(call.is_lease for call in lab.proxy.calls[asked:]), "it looks around"
            )
            await running
        found = await end_of(lab, WORKER_FAILS, expected, other)
        assert deviations(expected, found) == []
        assert [str(call) for call in lab.proxy.calls[asked:] if call.is_write] == []
        assert len(lab.proxy.writes) == before
        assert (lab.operator.starts, other.starts) == (1, 1)


@pytest.mark.parametrize("overlap", [False, True], ids=["one after the other", "side by side"])
async def test_an_upgrade_in_the_middle(new_lab: NewLab, overlap: bool) -> None:
    """A new process takes the place of the old one, and nothing starts again."""
    expected, _ = await undisturbed(new_lab, WORKER_FAILS)
    async with new_lab(SCRIPT) as lab, lab.another("b") as new:
        lab.operator.start()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(WORKER_FAILS.run(lab))
            await lab.until_standing()
            if overlap:
                new.start()
                await both_watch(lab, new)
            await lab.operator.stop()
            if not overlap:
                new.start()
            writes = len(lab.proxy.writes)
            lab.kubelet.go_on()
            await running
        found = await end_of(lab, WORKER_FAILS, expected, new)
        assert deviations(expected, found) == []
        assert len(lab.proxy.writes) == writes
        assert new.proxy.writes


async def test_both_start_at_once(new_lab: NewLab) -> None:
    expected, _ = await undisturbed(new_lab, WORKER_FAILS)
    async with new_lab(WORKER_FAILS.script) as lab, lab.another("b") as other:
        lab.operator.start()
        other.start()
        await WORKER_FAILS.run(lab)
        leader = lab.operator if lab.proxy.writes else other
        found = await end_of(lab, WORKER_FAILS, expected, leader)
        assert deviations(expected, found) == []
        assert not (lab.proxy.writes and other.proxy.writes)
