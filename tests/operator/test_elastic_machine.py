"""Sizes under a hostile cluster: scaled, refused, gated, lost and crashed in any order.

Hypothesis plays user, scheduler, nodes and a mortal operator on one elastic job. Whatever happens,
only legal sizes train, nobody is told twice, no candidate is told anything and no budget is used;
and when there is room again and all is quiet, the job trains with as many workers as it should.
"""

import asyncio
import os
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pretrain_api.status import AssignmentStatus, JobPhase
from pretrain_api.wire import ExitCode, Order, Progress, Result
from pretrain_operator.cluster import ClusterError, Kind
from pretrain_operator.testing import JOB, Bench, CrashError, message

EXAMPLES = int(os.environ.get("PRETRAIN_TEST_EXAMPLES", "25"))
SIZES = (1, 2, 4, 8)
LONGEST_WAIT = 3600
PROGRESS = Progress(step=7, steps=100, step_seconds=1.0)


class ElasticCluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.bench = Bench()
        self.cluster = self.bench.cluster

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """One piece of the operator's work; a crash or a refused write ends it early."""
        try:
            self.loop.run_until_complete(work)
        except (CrashError, ClusterError):
            pass  # the next round is by a new operator that knows nothing
        finally:
            self.cluster.crash_in = None

    @property
    def assignment(self) -> AssignmentStatus:
        return self.bench.status.assignment or AssignmentStatus()

    def pods(self, *, placed: bool | None = None, leaving: bool = False) -> list[str]:
        """Pods that run, or might."""
        return [
            pod["metadata"]["name"]
            for pod in self.cluster.pods()
            if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
            and placed in (None, "nodeName" in pod["spec"])
            and ("deletionTimestamp" in pod["metadata"]) is leaving
        ]

    @initialize(
        timeout=st.sampled_from([None, 60]),
        least=st.sampled_from([None, 1, 2]),
        replicas=st.sampled_from([2, 4]),
        trains=st.booleans(),
    )
    def submit(self, timeout: int | None, least: int | None, replicas: int, trains: bool) -> None:
        bounds = {"maxReplicas": 8} | ({"minReplicas": least} if least else {})
        spec: dict[str, Any] = {"schedulingTimeoutSeconds": timeout} if timeout else {}
        spec["workers"] = {"replicas": replicas, **bounds}
        spec["recovery"] = {"maxRestarts": 0}
        self.least = least or 1
        self.loop.run_until_complete(self.bench.submit(**spec))
        if trains:
            self.loop.run_until_complete(self.bench.train(PROGRESS))

    # --- the operator ---------------------------------------------------------------------------

    @rule()
    def one_round(self) -> None:
        self.run(self.bench.round())

    @rule(writes=st.integers(1, 4))
    def crash_between_writes(self, writes: int) -> None:
        self.cluster.crash_in = writes
        self.run(self.bench.settle())

    @rule()
    def settle_and_find_nothing_left_to_do(self) -> None:
        self.loop.run_until_complete(self.bench.settle())
        before = len(self.cluster.writes)
        self.loop.run_until_complete(self.bench.round())
        assert len(self.cluster.writes) == before

    # --- the user -------------------------------------------------------------------------------

    @rule(size=st.sampled_from(SIZES))
    def scale(self, size: int) -> None:
        if size >= self.least:
            self.cluster.edit(Kind.JOB, JOB, {"spec": {"workers": {"replicas": size}}})

    @rule(suspend=st.booleans())
    def suspend_or_resume(self, suspend: bool) -> None:
        self.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": suspend}})

    # --- scheduler, nodes, time -------------------------------------------------------------------

    @precondition(lambda self: self.pods())
    @rule(data=st.data())
    def a_pod_starts(self, data: st.DataObject) -> None:
        self.cluster.start(data.draw(st.sampled_from(self.pods())))

    @rule(train=st.booleans())
    def there_is_room_for_all(self, train: bool) -> None:
        self.who_was_told_to_leave_does()
        self.run(self.bench.train())
        if train and self.assignment.leader and self.assignment.order is Order.NONE:
            self.bench.report(PROGRESS)

    @rule(
        reason=st.sampled_from(["Unschedulable", "Unschedulable", "SchedulingGated"]),
        seconds=st.sampled_from([0, 10, 60]),
    )
    def there_is_no_room_for_more(self, reason: str, seconds: int) -> None:
        self.run(self.bench.settle())
        for name in self.pods(placed=False):
            self.cluster.refuse(name, "0/3 nodes are available", reason)
        self.run(self.bench.settle())
        self.cluster.advance(seconds)

    @precondition(lambda self: self.assignment.leader)
    @rule(data=st.data())
    def a_node_is_lost(self, data: st.DataObject) -> None:
        lost = data.draw(st.sampled_from(self.bench.member_pods()))
        if lost in [pod["metadata"]["name"] for pod in self.cluster.pods()]:
            self.cluster.vanish(Kind.POD, lost)
        self.there_is_no_room_for_more("Unschedulable", 10)

    @precondition(lambda self: self.cluster.pods())
    @rule(data=st.data(), graceful=st.booleans())
    def a_pod_is_taken_away(self, data: st.DataObject, graceful: bool) -> None:
        names = [pod["metadata"]["name"] for pod in self.cluster.pods()]
        name = data.draw(st.sampled_from(names))
        (self.cluster.remove if graceful else self.cluster.vanish)(Kind.POD, name)

    @rule()
    def who_was_told_to_leave_does(self) -> None:
        for name in self.pods(leaving=True):
            self.cluster.finish(name, ExitCode.PREEMPTED)

    @precondition(lambda self: set(self.bench.candidate_pods()) & set(self.pods(placed=True)))
    @rule(data=st.data())
    def a_candidate_fails(self, data: st.DataObject) -> None:
        there = set(self.bench.candidate_pods()) & set(self.pods(placed=True))
        name = data.draw(st.sampled_from(sorted(there)))
        self.cluster.finish(name, 1, message(Result.FAILED))

    @rule(seconds=st.sampled_from([1, 10, 60, 140, LONGEST_WAIT]))
    def time_passes(self, seconds: int) -> None:
        self.cluster.advance(seconds)

    # --- the workers ------------------------------------------------------------------------------

    @rule()
    def members_obey(self) -> None:
        self.run(self.bench.obey(PROGRESS))

    @precondition(lambda self: self.assignment.leader and self.assignment.order is Order.NONE)
    @rule()
    def they_train(self) -> None:
        self.bench.report(PROGRESS)

    # --- what must hold after every step ----------------------------------------------------------

    @invariant()
    def only_legal_sizes(self) -> None:
        assert len(self.assignment.workers) in (0, *SIZES)
        everybody = (*self.assignment.workers, *self.assignment.candidates)
        assert len({member.pod for member in everybody}) == len(everybody)
        indices = [member.index for member in self.assignment.workers]
        assert indices == list(range(len(indices)))

    @invariant()
    def everybody_is_told_the_truth_and_candidates_nothing(self) -> None:
        for name in set(self.bench.candidate_pods()) & set(self.pods()):
            assert self.bench.told(name) is None
        assignment, places = self.assignment, list[int]()
        for name in (*self.pods(), *self.pods(leaving=True)):
            word = self.bench.told(name)
            if word and word.generation == assignment.generation and assignment.workers:
                assert word.size == len(assignment.workers)
                places.append(word.rank)
        assert len(places) == len(set(places))

    @invariant()
    def no_size_costs_anything(self) -> None:
        status = self.bench.status
        assert status.phase is not JobPhase.FAILED
        if status.restarts:
            assert status.restarts.charged == 0
            assert sum(status.restarts.by_reason.values()) == status.restarts.total
        assert not any(attempt.charged for attempt in status.attempts)

    def teardown(self) -> None:
        try:
            if Kind.JOB in {kind for kind, _, _ in self.cluster.objects}:
                self.there_is_room_again_and_all_train()
        finally:
            self.loop.close()

    def there_is_room_again_and_all_train(self) -> None:
        self.cluster.crash_in = None
        self.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": False}})
        wanted = self.cluster.objects[Kind.JOB, "default", JOB]["spec"]["workers"]["replicas"]
        for _ in range(8):
            self.who_was_told_to_leave_does()
            self.loop.run_until_complete(self.bench.train())
            self.loop.run_until_complete(self.bench.obey(PROGRESS))
            if self.assignment.leader and self.assignment.order is Order.NONE:
                self.bench.report(PROGRESS)
            self.cluster.advance(LONGEST_WAIT)
        self.who_was_told_to_leave_does()
        self.loop.run_until_complete(self.bench.settle())
        members = self.bench.member_pods()
        words = [self.bench.told(name) for name in members]
        assert [(word.rank, word.size) for word in words if word] == [
            (rank, wanted) for rank in range(wanted)
        ]
        assert sorted(self.pods()) == sorted(members)
        assert self.bench.status.phase is JobPhase.RUNNING


def test_any_order_of_sizes_converges() -> None:
    run_state_machine_as_test(
        ElasticCluster,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
