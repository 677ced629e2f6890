"""The API server says no, nothing, too late or something old: the end is the undisturbed one's."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from .api import Body
from .crashpoints import End, deviations, end_of, undisturbed
from .endstate import difference
from .faults import (
    EverySecond,
    Expired,
    Gone,
    Hang,
    StaleList,
    cut_watches_every,
    lose_reply,
    lose_request,
    refuse,
    slow,
)
from .lab import Lab, NewLab
from .proxy import Call
from .workflows import APPLY, FOR_GOOD, SUSPEND, WORKER_FAILS, Workflow

pytestmark = pytest.mark.cluster

Expect = Callable[[Workflow], Awaitable[End]]


@pytest.fixture(scope="session")
def ends() -> dict[str, End]:
    """Ends of undisturbed runs, by workflow."""
    return {}


@pytest.fixture
def expect(new_lab: NewLab, ends: dict[str, End]) -> Expect:
    async def found(workflow: Workflow) -> End:
        if workflow.name not in ends:
            ends[workflow.name], _ = await undisturbed(new_lab, workflow)
        return ends[workflow.name]

    return found


async def same_end(lab: Lab, workflow: Workflow, expected: End) -> None:
    found = await end_of(lab, workflow, expected)
    assert deviations(expected, found) == []


REFUSALS = {
    "conflict": refuse(409, "Conflict"),
    "invalid": refuse(422, "Invalid"),
    "too many requests": refuse(429, "TooManyRequests", retry_after=1),
    "internal error": refuse(500, "InternalError"),
    "unavailable": refuse(503, "ServiceUnavailable"),
    "lost reply": lose_reply,
    "lost request": lose_request,
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_every_write_fails_once(new_lab: NewLab, expect: Expect, name: str) -> None:
    expected = await expect(WORKER_FAILS)
    async with new_lab(WORKER_FAILS.script) as lab:
        fault = EverySecond(REFUSALS[name])
        lab.proxy.faults.append(fault)
        lab.operator.start()
        await WORKER_FAILS.run(lab)
        found = await end_of(lab, WORKER_FAILS, expected)
        # That it was refused is news, so Events may be more here.
        assert difference(expected.state, found.state) == []
        assert lab.operator.starts == 1
        assert fault.hits > 10


async def test_slow_answers(new_lab: NewLab, expect: Expect) -> None:
    expected = await expect(APPLY)
    async with new_lab(APPLY.script) as lab:
        lab.proxy.faults.append(slow(0.5))
        lab.operator.start()
        await APPLY.run(lab)
        await same_end(lab, APPLY, expected)


async def test_watches_live_a_second(new_lab: NewLab, expect: Expect) -> None:
    expected = await expect(WORKER_FAILS)
    async with new_lab(WORKER_FAILS.script) as lab, cut_watches_every(lab.proxy, 1.0):
        lab.operator.start()
        await WORKER_FAILS.run(lab)
        await same_end(lab, WORKER_FAILS, expected)
        assert lab.operator.starts == 1


async def test_watches_have_to_list_again(new_lab: NewLab, expect: Expect) -> None:
    """410: the version a watch wants to go on from has been forgotten."""
    expected = await expect(WORKER_FAILS)
    async with new_lab(WORKER_FAILS.script) as lab:
        lab.operator.start()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(WORKER_FAILS.run(lab))
            await lab.until_true(lambda: lab.kubelet.training == 2, "two train")
            expiry = Expired()
            lab.proxy.faults.append(expiry)
            lab.proxy.cut_watches()
            await running
        await same_end(lab, WORKER_FAILS, expected)
        assert expiry.told == {"pods", "pretrainjobs"}


async def test_the_api_server_is_gone_during_a_recovery(new_lab: NewLab, expect: Expect) -> None:
    expected = await expect(WORKER_FAILS)
    async with new_lab(WORKER_FAILS.script) as lab:
        lab.operator.start()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(WORKER_FAILS.run(lab))
            await lab.until_true(lambda: any(w.ending for w in lab.workers), "a worker ends")
            outage = Gone(lab.proxy)
            await lab.until_true(lambda: outage.refused > 20, "the operator tries again and again")
            outage.back.set()
            await running
        await same_end(lab, WORKER_FAILS, expected)
        assert lab.operator.starts == 1


async def test_an_event_that_nobody_brings(new_lab: NewLab, expect: Expect) -> None:
    """The change of the spec is hidden, but every round reads the job itself."""
    expected = await expect(SUSPEND)
    hidden = 0

    def screen(call: Call, event: Body) -> bool:
        nonlocal hidden
        suspended = event["object"].get("spec", {}).get("suspend") is True
        hide = hidden == 0 and event["type"] == "MODIFIED" and suspended
        hidden += hide
        return not hide

    async with new_lab(SUSPEND.script) as lab:
        lab.proxy.screen = screen
        lab.operator.start()
        await SUSPEND.run(lab)
        await same_end(lab, SUSPEND, expected)
    assert hidden == 1


async def test_a_worker_that_fails_unseen(new_lab: NewLab, expect: Expect) -> None:
    """Nobody brings the end of its pod, but it doesn't answer, and then it is looked at."""
    expected = await expect(WORKER_FAILS)
    hidden: set[str] = set()

    def screen(call: Call, event: Body) -> bool:
        meta, status = event["object"].get("metadata", {}), event["object"].get("status", {})
        hide = event["type"] == "MODIFIED" and status.get("phase") == "Failed"
        if hide:
            hidden.add(meta["name"])
        return not hide

    async with new_lab(WORKER_FAILS.script) as lab:
        lab.proxy.screen = screen
        lab.operator.start()
        await WORKER_FAILS.run(lab)
        await same_end(lab, WORKER_FAILS, expected)
        assert lab.operator.starts == 1
    assert hidden == {"job-1-1"}


