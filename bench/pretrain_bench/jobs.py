"""PretrainJobs of one namespace, for tests and measurements: apply, look, wait, compare."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain_api import names
from pretrain_api.wire import WorkerStatus
from pretrain_bench.client import ApiError, BenchError, Client, pods_path
from pretrain_demo.job import Snapshot, status_path
from pretrain_demo.target import DemoError, Target

POLL_SECONDS = 0.25
LOOK_SECONDS = 0.05  # where moments between steps matter

# A model that two busy cores train in a few steps per second: slow enough to be hit in the middle.
# The learning rate stays the same, so runs of different lengths agree for as long as both last.
# Workers prefer nodes of their own, which makes the loss of a node the loss of one worker.
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
    "lrScheduler": {"warmupSteps": 5, "decayRatio": 0.0},
    "metrics": {"logFreq": 1},
    "checkpoint": {"enable": True, "interval": 5, "lastSaveModelOnly": False, "keepLatestK": 3},
    "workers": {
        "replicas": 2,
        "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}},
        "podTemplate": {
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
            "terminationGracePeriodSeconds": 30,
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "ScheduleAnyway",
                }
            ],
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
    """PretrainJobs of one namespace of the devcluster."""

    target: Target
    namespace: str
    volumes: Path  # where the cluster keeps the folders behind its volumes
    client: Client

    # -- change ---------------------------------------------------------------------------------

    def kubectl(self, *words: str, text: str | None = None, check: bool = True) -> str:
        """Run kubectl in this namespace. Raises DemoError if it fails and ``check`` is set."""
        return self.target.kubectl(f"--namespace={self.namespace}", *words, text=text, check=check)

    def apply(self, name: str, **change: Any) -> None:
        """Apply a job: SPEC with ``change`` laid over it."""
        document = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name},
            "spec": merged(SPEC, change),
        }
        self.kubectl("apply", "-f", "-", text=json.dumps(document))

    def refused(self, name: str, **change: Any) -> str:
        """What the API server says to a job that it must refuse; BenchError if it takes it."""
        try:
            self.apply(name, **change)
        except DemoError as refusal:
            return str(refusal)
        raise BenchError(f"{name} was accepted")

    def patch(self, name: str, spec: dict[str, Any]) -> None:
        """Change a job's spec."""
        self.kubectl("patch", names.PLURAL, name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def delete(self, name: str) -> None:
        """Delete a job and wait until it is gone."""
        self.kubectl("delete", names.PLURAL, name, "--timeout=60s")

    # -- look -----------------------------------------------------------------------------------

    def path(self, name: str) -> str:
        """Where the API server keeps a job."""
        group = f"/apis/{names.API_VERSION}/namespaces/{self.namespace}"
        return f"{group}/{names.PLURAL}/{name}"

    def read(self, name: str) -> Snapshot:
        """A job as its status tells."""
        return Snapshot.parse(self.client.request("GET", self.path(name)))

    def hear(self, name: str) -> Snapshot:
        """The job as its leader sees it, seconds before the status tells."""
        job = self.read(name)
        leader = job.pod(0)
        if leader is None:
            return job
        try:
            return job.heard(self.client.ask(status_path(self.namespace, leader)))
        except ApiError:
            return job  # it is just starting, or gone

    def ask(self, pod: str) -> WorkerStatus | None:
        """What a worker says about itself; None if it doesn't answer."""
        try:
            answer = self.client.ask(status_path(self.namespace, pod))
        except ApiError:
            return None
        return WorkerStatus.model_validate_json(answer)

    def pods(self, name: str) -> list[dict[str, Any]]:
        """All pods of a job, those that have ended included."""
        selector = f"{names.LABEL_JOB}={name}"
        return self.client.get(pods_path(self.namespace, selector))["items"]

    def pod(self, name: str, index: int) -> str:
        """Name of the pod that is worker ``index`` now. Raises BenchError if there is none."""
        pod = self.read(name).pod(index)
        if pod is None:
            raise BenchError(f"{name} has no worker {index}")
        return pod

    def worker(self, name: str, index: int) -> dict[str, Any]:
        """The pod that is worker ``index`` now. Raises BenchError if there is none."""
        path = f"{pods_path(self.namespace)}/{self.pod(name, index)}"
        return self.client.get(path)

    # -- wait -----------------------------------------------------------------------------------

    def wait(
        self,
        name: str,
        until: Callable[[Snapshot], bool],
        seconds: float = 300,
        what: str = "what is waited for",
    ) -> Snapshot:
        """The job when a condition on its status first holds. Raises BenchError with the story."""
        return self._wait(name, self.read, until, seconds, POLL_SECONDS, what)

    def wait_heard(
        self, name: str, until: Callable[[Snapshot], bool], seconds: float = 300, what: str = ""
    ) -> Snapshot:
        """The same with the leader's own words, seen at the source instead of in the status."""
        return self._wait(name, self.hear, until, seconds, LOOK_SECONDS, what)

    def _wait(
        self,
        name: str,
        look: Callable[[str], Snapshot],
        until: Callable[[Snapshot], bool],
        seconds: float,
        pause: float,
        what: str,
    ) -> Snapshot:
        deadline = time.monotonic() + seconds
        while not until(job := look(name)):
            finished = job.holds(names.COMPLETE) or job.holds(names.FAILED)
            if time.monotonic() > deadline or (finished and not until(look(name))):
                raise BenchError(f"{name} never came to {what}\n{self.story(name)}")
            time.sleep(pause)
        return job

    def complete(self, name: str, seconds: float = 300) -> Snapshot:
        """The job when it is complete. Raises BenchError if it fails or takes too long."""
        return self.wait(name, lambda job: job.holds(names.COMPLETE), seconds, "its end")

    def failed(self, name: str, seconds: float = 300) -> Snapshot:
        """The job when it has failed. Raises BenchError if it completes or takes too long."""
        return self.wait(name, lambda job: job.holds(names.FAILED), seconds, "its failure")

    def wait_for_step(self, name: str, step: int, seconds: float = 300) -> Snapshot:
        """Until the leader has passed a step and the job trains."""
        return self.wait_heard(
            name,
            lambda job: job.leader is not None and job.step >= step,
            seconds,
            f"step {step}",
        )

    # -- compare --------------------------------------------------------------------------------

    def checkpoints(self, name: str) -> Path:
        """The checkpoint root of a job, seen from this machine."""
        claim = f"{name}-checkpoint"
        volume = self.kubectl("get", "pvc", claim, "-o", "jsonpath={.spec.volumeName}")
        return self.volumes / volume / "checkpoint"

    def saved(self, name: str) -> list[int]:
        """Steps of all committed checkpoints, ascending."""
        manifests = self.checkpoints(name).glob("step-*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests)

    def digests(self, name: str, step: int | None = None) -> dict[str, str]:
        """Digest of each section of a checkpoint: weights, optimizer, data, ledger and so on.

        Args:
            name: the job.
            step: which checkpoint; None is the newest one.
        """
        from pretrain_trainer.checkpoint import digest  # brings torch along

        root = self.checkpoints(name)
        return digest.digests(root / f"step-{self.saved(name)[-1] if step is None else step}")

    def story(self, name: str) -> str:
        """All there is to know about a job that went wrong."""
        selector = f"--selector={names.LABEL_JOB}={name}"
        parts = [
            self.kubectl("get", names.PLURAL, name, "-o", "yaml", check=False),
            self.kubectl("get", "pods", selector, "-o", "wide", check=False),
            self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False),
        ]
        for pod in self.kubectl("get", "pods", selector, "-o", "name", check=False).split():
            parts.append(f"--- log of {pod}")
            parts.append(self.kubectl("logs", pod, "--tail=60", check=False))
        operator = ("logs", "deployment/pretrain-operator", "--tail=60")
        parts.append(self.target.kubectl("--namespace=pretrain-system", *operator, check=False))
        return "\n".join(parts)
