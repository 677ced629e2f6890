"""``python -m pretrain_operator.smoketest``: what `helm test` runs, one tiny job from start to end.

It shows that the definition is there, that an operator serves the namespace, that nodes can pull
the trainer's image, and that a rank trains. No volume is involved, so any cluster will do.
"""

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from pretrain_api import names
from pretrain_api.status import JobPhase, JobStatus
from pretrain_operator.cluster import Body, Cluster, ClusterError, HttpCluster, Kind
from pretrain_operator.logs import configure_logging

log = logging.getLogger(__name__)

STEPS = 3
POLL_SECONDS = 1.0


class SmokeError(Exception):
    """The job did not complete; the message says how far it got."""


def build_job(name: str, namespace: str) -> Body:
    """A toy model on the sample text of the trainer's image, one worker with one process."""
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
            "steps": STEPS,
        },
        "activeDeadlineSeconds": 1800,  # if nobody is left to delete it
        "ttlSecondsAfterFinished": 600,
    }
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def sentence(status: JobStatus) -> str:
    """How the job is, in one line."""
    said = [
        f"{each.type}={each.status} {each.reason}: {each.message}" for each in status.conditions
    ]
    return f"phase {status.phase}; " + ("; ".join(said) or "no operator has looked at it")


async def train(cluster: Cluster, job: Body, seconds: float) -> JobStatus:
    """Create the job, see it through and delete it.

    Raises:
        SmokeError: it failed, or did not complete within ``seconds``.
        ClusterError: the API server refuses it, or can't be reached.
    """
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    await cluster.create(Kind.JOB, namespace, job)
    try:
        return await _completion(cluster, namespace, name, time.monotonic() + seconds)
    finally:
        await cluster.delete(Kind.JOB, namespace, name)


async def _completion(cluster: Cluster, namespace: str, name: str, deadline: float) -> JobStatus:
    said = ""
    while True:
        body = await cluster.get(Kind.JOB, namespace, name)
        status = JobStatus.model_validate(body.get("status") or {})
        if (now := sentence(status)) != said:
            log.info("%s", said := now)
        if status.phase is JobPhase.COMPLETE:
            return status
        if status.phase is JobPhase.FAILED or time.monotonic() > deadline:
            raise SmokeError(said)
        await asyncio.sleep(POLL_SECONDS)


async def run(name: str, namespace: str, seconds: float) -> None:
    """Connect, train, report. Raises as :func:`train` does."""
    cluster = await HttpCluster.connect()
    try:
        status = await train(cluster, build_job(name, namespace), seconds)
    finally:
        await cluster.close()
    loss = status.progress.loss if status.progress else None
    log.info("%s/%s trained %d steps, loss %s", namespace, name, STEPS, loss)


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 if the job completed, 1 with a sentence on stderr if not."""
    parser = argparse.ArgumentParser(prog="pretrain_operator.smoketest", description=__doc__)
    parser.add_argument("--name", default="pretrain-smoke-test")
    parser.add_argument("--namespace", required=True, help="one that the operator serves")
    parser.add_argument("--seconds", type=float, default=600, help="to wait for the end (600)")
    chosen = parser.parse_args(arguments)
    configure_logging("text", "INFO")
    try:
        asyncio.run(run(chosen.name, chosen.namespace, chosen.seconds))
    except (SmokeError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
