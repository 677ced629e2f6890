"""The Lease: never two that hold it, whatever is frozen, lost or late, and no write without it."""

import asyncio
import math
import os
from collections.abc import Coroutine, Generator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pretrain_api.status import JobStatus
from pretrain_operator import lease
from pretrain_operator.cluster import CONNECT_SECONDS, Body, ClusterError, Kind
from pretrain_operator.lease import (
    DURATION_SECONDS,
    SURE_SECONDS,
    GuardedCluster,
    Keeper,
    Move,
    NotLeadingError,
    Record,
    claim,
    decide,
    observe,
    parse_record,
)
from pretrain_operator.metrics import Metrics
from pretrain_operator.reconcile import Key
from pretrain_operator.testing import MemoryCluster, until

SPACE, NAME = "pretrain-system", "pretrain-operator"
EXAMPLES = 4 * int(os.environ.get("PRETRAIN_TEST_EXAMPLES", "25"))  # short ones
WALL = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def keeper(cluster: Any, identity: str, clock: Clock, metrics: Metrics | None = None) -> Keeper:
    return Keeper(cluster, SPACE, NAME, identity, metrics or Metrics(), clock=clock)


def stored(cluster: MemoryCluster) -> Record:
    return parse_record(cluster.objects[Kind.LEASE, SPACE, NAME])


# --- one thing at a time ------------------------------------------------------------------------


def test_what_is_due() -> None:
    theirs = Record("b", WALL, 15, 0, "1")
    sight = observe(None, theirs, 100)
    assert decide("a", theirs, sight, 114.9) is Move.WAIT
    assert decide("a", theirs, sight, 115) is Move.TAKE
    assert decide("b", theirs, sight, 100) is Move.RENEW
    assert decide("a", Record("", WALL, 15, 0, "1"), sight, 100) is Move.TAKE
    patient = Record("b", WALL, 60, 0, "1")  # its holder announced to be slower
    assert decide("a", patient, observe(None, patient, 100), 130) is Move.WAIT


def test_only_a_renewal_starts_the_wait_anew() -> None:
    record = Record("b", WALL, 15, 0, "1")
    sight = observe(None, record, 100)
    annotated = Record("b", WALL, 15, 0, "2")
    assert observe(sight, annotated, 110) == sight
    renewed = Record("b", WALL + timedelta(seconds=3), 15, 0, "3")
    assert observe(sight, renewed, 110).since == 110


def test_every_renewal_differs_even_if_the_wall_clock_stands_still_or_goes_back() -> None:
    marks = set()
    record: Record | None = None
    for wall in (WALL, WALL, WALL - timedelta(days=3650)):
        body = {"metadata": {"resourceVersion": "1"}, "spec": claim("a", record, wall)}
        record = parse_record(body)
        marks.add(record.mark)
    assert len(marks) == 3


@pytest.mark.parametrize("spec", [None, {}, {"renewTime": "soon", "leaseDurationSeconds": 0}])
def test_a_lease_that_says_nothing_can_be_taken(spec: Body | None) -> None:
    record = parse_record({"metadata": {"resourceVersion": "1"}, "spec": spec})
    assert decide("a", record, observe(None, record, 5), 5) is Move.TAKE
    assert record.duration == DURATION_SECONDS


async def test_the_first_one_leads_and_the_second_follows_when_it_is_gone() -> None:
    cluster, clock = MemoryCluster(), Clock()
    first, second = keeper(cluster, "a", clock), keeper(cluster, "b", clock)
    await first.step()
    await second.step()
    assert (first.leading, second.leading) == (True, False)
    for _ in range(6):
        clock.now += 3
        await first.step()
        await second.step()
    assert (first.leading, second.leading) == (True, False)
    clock.now += DURATION_SECONDS - 1  # the first is frozen
    await second.step()
    assert (first.leading, second.leading) == (False, False)
    clock.now += 1
    await second.step()
    await first.step()
    assert (first.leading, second.leading) == (False, True)
    assert stored(cluster).transitions == 1


async def test_a_released_lease_is_taken_at_once() -> None:
    cluster, clock = MemoryCluster(), Clock()
    first, second = keeper(cluster, "a", clock), keeper(cluster, "b", clock)
    await first.step()
    await second.step()
    await second.release()  # not its own: nothing happens
    assert stored(cluster).holder == "a"
    await first.release()
    assert not first.leading
    await second.step()
    assert second.leading


