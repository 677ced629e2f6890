"""The arithmetic of `make bench-operator`; the run itself needs a machine of its own."""

import os
import urllib.request
from typing import Any

import pytest

from pretrain_api import names
from pretrain_api.job import PretrainJob
from pretrain_api.wire import Phase, WorkerStatus
from pretrain_bench.client import Client
from pretrain_bench.scale import workers
from pretrain_bench.scale.costs import Usage, requests
from pretrain_bench.scale.podlog import Life, PodLog
from pretrain_bench.scale.throughput import Result, complaints, pretrain_job, shape, tables

METRICS = """\
# TYPE apiserver_flowcontrol_dispatched_requests_total counter
apiserver_flowcontrol_dispatched_requests_total{flow_schema="exempt",priority_level="exempt"} 9
apiserver_flowcontrol_dispatched_requests_total{flow_schema="of-pretrain-operator",a="b"} 1.2e+03
apiserver_flowcontrol_dispatched_requests_total{flow_schema="of-pretrain-operator-2",a="b"} 5
"""
WORD = '{"generation": 2, "rank": %d, "size": 8, "leader": "127.77.0.2:8477", "nonce": "n"}'


def pod(name: str, **more: Any) -> dict[str, Any]:
    meta = {"name": name, "uid": f"uid-{name}", "labels": {names.LABEL_JOB: "job"}}
    return {"metadata": meta | more.pop("metadata", {}), **more}


@pytest.fixture
def pods() -> PodLog:
    return PodLog(Client.by_token("https://127.0.0.1:1", None, "unused"))  # type: ignore[arg-type]


def test_requests_are_those_of_one_user() -> None:
    assert requests(METRICS, "pretrain-operator") == 1200
    assert requests(METRICS, "nobody") == 0


def test_a_pods_life_is_noted(pods: PodLog) -> None:
    pods._note("ADDED", pod("a"), 10.0)
    told = {"annotations": {names.ANNOTATION_ASSIGNMENT: WORD % 0}}
    pods._note("MODIFIED", pod("a", metadata=told, status={"podIP": "127.77.0.2"}), 11.0)
    pods._note("ADDED", pod("b"), 12.0)
    assert [life.came for life in pods.of(["job", "other"])["job"]] == [10.0, 12.0]
    assert pods.by_address["127.77.0.2"].assignment["generation"] == 2
    pods._note("DELETED", pod("a"), 13.0)
    assert [life.name for life in pods.present()] == ["b"]


def test_a_pretended_worker_says_what_an_agent_would(pods: PodLog) -> None:
    life = Life("a", "job", came=100.0)
    assert workers.status_of(life, 100.0) == WorkerStatus()
    life.assignment = WorkerStatus(generation=2, rank=0).model_dump() | {"leader": "x"}
    said = workers.status_of(life, 125.0)
    assert (said.generation, said.phase, said.progress.step) == (2, Phase.STEP, 1)
    pods.by_address["127.0.0.1"] = life
    with workers.answering(pods):
        url = f"http://127.0.0.1:{names.HTTP_PORT}/status"
        with urllib.request.urlopen(url, timeout=5) as answer:
            assert WorkerStatus.model_validate_json(answer.read()).rank == 0


def test_the_job_is_valid_and_the_other_pods_have_its_shape() -> None:
    job = PretrainJob.model_validate(pretrain_job("many"))
    assert job.spec.workers.replicas == 8
    spec = {"containers": [1], "nodeName": "x", "serviceAccountName": "default"}
    assert shape({"spec": spec}) == {"containers": [1]}


def test_the_table_has_both_and_the_ratio() -> None:
    results = [
        Result(name, [float(n) for n in range(100)], speed, 2.5, [1.0], 20.0, Usage(100.0, 9.0))
        for name, speed in (("operator", 90.0), ("job-controller", 100.0))
    ]
    text = tables(results, "command")
    assert "| job → last pod, p50 / p99 | 50.0 / 99.0 | 50.0 / 99.0 |" in text
    assert "90% of the Job controller's" in text


def test_this_process_has_cost_something() -> None:
    usage = Usage.of(os.getpid())
    assert usage.peak_mib > 10
    assert usage.cpu_seconds > 0


def test_what_the_operator_warned_of_is_told() -> None:
    said = "2026-01-01 10:00:00,000 {:<7} pretrain_operator.queue: {}\n"
    log = said.format("INFO", "WARNING is a word") + 30 * said.format("WARNING", "twice")
    assert complaints(log) == 20 * [said.format("WARNING", "twice").rstrip()]
