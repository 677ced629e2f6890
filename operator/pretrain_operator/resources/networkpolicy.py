"""One network policy per job: its workers reach each other, others only the status port.

Ranks listen on ports they choose themselves, and neither the store nor the collectives know who is
calling. Whether a policy is enforced depends on the network plug-in; behind it, at the meeting
point alone, stands the nonce.
"""

from collections.abc import Sequence
from typing import Any

from pretrain_api import names
from pretrain_api.job import PretrainJob
from pretrain_operator.resources.metadata import metadata


def policy_name(job_name: str) -> str:
    """Name of the job's network policy."""
    return f"{job_name}-workers"


def build_policy(job: PretrainJob, peers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Network policy; ``peers`` may read status and metrics, no peers means everybody may."""
    workers = {"matchLabels": {names.LABEL_JOB_UID: job.metadata.uid or ""}}
    status: dict[str, Any] = {"ports": [{"port": names.HTTP_PORT, "protocol": "TCP"}]}
    if peers:
        status["from"] = list(peers)
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(job.metadata, policy_name(job.metadata.name)),
        "spec": {
            "podSelector": workers,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": workers}]}, status],
        },
    }
