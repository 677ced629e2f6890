"""Labels and owner references, the same on every child."""

from typing import Any

from pretrain_api import names
from pretrain_api.job import ObjectMeta

Body = dict[str, Any]


def labels(job: ObjectMeta) -> dict[str, str]:
    """Labels of every child; the UID tells children of a job from its namesake's."""
    return {
        "app.kubernetes.io/name": "pretrain",
        "app.kubernetes.io/instance": job.name,
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_JOB: job.name,
        names.LABEL_JOB_UID: job.uid or "",
    }


def owner(job: ObjectMeta) -> Body:
    """Owner reference: the garbage collector deletes the child with the job."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": job.name,
        "uid": job.uid or "",
        "controller": True,
        "blockOwnerDeletion": False,
    }


def metadata(job: ObjectMeta, name: str, *, owned: bool = True) -> Body:
    """Metadata of a child of ``job``."""
    meta: Body = {"name": name, "namespace": job.namespace or "default", "labels": labels(job)}
    if owned:
        meta["ownerReferences"] = [owner(job)]
    return meta
