"""The claim of the checkpoint volume, and what is asked of a claim the user made.

A retained claim has no owner: it must outlive its job, whatever becomes of the operator.
"""

from collections.abc import Sequence
from typing import Any

from pretrain_api.job import ObjectMeta, PretrainJob
from pretrain_operator.resources.metadata import metadata, owner

Body = dict[str, Any]


def claim_name(job: PretrainJob) -> str | None:
    """Name of the claim the job writes to, or None if it has no checkpoint volume."""
    volume = job.spec.volumes.checkpoint
    if volume is None:
        return None
    return volume.claim_name or own_claim_name(job.metadata.name)


def own_claim_name(job_name: str) -> str:
    """Name of a claim made from a job's template."""
    return f"{job_name}-checkpoint"


def access_modes(job: PretrainJob) -> list[str]:
    """Access modes of a claim made from the template."""
    volume = job.spec.volumes.checkpoint
    if volume and volume.claim_template and volume.claim_template.access_modes:
        return list(volume.claim_template.access_modes)
    return ["ReadWriteMany" if job.spec.workers.max_size > 1 else "ReadWriteOnce"]


def build_claim(job: PretrainJob) -> dict[str, Any]:
    """Claim from ``volumes.checkpoint.claimTemplate``.

    Raises ValueError if the job has no such template.
    """
    volume = job.spec.volumes.checkpoint
    if volume is None or volume.claim_template is None:
        raise ValueError(f"{job.metadata.name} has no volumes.checkpoint.claimTemplate")
    template = volume.claim_template
    name = claim_name(job) or ""
    spec: dict[str, Any] = {
        "accessModes": access_modes(job),
        "resources": {"requests": {"storage": str(template.storage)}},
    }
    if template.storage_class_name is not None:
        spec["storageClassName"] = template.storage_class_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(job.metadata, name, owned=volume.retention == "Delete"),
        "spec": spec,
    }


def owners_for(job: ObjectMeta, retention: str, owners: Sequence[Body]) -> list[Body]:
    """Owner references of a claim with that ``retention``: the job comes or goes, others stay."""
    others = [other for other in owners if other.get("uid") != job.uid]
    if retention != "Delete":
        return others
    # An object has one controller at most.
    controlled = any(other.get("controller") for other in others)
    return [*others, owner(job) | {"controller": not controlled}]
