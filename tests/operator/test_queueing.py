"""Jobs in a queue: as a pod group that Kueue admits, and suspended like a batch Job.

Kueue itself is played by the tests: what it reads and writes is from its documentation.
"""

from typing import Any

import pytest

from pretrain_api import names
from pretrain_api.job import PretrainJob
from pretrain_api.status import JobPhase
from pretrain_api.wire import ExitCode, Failure, Progress, Result
from pretrain_operator.cluster import Kind
from pretrain_operator.resources import build_pod
from pretrain_operator.resources.podgroup import (
    ANNOTATION_RETRIABLE,
    ANNOTATION_SIZE,
    LABEL_GROUP,
)
from pretrain_operator.testing import JOB, Bench, job_body, message

FORTY = Progress(step=42, steps=100, step_seconds=2.0)
QUEUED = {"replicas": 2, "podTemplate": {"labels": {names.LABEL_QUEUE: "team"}}}


def groups(bench: Bench) -> set[tuple[str, str, str]]:
    """Queue, name and size of the groups that pods say they are in."""
    bodies = [body["metadata"] for body in bench.cluster.pods()]
    return {
        (
            meta["labels"][names.LABEL_QUEUE],
            meta["labels"][LABEL_GROUP],
            meta["annotations"][ANNOTATION_SIZE],
        )
        for meta in bodies
    }


def quota(bench: Bench) -> list[str]:
    """Pods for which Kueue keeps quota: all of a group that may be replaced yet, or run."""
    return [
        body["metadata"]["name"]
        for body in bench.cluster.pods()
        if LABEL_GROUP in body["metadata"]["labels"]
        and body["metadata"]["annotations"].get(ANNOTATION_RETRIABLE) != "false"
    ]


def edit(bench: Bench, **spec: Any) -> None:
    bench.cluster.edit(Kind.JOB, JOB, {"spec": spec})


async def test_workers_of_a_queued_job_are_one_group_and_so_are_their_successors(
    bench: Bench,
) -> None:
    await bench.submit(workers=QUEUED)
    await bench.train(FORTY)
    uid = bench.cluster.objects[Kind.JOB, "default", JOB]["metadata"]["uid"]
    assert groups(bench) == {("team", f"{JOB}-{uid[:8]}", "2")}
    bench.cluster.vanish(Kind.POD, "llama-1-1")
    await bench.settle()
    assert bench.member_pods() == ["llama-0-1", "llama-1-2"]
    assert len(groups(bench)) == 1


async def test_the_label_of_the_job_itself_is_enough(bench: Bench) -> None:
    body = job_body()
    body["metadata"]["labels"] = {names.LABEL_QUEUE: "other"}
    await bench.cluster.create(Kind.JOB, "default", body)
    await bench.settle()
    assert {queue for queue, _, _ in groups(bench)} == {"other"}


async def test_a_job_in_no_queue_is_in_no_group(bench: Bench) -> None:
    await bench.submit()
    await bench.settle()
    assert quota(bench) == []
    assert "kueue" not in str(bench.cluster.pods())


async def test_a_queued_job_of_several_sizes_is_refused_with_a_sentence(bench: Bench) -> None:
    body = job_body(workers={"replicas": 2, "minReplicas": 1})
    body["metadata"]["labels"] = {names.LABEL_QUEUE: "team"}
    await bench.cluster.create(Kind.JOB, "default", body)
    await bench.settle()
    assert bench.cluster.pods() == []
    assert bench.condition(names.FAILED) == ("True", "Invalid")


async def test_a_failed_job_keeps_its_evidence_but_no_quota(bench: Bench) -> None:
    await bench.submit(workers=QUEUED)
    await bench.train(FORTY)
    said = message(Result.CONFIG, failure=Failure(reason="Config", message="no such file"))
    bench.cluster.finish("llama-1-1", ExitCode.CONFIG, said)
    await bench.settle()
    bench.cluster.finish("llama-0-1", ExitCode.PREEMPTED)
    await bench.settle()
    assert bench.status.phase is JobPhase.FAILED
    assert bench.cluster.pod("llama-1-1")["status"]["phase"] == "Failed"
    assert quota(bench) == []


