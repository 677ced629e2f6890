"""Bad input: one clear sentence, no pod or a permanent failure, never a crash loop."""

import json
from typing import Any

import pytest

from pretrain_api import names

pytestmark = pytest.mark.cluster

CLAIM = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "later"},
    "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
}
ON_CLAIM = {"checkpoint": {"claimTemplate": None, "retention": None, "claimName": "later"}}


def pods(**template: Any) -> dict[str, Any]:
    return {"workers": {"podTemplate": template}}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"training": {"localBatchsize": 2}}, "localBatchsize"),
        ({"modle": {"name": "llama3"}}, "modle"),
        ({"training": {"seqLen": -1}}, "seqLen"),
        ({"parallelism": {"dataParallelShardDegree": 3}}, "dataParallelShardDegree"),
        ({"training": {"globalBatchSize": 3}}, "globalBatchSize"),
        (pods(securityContext={"privileged": True}), "securityContext"),
        (pods(volumes=[{"name": "node", "hostPath": {"path": "/etc"}}]), "hostPath"),
        (pods(volumeMounts=[{"name": "x", "mountPath": "/var/pretrain/output"}]), "mountPath"),
    ],
    ids=["misspelt", "unknown", "negative", "degrees", "batch", "privileged", "node", "mount"],
)
def test_the_api_server_refuses(jobs: Any, change: dict[str, Any], word: str) -> None:
    assert word in jobs.refused("refused", **change)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("no-data", {"training": {"datasetPath": "/data/nowhere"}}, "/data/nowhere"),
        ("no-tokenizer", {"model": {"hfAssetsPath": "/data/tokenizer"}}, "/data/tokenizer"),
        ("bad-data", {"training": {"datasetPath": "/opt/pretrain/sample/tokenizer"}}, "tokenizer"),
        ("bad-tokenizer", {"model": {"hfAssetsPath": "/opt/pretrain/sample/text"}}, "text"),
    ],
)
def test_what_only_a_worker_can_see_fails_the_job_for_good(
    jobs: Any, name: str, change: dict[str, Any], words: str
) -> None:
    jobs.apply(name, **change)
    job = jobs.failed(name)
    assert words in job.reason(names.FAILED)
    assert job.restarts == 0
    assert job.generation <= 1


def test_a_missing_claim_waits_and_heals(jobs: Any) -> None:
    jobs.apply("early", volumes=ON_CLAIM, training={"steps": 3})
    job = jobs.wait("early", lambda job: "later" in str(job.status.conditions))
    assert jobs.pods("early") == []
    assert not job.holds(names.FAILED)
    jobs.kubectl("apply", "-f", "-", text=json.dumps(CLAIM))
    jobs.complete("early")


def test_a_foreign_checkpoint_root_is_left_alone(jobs: Any) -> None:
    jobs.apply("intruder", volumes=ON_CLAIM, training={"steps": 3})
    job = jobs.failed("intruder")
    assert "checkpoint" in job.reason(names.FAILED)
    assert job.restarts == 0
