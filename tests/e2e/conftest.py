"""Jobs on the real cluster: one installation per session, one namespace per test module."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain_api import names
from pretrain_demo.console import Console
from pretrain_demo.install import ensure_namespace, install
from pretrain_demo.job import Snapshot, status_path
from pretrain_demo.target import DemoError, Target, devcluster
from pretrain_devcluster import Cluster
from pretrain_devcluster.layout import Layout

# A model that two busy cores train in a few steps per second: slow enough to be hit in the middle.
SPEC: dict[str, Any] = {
    "model": {
        "name": "llama3",
        "flavor": "debugmodel",
        "hfAssetsPath": f"{names.SAMPLE_DIR}/tokenizer",
    },
    "training": {
        "dataset": "text",
        "datasetPath": f"{names.SAMPLE_DIR}/text",
        "localBatchSize": 2,
        "globalBatchSize": 4,
        "seqLen": 64,
        "steps": 60,
        "seed": 3,
        "mixedPrecisionParam": "float32",
    },
    "lrScheduler": {"warmupSteps": 5},
    "metrics": {"logFreq": 1},
    "checkpoint": {"enable": True, "interval": 5, "lastSaveModelOnly": False, "keepLatestK": 3},
    "workers": {
        "replicas": 2,
        "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}},
        "podTemplate": {
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
            "terminationGracePeriodSeconds": 30,
        },
    },
    "recovery": {"backoffSeconds": 1},
    "volumes": {"checkpoint": {"claimTemplate": {"storage": "1Gi"}, "retention": "Delete"}},
}


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``change`` laid over it, key by key at every depth; None removes a key."""
    result = dict(base)
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


@dataclass(frozen=True)
class Jobs:
    """PretrainJobs of one namespace."""

    target: Target
    namespace: str
    volumes: Path  # where the cluster keeps the folders behind its volumes

    def kubectl(self, *words: str, text: str | None = None, check: bool = True) -> str:
        return self.target.kubectl(f"--namespace={self.namespace}", *words, text=text, check=check)

    def manifest(self, name: str, change: dict[str, Any]) -> str:
        return json.dumps(
            {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "metadata": {"name": name},
                "spec": merged(SPEC, change),
            }
        )

    def apply(self, name: str, **change: Any) -> None:
        self.kubectl("apply", "-f", "-", text=self.manifest(name, change))

    def refused(self, name: str, **change: Any) -> str:
        """What the API server says to a job that it must refuse."""
        with pytest.raises(DemoError) as refusal:
            self.apply(name, **change)
        return str(refusal.value)

    def patch(self, name: str, spec: dict[str, Any]) -> None:
        self.kubectl("patch", names.PLURAL, name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def delete(self, name: str) -> None:
        self.kubectl("delete", names.PLURAL, name, "--timeout=60s")

    def read(self, name: str) -> Snapshot:
        return Snapshot.parse(self.kubectl("get", names.PLURAL, name, "-o", "json"))

    def wait(self, name: str, until: Callable[[Snapshot], bool], seconds: float = 600) -> Snapshot:
        """The job as it is when a condition first holds; tells everything when it never does."""
        deadline = time.monotonic() + seconds
        while not until(job := self.read(name)):
            finished = job.holds(names.COMPLETE) or job.holds(names.FAILED)
            if time.monotonic() > deadline or (finished and not until(self.read(name))):
                pytest.fail(f"{name} never came to what the test waits for\n{self.story(name)}")
            time.sleep(0.5)
        return job

    def complete(self, name: str, seconds: float = 600) -> Snapshot:
        return self.wait(name, lambda job: job.holds(names.COMPLETE), seconds)

    def failed(self, name: str, seconds: float = 600) -> Snapshot:
        return self.wait(name, lambda job: job.holds(names.FAILED), seconds)

    def pods(self, name: str) -> list[dict[str, Any]]:
        selector = f"--selector={names.LABEL_JOB}={name}"
        return json.loads(self.kubectl("get", "pods", selector, "-o", "json"))["items"]

    def pod(self, name: str, index: int) -> str:
        """Name of the pod that is worker ``index`` now."""
        pod = self.read(name).pod(index)
        assert pod is not None
        return pod

    def hear(self, name: str) -> Snapshot:
        """The job as its leader sees it, seconds before the status tells."""
        path = status_path(self.namespace, self.pod(name, 0))
        return self.read(name).heard(self.target.kubectl("get", "--raw", path, check=False))

    def wait_for_step(self, name: str, step: int, seconds: float = 600) -> None:
        """Until the leader has passed a step, seen at the source instead of in the status."""
        deadline = time.monotonic() + seconds
        self.wait(name, lambda job: job.holds(names.RUNNING), seconds)
        while (job := self.hear(name)).step < step:
            if time.monotonic() > deadline or job.holds(names.COMPLETE):
                pytest.fail(f"{name} was never seen after step {step}\n{self.story(name)}")
            time.sleep(0.1)

    def checkpoints(self, name: str) -> Path:
        """The checkpoint root of a job, seen from this machine."""
        claim = f"{name}-checkpoint"
        volume = self.kubectl("get", "pvc", claim, "-o", "jsonpath={.spec.volumeName}")
        return self.volumes / volume / "checkpoint"

    def digests(self, name: str) -> dict[str, str]:
        """Digest of each section of the newest good checkpoint."""
        root = str(self.checkpoints(name))
        text = subprocess.run(
            [sys.executable, "-m", "pretrain_trainer.checkpoint.digest", root],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        return dict(line.split(" ", 1) for line in text.splitlines())

    def story(self, name: str) -> str:
        """All there is to know about a job that went wrong."""
        selector = f"--selector={names.LABEL_JOB}={name}"
        parts = [
            self.kubectl("get", names.PLURAL, name, "-o", "yaml", check=False),
            self.kubectl("get", "pods", selector, "-o", "wide", check=False),
            self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False),
        ]
        for pod in self.pods(name):
            pod_name = pod["metadata"]["name"]
            parts.append(f"--- log of {pod_name}")
            parts.append(self.kubectl("logs", pod_name, "--tail=60", check=False))
        operator = ("logs", "deployment/pretrain-operator", "--tail=60")
        parts.append(self.target.kubectl("--namespace=pretrain-system", *operator, check=False))
        return "\n".join(parts)


@pytest.fixture(scope="session")
def target() -> Target:
    """The cluster of this machine, with both images as they are in the tree and the operator."""
    found = devcluster(os.environ, Layout.default())
    install(found, Console())
    return found


@pytest.fixture(scope="session")
def cluster(target: Target) -> Cluster:
    assert target.own
    return Cluster.current()


@pytest.fixture(scope="module")
def jobs(target: Target, cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Jobs]:
    """A namespace that admits restricted pods only."""
    namespace = request.module.__name__.rpartition(".")[2].replace("_", "-")
    target.kubectl("delete", "namespace", namespace, "--ignore-not-found", "--timeout=120s")
    ensure_namespace(target, namespace)
    yield Jobs(target, namespace, cluster.layout.volumes)
    target.kubectl("delete", "namespace", namespace, "--wait=false")