async def test_a_failed_worker_keeps_its_quota_for_the_one_that_follows(bench: Bench) -> None:
    await bench.submit(workers=QUEUED, recovery={"backoffSeconds": 60})
    await bench.train(FORTY)
    await bench.crash()
    bench.cluster.finish("llama-1-2", 1, message(Result.FAILED, generation=2, rank=1))
    await bench.settle()
    assert bench.status.assignment.not_before is not None
    assert "llama-1-2" in quota(bench)


async def test_a_suspended_job_keeps_no_quota(bench: Bench) -> None:
    await bench.submit(workers=QUEUED)
    await bench.train(FORTY)
    await bench.crash()
    assert "llama-1-1" in quota(bench)
    edit(bench, suspend=True)
    await bench.obey(FORTY)
    assert bench.cluster.pods() == []


async def test_a_queue_evicts_all_pods_and_the_job_comes_back_to_it(bench: Bench) -> None:
    """Preempting a group means deleting its pods; who made them makes others, which wait."""
    await bench.submit(workers=QUEUED, recovery={"maxRestarts": 0}, schedulingTimeoutSeconds=60)
    await bench.train(FORTY)
    for name in bench.member_pods():
        bench.cluster.remove(Kind.POD, name)
        bench.cluster.finish(name, ExitCode.PREEMPTED, message(Result.PREEMPTED, FORTY))
    await bench.settle()
    for name in bench.member_pods():
        bench.cluster.refuse(name, "Scheduling is blocked", reason="SchedulingGated")
    bench.cluster.advance(86_400)
    await bench.settle()
    assert len(bench.member_pods()) == 2
    assert bench.status.restarts.charged == 0
    assert bench.status.phase is JobPhase.RESTARTING
    await bench.train(FORTY)
    assert bench.status.phase is JobPhase.RUNNING


async def test_an_external_queue_controller_finds_a_batch_job(bench: Bench) -> None:
    """Created suspended; admitted with a node selector; preempted; admitted elsewhere."""
    await bench.submit(suspend=True)
    await bench.settle()
    assert bench.condition(names.SUSPENDED) == ("True", "Suspended")
    assert bench.cluster.pods() == []
    assert bench.status.start_time is None

    for flavor in ("spot", "reserved"):
        # Where the pods may run is written in the update that lets them.
        selector = {"podTemplate": {"nodeSelector": {"flavor": flavor}}}
        edit(bench, suspend=False, workers=selector)
        await bench.train(FORTY)
        assert bench.condition(names.SUSPENDED) == ("False", "Resumed")
        assert bench.status.start_time == bench.cluster.now
        assert bench.status.phase is JobPhase.RUNNING
        pods = [bench.cluster.pod(name) for name in bench.member_pods()]
        assert [pod["spec"]["nodeSelector"] for pod in pods] == [{"flavor": flavor}] * 2
        assert bench.status.replicas == 2

        edit(bench, suspend=True)
        await bench.settle()
        # At once, as of a batch Job: the controller takes it for stopped. The pods save first.
        assert bench.condition(names.SUSPENDED) == ("True", "Suspended")
        assert bench.status.start_time is None
        await bench.obey(FORTY)
        assert bench.cluster.pods() == []
        assert bench.status.replicas == 0
        edit(bench, workers={"podTemplate": {"nodeSelector": None}})
        await bench.settle()
        bench.cluster.advance(3600)

    assert bench.status.restarts.total == 0
    assert bench.status.progress.step == 42


@pytest.mark.parametrize("name", ["x" * 48, "a"])
def test_the_name_of_the_group_fits_into_a_label(name: str) -> None:
    body = job_body(workers=QUEUED)
    body["metadata"] |= {"name": name, "uid": "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"}
    job = PretrainJob.model_validate(body)
    labels = build_pod(job, 0, 1, "image", 120)["metadata"]["labels"]
    assert labels[LABEL_GROUP] == f"{name}-0a1b2c3d"
    assert len(labels[LABEL_GROUP]) <= 63