async def test_a_container_that_was_restarted_goes_on_at_once() -> None:
    cluster, clock = MemoryCluster(), Clock()
    await keeper(cluster, "pod", clock).step()
    again = keeper(cluster, "pod", clock)
    assert not again.leading
    await again.step()
    assert again.leading
    assert stored(cluster).transitions == 0


async def test_a_renewal_that_does_not_arrive_ends_it_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, clock, metrics = MemoryCluster(), Clock(), Metrics()
    again: list[Key] = []
    holder = Keeper(cluster, SPACE, NAME, "a", metrics, again.append, clock=clock)
    await holder.step()
    metrics.record("default", "llama", JobStatus())

    async def down(*_: object) -> Body:
        raise ClusterError("connection refused")

    monkeypatch.setattr(cluster, "patch", down)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.001)
    clock.now += SURE_SECONDS
    task = asyncio.create_task(holder.run())
    with pytest.raises(NotLeadingError, match="may not be ours"):
        holder.check()
    waiting = asyncio.create_task(holder.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    monkeypatch.undo()
    await asyncio.wait_for(waiting, 10)
    async with asyncio.timeout(10):
        while metrics.registry.get_sample_value("pretrain_operator_leader") != 1:  # noqa: ASYNC110 - set by the task
            await asyncio.sleep(0.001)
    await until(lambda: again == [("default", "llama")])  # which metrics had to forget meanwhile
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_term_is_a_time_in_which_nobody_else_can_have_led() -> None:
    cluster, clock = MemoryCluster(), Clock()
    one, other = keeper(cluster, "a", clock), keeper(cluster, "b", clock)
    await one.step()
    first = one.term()
    for _ in range(3):
        clock.now += 3
        await one.step()
    assert one.term() == first
    await other.step()
    clock.now += DURATION_SECONDS
    await other.step()
    assert other.leading
    await one.step()
    await other.release()
    await one.step()
    assert one.leading
    assert one.term() > first
    again = one.term()
    cluster.vanish(Kind.LEASE, NAME, SPACE)  # somebody may have made a new one and led
    with pytest.raises(ClusterError):
        await one.step()
    await one.step()
    assert one.term() > again


async def test_nothing_is_written_without_it() -> None:
    cluster, clock = MemoryCluster(), Clock()
    holder = keeper(cluster, "a", clock)
    guarded = GuardedCluster(cluster, holder.check)
    await holder.step()
    made = await guarded.create(Kind.POD, "x", {"metadata": {"name": "p"}, "spec": {}})
    clock.now += SURE_SECONDS
    written = list(cluster.writes)
    for write in (
        guarded.create(Kind.POD, "x", {"metadata": {"name": "q"}}),
        guarded.patch(Kind.POD, "x", "p", {}),
        guarded.patch_status(Kind.POD, "x", "p", {}),
        guarded.delete(Kind.POD, "x", "p"),
    ):
        with pytest.raises(NotLeadingError):
            await write
    assert cluster.writes == written
    assert await guarded.get(Kind.POD, "x", "p") == made


# --- any order of things ------------------------------------------------------------------------


class Halt:
    """A point where a step can be left waiting for any time."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class SlowCluster:
    """A view of a cluster whose requests and replies arrive when the test lets them."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self._cluster = cluster
        self.lose = False  # the next reply
        self.late: list[Coroutine[Any, Any, Body]] = []  # sent, given up, still on their way

    async def _carry(self, call: Coroutine[Any, Any, Body]) -> Body:
        try:
            await Halt()  # on its way there
        except BaseException:
            self.late.append(call)
            raise
        outcome = await settled(call)
        await Halt()  # on its way back
        if self.lose:
            self.lose = False
            raise ClusterError("the connection broke")
        if isinstance(outcome, ClusterError):
            raise outcome
        return outcome

    async def get(self, *args: Any) -> Body:
        return await self._carry(self._cluster.get(*args))

    async def create(self, *args: Any) -> Body:
        return await self._carry(self._cluster.create(*args))

    async def patch(self, *args: Any) -> Body:
        return await self._carry(self._cluster.patch(*args))


async def settled(call: Coroutine[Any, Any, Body]) -> Body | ClusterError:
    try:
        return await call
    except ClusterError as error:
        return error


class Operator:
    """One process: its keeper, and the step it is in the middle of."""

    def __init__(self, cluster: MemoryCluster, identity: str, clock: Clock) -> None:
        self.view = SlowCluster(cluster)
        self.identity = identity
        self.wall = WALL
        self.keeper = Keeper(
            self.view, SPACE, NAME, identity, Metrics(), clock=clock, wall=lambda: self.wall
        )
        self.step: Coroutine[Any, Any, None] | None = None

    def go_on(self) -> None:
        self.step = self.step or self.keeper.step()
        try:
            self.step.send(None)
        except (StopIteration, ClusterError):
            self.step = None

    def give_up(self) -> None:
        if self.step is not None:
            with suppress(TimeoutError):
                self.step.throw(TimeoutError())
            self.step = None


def test_a_renewal_counts_from_when_it_was_sent() -> None:
    cluster, clock = MemoryCluster(), Clock()
    holder = Operator(cluster, "a", clock)
    holder.go_on()  # asks, and is on its way
    while Kind.LEASE not in {kind for kind, _, _ in cluster.objects}:
        holder.go_on()
    clock.now += SURE_SECONDS  # until the reply comes back
    while holder.step is not None:
        holder.go_on()
    assert stored(cluster).holder == "a"
    assert not holder.keeper.leading


WHO = st.integers(0, 1)


class LeaseMachine(RuleBasedStateMachine):
    """Operators that step, freeze, lose replies, restart and release in any order."""

    @initialize()
    def begin(self) -> None:
        self.cluster, self.clock = MemoryCluster(), Clock()
        self.operators = [Operator(self.cluster, each, self.clock) for each in "ab"]
        self.late: list[Coroutine[Any, Any, Body]] = []

    @rule(who=WHO)
    def go_on(self, who: int) -> None:
        self.operators[who].go_on()

    @rule(who=WHO)
    def finish_a_step(self, who: int) -> None:
        self.operators[who].go_on()
        while self.operators[who].step is not None:
            self.operators[who].go_on()

    @rule(seconds=st.sampled_from((0.5, 3, 6, 12, 14, 15)))
    def time_goes_by(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(who=WHO)
    def a_reply_is_lost(self, who: int) -> None:
        self.operators[who].view.lose = True

    @rule(who=WHO)
    def a_step_times_out(self, who: int) -> None:
        self.give_up(self.operators[who])

    @rule(who=WHO)
    def its_container_is_restarted(self, who: int) -> None:
        self.give_up(self.operators[who])
        self.operators[who] = Operator(self.cluster, "ab"[who], self.clock)

    @precondition(lambda self: all(each.step is None for each in self.operators))
    @rule(who=WHO)
    def it_is_told_to_end(self, who: int) -> None:
        # In the real process nothing is under way then: rounds have been cancelled.
        operator = self.operators[who]
        operator.keeper._cluster = self.cluster
        asyncio.run(operator.keeper.release())
        operator.keeper._cluster = operator.view

    @rule(who=WHO)
    def a_request_arrives_late(self, who: int) -> None:
        if self.late:
            with suppress(StopIteration):
                settled(self.late.pop(who % len(self.late))).send(None)

    @rule(who=WHO, seconds=st.sampled_from((-(10**8), -3, 0, 10**8)))
    def a_wall_clock_is_set(self, who: int, seconds: int) -> None:
        self.operators[who].wall = WALL + timedelta(seconds=seconds)

    def give_up(self, operator: Operator) -> None:
        operator.give_up()
        self.late += operator.view.late
        operator.view.late = []

    @invariant()
    def never_two(self) -> None:
        if not hasattr(self, "operators"):
            return
        # A write that was checked may need the time limit of a connection until it is sent.
        margin = SURE_SECONDS + CONNECT_SECONDS
        able = [
            each.identity
            for each in self.operators
            if self.clock.now - each.keeper._renewed < margin and each.keeper._renewed != -math.inf
        ]
        assert len(able) <= 1, able

    def teardown(self) -> None:
        for each in getattr(self, "operators", []):
            self.give_up(each)
        for call in getattr(self, "late", []):
            call.close()


LeaseMachine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=40, deadline=None
)
TestLease = LeaseMachine.TestCase
