"""The operator against a hostile cluster: Hypothesis plays users, nodes, crashes and a lazy watch.

The rules do to one job whatever a cluster may do, in any order: pods end, fall silent with their
nodes and come back, obey orders late or never, find no room; users suspend, resume and resize. The
operator gets a round now and then, sometimes with an old view of the pods, and sometimes dies after
any of its writes. The invariants hold after every step, and in the end, when the faults stop, the
job must reach its end.
"""

import asyncio
import copy
import json
import os
from collections import deque
from collections.abc import Coroutine
from datetime import datetime, timedelta
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

from pretrain_api import names
from pretrain_api.status import JobPhase
from pretrain_api.wire import (
    CheckpointReport,
    ExitCode,
    Order,
    Phase,
    Progress,
    Result,
    WorkerStatus,
)
from pretrain_operator.cluster import Body, ClusterError, Kind
from pretrain_operator.testing import JOB, Bench, CrashError, condition, message

MAX_RESTARTS = 3
GRACE_AND_MARGIN = 131
SIZES = (1, 2, 4)  # those at which the batch comes out even
NODES = ("node-0", "node-1", "node-2")
EXAMPLES = int(os.environ.get("PRETRAIN_TEST_EXAMPLES", "25"))


class HostileCluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.bench = Bench()
        self.cluster = self.bench.cluster
        self.step = 0
        self.finished: Any = None
        self.crashes: dict[str, int | None] = {}  # pods that failed, in which generation
        self.charged: dict[int, str] = {}  # pod charged with the end of a generation
        self.evidence: dict[str, str] = {}  # the last pod that failed, of each worker
        self.past: deque[list[Body]] = deque(maxlen=3)  # pods as they once were

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """One piece of the operator's work; a crash or a refused write ends it early."""
        try:
            self.loop.run_until_complete(work)
        except (CrashError, ClusterError):
            pass  # the next round is by a new operator that knows nothing
        finally:
            self.cluster.crash_in = None

    def living(self) -> list[str]:
        """Pods whose containers may run."""
        return [
            pod["metadata"]["name"]
            for pod in self.cluster.pods()
            if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
        ]

    @initialize(
        suspended=st.booleans(),
        replicas=st.sampled_from(SIZES),
        least=st.sampled_from([None, 1, 2]),
    )
    def submit(self, suspended: bool, replicas: int, least: int | None) -> None:
        recovery = {"maxRestarts": MAX_RESTARTS, "backoffSeconds": 5}
        workers = {"replicas": replicas, "maxReplicas": max(SIZES)}
        if least is not None and least <= replicas:
            workers["minReplicas"] = least
        self.loop.run_until_complete(
            self.bench.submit(suspend=suspended, recovery=recovery, workers=workers)
        )

    # --- the operator ---------------------------------------------------------------------------

    @rule()
    def one_round(self) -> None:
        self.run(self.bench.round())

    @rule(writes=st.integers(1, 6))
    def crash_between_writes(self, writes: int) -> None:
        self.cluster.crash_in = writes
        self.run(self.bench.settle())

    @rule()
    def settle_and_find_nothing_left_to_do(self) -> None:
        self.bench.stale = None
        self.past.append(self.cluster.pods())
        self.loop.run_until_complete(self.bench.settle())
        before = len(self.cluster.writes)
        self.loop.run_until_complete(self.bench.round())
        assert len(self.cluster.writes) == before

    @rule()
    def all_is_quiet_and_everybody_starts(self) -> None:
        self.bench.stale = None
        self.past.append(self.cluster.pods())
        self.loop.run_until_complete(self.bench.train())
        self.past.append(self.cluster.pods())

    @rule()
    def the_watch_stalls(self) -> None:
        self.bench.stale = copy.deepcopy(self.cluster.pods())

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def a_new_operator_is_shown_the_past(self, data: st.DataObject) -> None:
        self.bench.stale = data.draw(st.sampled_from(list(self.past)))

    @rule()
    def the_watch_catches_up(self) -> None:
        self.bench.stale = None

    # --- the cluster ----------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1, 5, 40, GRACE_AND_MARGIN]))
    def time_passes(self, seconds: int) -> None:
        self.cluster.advance(seconds)

    @precondition(lambda self: self.living())
    @rule(data=st.data(), node=st.sampled_from(NODES))
    def a_pod_starts(self, data: st.DataObject, node: str) -> None:
        name = data.draw(st.sampled_from(self.living()))
        self.cluster.start(name, node=self.cluster.pod(name)["spec"].get("nodeName") or node)

    @precondition(lambda self: self.unplaced())
    @rule(data=st.data())
    def there_is_no_room(self, data: st.DataObject) -> None:
        self.cluster.refuse(data.draw(st.sampled_from(self.unplaced())), "no node has room")

    @precondition(lambda self: self.living())
    @rule(data=st.data(), still=st.booleans(), lost=st.booleans())
    def a_worker_falls_silent(self, data: st.DataObject, still: bool, lost: bool) -> None:
        """With its node or alone; its world stands still without it or only seems to lack it."""
        name = data.draw(st.sampled_from(self.living()))
        self.bench.workers.silent[name] = 12.0
        node = self.cluster.pod(name)["spec"].get("nodeName")
        if lost and node:
            self.node_is(node, "Unknown")
        assignment = self.bench.status.assignment
        for member in assignment.workers if assignment else ():
            age = 12.0 if still else 0.1
            self.bench.workers.reports[member.pod] = WorkerStatus(
                generation=assignment.generation, phase=Phase.STEP, beat_age_seconds=age
            )

    @rule()
    def all_nodes_and_workers_answer_again(self) -> None:
        self.bench.workers.silent.clear()
        self.bench.workers.reports.clear()
        for kind, _, name in list(self.cluster.objects):
            if kind is Kind.NODE:
                self.node_is(name, "True")

    @precondition(lambda self: self.ordered())
    @rule(data=st.data())
    def a_member_obeys(self, data: st.DataObject) -> None:
        self.obey(data.draw(st.sampled_from(self.ordered())))

    @rule(replicas=st.sampled_from(SIZES))
    def a_user_resizes(self, replicas: int) -> None:
        workers = self.cluster.all(Kind.JOB)[0]["spec"]["workers"]
        if replicas >= workers.get("minReplicas", 1):  # the API server refuses the others
            self.cluster.edit(Kind.JOB, JOB, {"spec": {"workers": {"replicas": replicas}}})

    @precondition(lambda self: self.living())
    @rule(data=st.data(), code=st.sampled_from([0, 1, 137, 143]))
    def a_pod_ends(self, data: st.DataObject, code: int) -> None:
        name = data.draw(st.sampled_from(self.living()))
        result = Result.PREEMPTED if code == ExitCode.PREEMPTED else Result.FAILED
        word = self.word(name)
        said = message(result, generation=word["generation"], rank=word["rank"]) if word else ""
        obeyed = said and result is Result.PREEMPTED
        self.fails(name, word["generation"] if word else None, kept=code != 0 and not obeyed)
        self.cluster.finish(name, code, said)

    @precondition(lambda self: self.the_world_trains())
    @rule(data=st.data())
    def a_rank_fails_once_too_often(self, data: st.DataObject) -> None:
        """The meeting's verdict ends all agents; their pods end in any order, rounds in between."""
        self.bench.stale = None
        self.loop.run_until_complete(self.bench.settle())
        if not self.the_world_trains():
            return  # the round had something else to do first
        members = self.bench.member_pods()
        generation = self.bench.status.assignment.generation
        before = len(self.charged)
        for name in data.draw(st.permutations(members)):
            self.fails(name, generation)
            self.cluster.finish(name, 1, message(Result.FAILED, generation=generation))
            self.loop.run_until_complete(self.bench.settle())
            self.every_charge_is_for_a_failure_of_its_own()
        assert len(self.charged) == before + 1

    @precondition(lambda self: self.cluster.pods())
    @rule(data=st.data(), graceful=st.booleans())
    def a_pod_is_deleted(self, data: st.DataObject, graceful: bool) -> None:
        names_ = [pod["metadata"]["name"] for pod in self.cluster.pods()]
        name = data.draw(st.sampled_from(names_))
        self.evidence = {worker: pod for worker, pod in self.evidence.items() if pod != name}
        (self.cluster.remove if graceful else self.cluster.vanish)(Kind.POD, name)

    @rule(suspended=st.booleans())
    def a_user_suspends_or_resumes(self, suspended: bool) -> None:
        self.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": suspended}})

    @rule(kind=st.sampled_from([Kind.CONFIG_MAP, Kind.NETWORK_POLICY, Kind.CLAIM]))
    def somebody_deletes_a_child(self, kind: Kind) -> None:
        for body in self.cluster.all(kind):
            self.cluster.vanish(kind, body["metadata"]["name"])

    @precondition(lambda self: self.bench.status.assignment and self.bench.status.assignment.leader)
    @rule(save=st.booleans())
    def training_advances(self, save: bool) -> None:
        self.step += 1
        kept = CheckpointReport(step=self.step, time=1.0, path="x", bytes=1) if save else None
        progress = Progress(step=self.step, steps=1000, step_seconds=1.0, checkpoint=kept)
        self.bench.report(progress, Phase.STEP)

    @precondition(lambda self: self.leader_running())
    @rule()
    def the_leader_completes(self) -> None:
        self.complete()

    # --- what must hold after every step ----------------------------------------------------------

    def word(self, name: str) -> dict[str, Any] | None:
        annotations = self.cluster.pod(name)["metadata"].get("annotations", {})
        text = annotations.get(names.ANNOTATION_ASSIGNMENT)
        return json.loads(text) if text else None

    def unplaced(self) -> list[str]:
        """Running pods that have no node yet."""
        return [name for name in self.living() if "nodeName" not in self.cluster.pod(name)["spec"]]

    def node_is(self, node: str, ready: str) -> None:
        status = self.cluster.objects[Kind.NODE, "", node]["status"]
        status["conditions"] = [condition("Ready", ready)]

    def ordered(self) -> list[str]:
        """Pods that were told to drain or to pause, whoever they are by now."""
        told = ((name, self.word(name) or {}) for name in self.living())
        return [name for name, word in told if word.get("orders", "none") != Order.NONE]

    def obey(self, name: str) -> None:
        word = self.word(name) or {}
        if word["orders"] == Order.DRAIN:
            said = message(Result.PREEMPTED, generation=word["generation"], rank=word["rank"])
            self.cluster.finish(name, ExitCode.PREEMPTED, said)
        else:
            said = WorkerStatus(generation=word["generation"], rank=word["rank"], paused=True)
            self.bench.workers.reports[name] = said

    def fails(self, name: str, generation: int | None, *, kept: bool = True) -> None:
        """Note it. A pod that is being deleted goes with its end; who did as told isn't kept."""
        self.crashes[name] = generation
        worker, _, created_in = name.rpartition("-")
        last = int(self.evidence.get(worker, "-0").rpartition("-")[2])
        if kept and int(created_in) > last:
            leaves = "deletionTimestamp" in self.cluster.pod(name)["metadata"]
            self.evidence |= {} if leaves else {worker: name}

    def leader_running(self) -> bool:
        members = self.bench.member_pods()
        return bool(members) and members[0] in self.living() and self.word(members[0]) is not None

    def the_world_trains(self) -> bool:
        """All members run, were told of the present generation, and of nothing else."""
        status, assignment = self.bench.status, self.bench.status.assignment
        if status.completion_time is not None or not assignment or not assignment.workers:
            return False
        if assignment.order is not Order.NONE or self.bench.workers.silent:
            return False
        return all(
            name in self.living()
            and "deletionTimestamp" not in self.cluster.pod(name)["metadata"]
            and (self.word(name) or {}).get("generation") == assignment.generation
            for name in self.bench.member_pods()
        )

    def complete(self) -> None:
        name = self.bench.member_pods()[0]
        word = self.word(name) or {}
        done = Progress(step=1000, steps=1000)
        said = message(Result.COMPLETE, done, generation=word["generation"])
        self.cluster.finish(name, 0, said)

    @invariant()
    def ranks_of_two_generations_never_run_side_by_side(self) -> None:
        running = [
            (pod, word)
            for pod in self.cluster.pods()
            if pod["metadata"]["name"] in self.living()
            and (word := self.word(pod["metadata"]["name"]))
        ]
        if not running:
            return
        newest = max(word["generation"] for _, word in running)
        assignment = self.bench.status.assignment
        members = self.bench.member_pods()
        for pod, word in running:
            meta = pod["metadata"]
            if word["generation"] == newest or meta["name"] in members:
                continue  # members that have yet to hear are told by the next write
            if assignment and assignment.announced and assignment.generation == newest:
                if meta["uid"] in assignment.written_off:
                    continue  # it is lost, and fenced out
                # Nobody was told before this one had left, or had outlived its time to leave.
                assert "deletionTimestamp" in meta
                until = datetime.fromisoformat(meta["deletionTimestamp"])
                assert until + timedelta(seconds=10) <= assignment.announced
        places = [word["rank"] for _, word in running if word["generation"] == newest]
        assert len(places) == len(set(places))

    @invariant()
    def a_pod_belongs_to_the_job_and_ranks_are_told_the_truth(self) -> None:
        assignment = self.bench.status.assignment
        for pod in self.cluster.pods():
            word = self.word(pod["metadata"]["name"])
            if word and assignment and word["generation"] == assignment.generation:
                assert word["nonce"] == assignment.nonce
                if assignment.workers:  # none while suspended
                    assert word["leader"] == assignment.leader
                    assert word["size"] == len(assignment.workers)
                    assert word["size"] in SIZES

    @invariant()
    def generations_only_grow_and_the_budget_holds(self) -> None:
        status = self.bench.status
        if status.restarts:
            assert status.restarts.charged <= MAX_RESTARTS
            assert sum(status.restarts.by_reason.values()) == status.restarts.total
        generations = [attempt.generation for attempt in status.attempts]
        assert generations == sorted(generations)

    @invariant()
    def every_charge_is_for_a_failure_of_its_own(self) -> None:
        for attempt in self.bench.status.attempts:
            if attempt.charged:
                assert self.crashes[attempt.pod] in (None, attempt.generation)
                assert self.charged.setdefault(attempt.generation, attempt.pod) == attempt.pod
        assert len(set(self.charged.values())) == len(self.charged)

    @invariant()
    def the_last_failure_of_each_worker_is_there_for_a_look(self) -> None:
        there = {pod["metadata"]["name"] for pod in self.cluster.pods()}
        assert there >= set(self.evidence.values())

    @invariant()
    def a_finished_job_stays_as_it_is(self) -> None:
        status = self.bench.status
        if self.finished is not None:
            assert status == self.finished
        elif status.completion_time is not None:
            self.finished = status

    def teardown(self) -> None:
        try:
            self.the_faults_stop_and_the_job_gets_to_its_end()
        finally:
            self.loop.close()

    def the_faults_stop_and_the_job_gets_to_its_end(self) -> None:
        self.bench.stale = None
        self.cluster.crash_in = None
        if Kind.JOB not in {kind for kind, _, _ in self.cluster.objects}:
            return
        self.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": False}})
        self.all_nodes_and_workers_answer_again()
        for _ in range(20):
            if self.bench.status.phase in (JobPhase.COMPLETE, JobPhase.FAILED):
                break
            self.loop.run_until_complete(self.bench.settle())
            for name in self.ordered():
                self.obey(name)
            for name in self.living():
                if "deletionTimestamp" in self.cluster.pod(name)["metadata"]:
                    self.cluster.finish(name, ExitCode.PREEMPTED)
            self.loop.run_until_complete(self.bench.train())
            if self.leader_running():
                self.complete()
            self.cluster.advance(60)
        assert self.bench.status.phase in (JobPhase.COMPLETE, JobPhase.FAILED)
        self.cluster.advance(60)
        self.loop.run_until_complete(self.bench.settle())
        left = [p for p in self.cluster.pods() if p["metadata"]["name"] in self.living()]
        assert all("deletionTimestamp" in pod["metadata"] for pod in left)


def test_any_order_of_faults_converges() -> None:
    run_state_machine_as_test(
        HostileCluster,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