async def test_a_list_from_the_past(new_lab: NewLab, expect: Expect) -> None:
    """A new operator is shown the pods of long ago first, and what happened since only then."""
    expected = await expect(WORKER_FAILS)
    async with new_lab(WORKER_FAILS.script) as lab:
        stale = StaleList("pods")
        lab.proxy.faults.append(stale)
        lab.operator.start()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(WORKER_FAILS.run(lab))
            await lab.until_true(lambda: len(lab.kubelet.pods_seen) == 3, "a third pod")
            stale.replay = True
            lab.operator.kill()
            await running
        await same_end(lab, WORKER_FAILS, expected)
        assert stale.shown == 1


@pytest.mark.parametrize(("workflow", "ended"), [(APPLY, 2), (FOR_GOOD, 1)])
async def test_asleep_for_the_whole_finish(
    new_lab: NewLab, expect: Expect, workflow: Workflow, ended: int
) -> None:
    expected = await expect(workflow)
    async with new_lab(workflow.script) as lab:
        lab.operator.start()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(workflow.run(lab))
            await lab.until_true(lambda: lab.kubelet.training == 2, "two train")
            lab.operator.end()
            await lab.until_true(lambda: sum(w.over for w in lab.workers) == ended, "it is over")
            lab.operator.start()
            await running
        await same_end(lab, workflow, expected)


async def test_frozen_and_thawed(new_lab: NewLab, expect: Expect) -> None:
    """The operator stands still, with a write under way, while a worker fails."""
    expected = await expect(WORKER_FAILS)
    async with new_lab(WORKER_FAILS.script) as lab:
        told = Hang(lambda call: call.method == "PATCH" and "/pods/" in call.path)
        lab.proxy.faults.append(told)
        lab.operator.start()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(WORKER_FAILS.run(lab))
            await lab.until_true(told.caught.is_set, "the first worker is told")
            lab.operator.freeze()
            told.free.set()
            lab.operator.thaw()
            await lab.until_true(lambda: lab.kubelet.training == 2, "two train")
            lab.operator.freeze()
            await lab.until_true(lambda: any(worker.over for worker in lab.workers), "one failed")
            lab.operator.thaw()
            await running
        await same_end(lab, WORKER_FAILS, expected)
        assert lab.operator.starts == 1


async def test_a_watch_that_falls_silent(new_lab: NewLab, expect: Expect) -> None:
    """Open, but without an event. Lists help the job along; the process calls itself unhealthy."""
    expected = await expect(APPLY)
    async with new_lab(APPLY.script) as lab:
        lab.proxy.screen = lambda call, event: not call.path.endswith("/pods")
        lab.operator.start()
        await APPLY.run(lab)
        found = await end_of(lab, APPLY)
        # A finished job keeps the counts of the moment at which its leader was seen to be done.
        counts = ("status.workers.", "status.replicas")
        lines = deviations(expected, found)
        assert [line for line in lines if not line.startswith(counts)] == []

        async def complains() -> bool:
            return "the watch of pods" in (await lab.operator.complaint() or "")

        await lab.until(complains, "the operator says that it is not healthy")
        assert lab.operator.starts == 1
