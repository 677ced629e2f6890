"""The operator dies after its k-th write, for every k of every workflow, and nobody can tell later.

The end of each run is compared with that of an operator that never died: the status without times,
the children that are there, and every child that was ever made. A last run lets it die after each
of its writes.
"""

import json
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import pytest

from pretrain_api import names
from pretrain_api.status import JobPhase
from pretrain_api.wire import CheckpointReport, Failure, Phase, Progress, Result, WorkerStatus
from pretrain_operator.cluster import Kind
from pretrain_operator.testing import JOB, Bench, CrashError, condition, message

KEPT = CheckpointReport(step=40, time=1.0, path="checkpoint/step-40", bytes=7, seconds=1.0)
FORTY = Progress(step=42, steps=100, loss=3.5, step_seconds=2.0, checkpoint=KEPT)
DONE = Progress(step=100, steps=100, loss=2.0, step_seconds=2.0)
CHILDREN = (Kind.POD, Kind.CLAIM, Kind.CONFIG_MAP, Kind.NETWORK_POLICY)
# What two runs never share: times, random numbers, what the API server hands out.
PRIVATE = {
    "nonce", "uid", "ip", "leader", "time", "updated", "lastTransitionTime", "startTime",
    "completionTime", "created", "announced", "notBefore", "ordered", "until", "started", "ended",
    "growAfter", "unplaced", "writtenOff",
}  # fmt: skip


class Mortal(Bench):
    """A bench whose operator dies after its k-th write, or after each, and is started again."""

    def __init__(self, k: int | None = None, *, always: bool = False) -> None:
        super().__init__()
        self.k = k
        self.always = always
        self.deaths = 0

    async def submit(self, **spec: Any) -> None:
        """As ever; the user's write isn't the operator's."""
        await super().submit(**spec)
        self.cluster.crash_in = self.k

    async def round(self) -> float | None:
        """A round, which death may end."""
        if self.always:
            self.cluster.crash_in = 1
        try:
            return await super().round()
        except CrashError:
            self.deaths += 1
            return 0.0
        finally:
            if self.always:
                self.cluster.crash_in = None

    async def complete(self) -> None:
        """The leader trains to the end."""
        assignment = self.status.assignment
        said = message(Result.COMPLETE, DONE, generation=assignment.generation)
        for name in self.member_pods():
            self.cluster.finish(name, 0, said)
            said = said.model_copy(update={"rank": 1})
        await self.settle()


async def apply_and_complete(bench: Mortal) -> None:
    await bench.submit()
    await bench.train(FORTY)
    await bench.complete()
    assert bench.status.phase is JobPhase.COMPLETE


async def fail_twice(bench: Mortal) -> None:
    await bench.submit(recovery={"backoffSeconds": 8})
    await bench.train(FORTY)
    for generation in (1, 2):
        failure = Failure(rank=1, exit_code=1, message="boom")
        said = message(Result.FAILED, generation=generation, rank=1, failure=failure)
        bench.cluster.finish(bench.member_pods()[1], 1, said)
        await bench.settle()
        bench.cluster.advance(8)
        await bench.train()
    bench.report(FORTY)
    bench.cluster.advance(11)
    await bench.complete()
    assert bench.status.restarts.charged == 2


async def fail_for_good(bench: Mortal) -> None:
    await bench.submit(recovery={"maxRestarts": 0})
    await bench.train(FORTY)
    bench.cluster.finish("llama-0-1", 1, message(Result.FAILED, FORTY))
    await bench.settle()
    bench.cluster.finish("llama-1-1", 1, message(Result.FAILED, rank=1))
    await bench.settle()
    assert bench.condition(names.FAILED) == ("True", "BackoffLimitExceeded")


async def lose_a_node(bench: Mortal) -> None:
    await bench.submit()
    await bench.settle()
    for index, name in enumerate(bench.member_pods()):
        bench.cluster.start(name, node=f"node-{index}")
    await bench.settle()
    stuck = WorkerStatus(generation=1, rank=0, phase=Phase.STEP, beat_age_seconds=12.0)
    bench.workers.reports["llama-0-1"] = stuck.model_copy(update={"progress": FORTY})
    bench.workers.silent["llama-1-1"] = 12.0
    await bench.settle()
    node = bench.cluster.objects[Kind.NODE, "", "node-1"]
    node["status"]["conditions"] = [condition("Ready", "Unknown")]
    bench.cluster.start("llama-1-2", node="node-9")
    bench.report(FORTY)
    await bench.settle()
    bench.report(FORTY)  # by the leader of the new generation
    await bench.settle()
    assert "llama-1-1" not in [pod["metadata"]["name"] for pod in bench.cluster.pods()]
    await bench.complete()
    assert bench.status.restarts.by_reason == {"Unreachable": 1}


async def suspend_and_resume(bench: Mortal) -> None:
    await bench.submit()
    await bench.train(FORTY)
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
    await bench.obey(FORTY)
    assert bench.cluster.pods() == []
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": False}})
    await bench.train(FORTY)
    await bench.complete()
    assert bench.status.restarts.total == 0


