"""``python -m pretrain_operator.smoketest``: what `helm test` runs, one tiny job from start to end.

It shows that the definition is there, that an operator serves the namespace, that nodes can pull
the trainer's image, and that a rank trains. No volume is involved, so any cluster will do.
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pretrain_api import names
from pretrain_api.status import JobPhase, JobStatus
from pretrain_operator.cluster import (
    Body,
    Cluster,
    ClusterError,
    ConflictError,
    HttpCluster,
    Kind,
    NotFoundError,
)
from pretrain_operator.logs import configure_logging

log = logging.getLogger(__name__)

STEPS = 3
POLL_SECONDS = 1.0
OURS = {"app.kubernetes.io/component": "smoke-test"}  # no other job is ever deleted
_OBJECT = TypeAdapter(Body)


class SmokeError(Exception):
    """The job did not complete; the message says how far it got."""


def build_job(name: str, namespace: str, pod_template: Body | None = None) -> Body:
    """A toy model on the sample text of the trainer's image, one worker with one process.

    ``pod_template`` is what the worker's pod needs to run in this cluster at all.
    """
    workers: Body = {
        # A quota on these refuses pods that don't name them.
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "3Gi"}},
    }
    if pod_template:
        workers["podTemplate"] = pod_template
    spec: dict[str, Any] = {
        "model": {
            "name": "llama3",
            "flavor": "debugmodel",
            "hfAssetsPath": f"{names.SAMPLE_DIR}/tokenizer",
        },
        "training": {
            "dataset": "text",
            "datasetPath": f"{names.SAMPLE_DIR}/text",
            "localBatchSize": 1,
            "seqLen": 64,
            "mixedPrecisionParam": "float32",  # CPUs without bfloat16 units emulate it
            "steps": STEPS,
        },
        "workers": workers,
        "activeDeadlineSeconds": 1800,  # if nobody is left to delete it
        "ttlSecondsAfterFinished": 600,
    }
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": namespace, "labels": {**OURS}},
        "spec": spec,
    }


def sentence(status: JobStatus) -> str:
    """How the job is, in one line."""
    said = [
        f"{each.type}={each.status} {each.reason}: {each.message}" for each in status.conditions
    ]
    return f"phase {status.phase}; " + ("; ".join(said) or "no operator has looked at it")


async def train(cluster: Cluster, job: Body, seconds: float) -> JobStatus:
    """Create the job, see it through and delete it, also if this task is cancelled meanwhile.

    Raises:
        SmokeError: it failed, was deleted, or did not complete within ``seconds``.
        ClusterError: the API server refuses it, or can't be reached.
    """
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    deadline = time.monotonic() + seconds
    try:
        await _create(cluster, job, deadline)
        return await _completion(cluster, namespace, name, deadline)
    finally:
        await _remove(cluster, namespace, name)


async def _create(cluster: Cluster, job: Body, deadline: float) -> None:
    """Create the job, in place of one that a test has left which was killed."""
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    while True:
        with contextlib.suppress(ConflictError):
            await cluster.create(Kind.JOB, namespace, job)
            return
        if not await _remove(cluster, namespace, name):
            raise SmokeError(
                f"{namespace}/{name} is there already, and no test has made it; delete it, or give "
                "the release another name"
            )
        if time.monotonic() > deadline:
            raise SmokeError(
                f"{namespace}/{name} of an earlier test is deleted, but does not go; see its "
                "finalizers"
            )
        await asyncio.sleep(POLL_SECONDS)


async def _remove(cluster: Cluster, namespace: str, name: str) -> bool:
    """Delete the job if a test has made it. False if it is somebody else's, which stays."""
    with contextlib.suppress(NotFoundError, ConflictError):  # gone meanwhile, or another one's name
        meta = (await cluster.get(Kind.JOB, namespace, name))["metadata"]
        if not OURS.items() <= (meta.get("labels") or {}).items():
            return False
        await cluster.delete(Kind.JOB, namespace, name, uid=meta["uid"])
    return True


async def _completion(cluster: Cluster, namespace: str, name: str, deadline: float) -> JobStatus:
    said = ""
    while True:
        try:
            body = await cluster.get(Kind.JOB, namespace, name)
        except NotFoundError as error:
            last = f"; its last word: {said}" if said else ""
            raise SmokeError(f"somebody has deleted {namespace}/{name}{last}") from error
        status = JobStatus.model_validate(body.get("status") or {})
        if (now := sentence(status)) != said:
            log.info("%s", said := now)
        if status.phase is JobPhase.COMPLETE:
            return status
        if status.phase is JobPhase.FAILED or time.monotonic() > deadline:
            raise SmokeError(said)
        await asyncio.sleep(POLL_SECONDS)


async def run(name: str, namespace: str, seconds: float, pod_template: Body) -> None:
    """Connect, train, report. Raises as :func:`train` does, and CancelledError after SIGTERM."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    # The first process of a container hears no SIGTERM that it doesn't handle, and the SIGKILL
    # after it would leave the job.
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        cluster = await HttpCluster.connect()
        try:
            status = await train(cluster, build_job(name, namespace, pod_template), seconds)
        finally:
            await cluster.close()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    loss = status.progress.loss if status.progress else None
    log.info("%s/%s trained %d steps, loss %s", namespace, name, STEPS, loss)


def _object(text: str) -> Body:
    """A JSON object of the command line. Raises ArgumentTypeError with a sentence."""
    try:
        return _OBJECT.validate_json(text)
    except ValidationError as error:
        raise argparse.ArgumentTypeError("must be a JSON object") from error


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 if the job completed, 1 with a sentence on stderr if not."""
    parser = argparse.ArgumentParser(prog="pretrain_operator.smoketest", description=__doc__)
    parser.add_argument("--name", default="pretrain-smoke-test")
    parser.add_argument("--namespace", required=True, help="one that the operator serves")
    # Less than the 15 minutes that the documents give Helm, so that the job is cleared away.
    parser.add_argument("--seconds", type=float, default=840, help="to wait for the end (840)")
    parser.add_argument(
        "--pod-template", type=_object, default={}, help="the job's workers.podTemplate, as JSON"
    )
    chosen = parser.parse_args(arguments)
    configure_logging("text", "INFO")
    try:
        asyncio.run(run(chosen.name, chosen.namespace, chosen.seconds, chosen.pod_template))
    except asyncio.CancelledError:
        print("error: told to end before the job was done; it is deleted", file=sys.stderr)
        return 1
    except (SmokeError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