async def suspend_while_a_worker_stays(bench: Mortal) -> None:
    await bench.submit()
    await bench.train(FORTY)
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
    await bench.settle()
    bench.cluster.advance(130)
    await bench.settle()
    for name in ("llama-0-1", "llama-1-1"):
        bench.cluster.finish(name, 143, message(Result.PREEMPTED))
    await bench.settle()
    assert bench.status.phase is JobPhase.SUSPENDED


async def resize_there_and_back(bench: Mortal) -> None:
    await bench.submit(workers={"replicas": 2, "maxReplicas": 2})
    await bench.train(FORTY)
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"workers": {"replicas": 1}}})
    await bench.obey(FORTY)
    bench.cluster.finish("llama-1-1", 143, message(Result.PREEMPTED, rank=1))
    await bench.train(FORTY)
    assert bench.told("llama-0-1").size == 1
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"workers": {"replicas": 2}}})
    await bench.settle()
    assert len(bench.candidate_pods()) == 1
    bench.cluster.advance(11)
    await bench.train(FORTY)
    await bench.obey(FORTY)
    await bench.train(FORTY)
    assert [bench.told(name).size for name in bench.member_pods()] == [2, 2]
    await bench.complete()
    assert bench.status.restarts.by_reason == {"Resized": 2}


async def shrink_for_want_of_nodes(bench: Mortal) -> None:
    await bench.submit(workers={"replicas": 2, "minReplicas": 1})
    await bench.train(FORTY)
    bench.cluster.vanish(Kind.POD, "llama-1-1")
    await bench.settle()
    bench.cluster.refuse("llama-1-2", "0/2 nodes are available")
    await bench.settle()
    bench.cluster.advance(10)
    await bench.train(FORTY)
    assert bench.told("llama-0-1").size == 1
    bench.cluster.advance(60)
    await bench.train(FORTY)
    await bench.obey(FORTY)
    await bench.train(FORTY)
    assert [bench.told(name).size for name in bench.member_pods()] == [2, 2]
    await bench.complete()
    assert bench.status.restarts.by_reason == {"PodDeleted": 1, "Shrunk": 1, "Grown": 1}


async def delete(bench: Mortal) -> None:
    await bench.submit()
    await bench.train(FORTY)
    bench.cluster.vanish(Kind.JOB, JOB)
    await bench.settle()
    assert [kind for kind in CHILDREN if bench.cluster.all(kind)] == [Kind.CLAIM]


async def expire(bench: Mortal) -> None:
    volume = {"claimTemplate": {"storage": "1Gi"}, "retention": "Delete"}
    await bench.submit(ttlSecondsAfterFinished=60, volumes={"checkpoint": volume})
    await bench.train(FORTY)
    await bench.complete()
    bench.cluster.advance(60)
    await bench.settle()
    assert not any(bench.cluster.all(kind) for kind in (Kind.JOB, *CHILDREN))


WORKFLOWS = [
    apply_and_complete,
    fail_twice,
    fail_for_good,
    lose_a_node,
    suspend_and_resume,
    suspend_while_a_worker_stays,
    resize_there_and_back,
    shrink_for_want_of_nodes,
    delete,
    expire,
]


@pytest.mark.parametrize("workflow", WORKFLOWS)
async def test_an_operator_that_dies_after_any_write_gets_to_the_same_end(
    workflow: Callable[[Mortal], Awaitable[None]],
) -> None:
    undisturbed = Mortal()
    await workflow(undisturbed)
    expected = end_of(undisturbed)
    for k in count(1):
        bench = Mortal(k)
        await workflow(bench)
        if not bench.deaths:
            break
        assert end_of(bench) == expected, f"died after write {k}"
    assert k > 6  # the workflow has that many points to die at, at least
    bench = Mortal(always=True)
    await workflow(bench)
    assert bench.deaths > 6
    assert end_of(bench) == expected, "died after each write"


def end_of(bench: Bench) -> dict[str, Any]:
    """Status, children and what was ever made, without what differs from run to run."""
    jobs = bench.cluster.all(Kind.JOB)
    made = [write for write in bench.cluster.writes if write.startswith("create")]
    return {
        "status": public(jobs[0].get("status")) if jobs else None,
        "children": {
            body["metadata"]["name"]: shape(body)
            for kind in CHILDREN
            for body in bench.cluster.all(kind)
        },
        "made": sorted(write for write in made if "events" not in write),
    }


def shape(body: dict[str, Any]) -> Any:
    """What the operator chose of a child: its spec, whose it is, what it was told, if it leaves."""
    meta = body["metadata"]
    told = meta.get("annotations", {}).get(names.ANNOTATION_ASSIGNMENT)
    owners = [owner["name"] for owner in meta.get("ownerReferences") or ()]
    leaving = "deletionTimestamp" in meta
    rest = {key: body.get(key) for key in ("spec", "data")}
    return [public(json.loads(told)) if told else None, owners, leaving, public(rest)]


def public(value: Any) -> Any:
    """A JSON value in which private fields, and values that are UIDs, only count as being there."""
    if isinstance(value, dict):
        return {key: "…" if key in PRIVATE else public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    return "…" if isinstance(value, str) and value.startswith("uid-") else value
