"""The workers of a job as one pod group of Kueue, which admits all of them together or none.

A job is in a queue if the label kueue.x-k8s.io/queue-name is on it, or in its pod template. Kueue
then holds the pods back by a scheduling gate until there is quota for as many as the group says it
has. A pod that takes another's place joins the same group and uses the quota it has; a group never
changes its size, so neither does a job in a queue (:mod:`pretrain_api.job` refuses bounds). Ended
pods may yet be replaced, for all Kueue knows: the quota is held until it is told otherwise.
"""

from collections.abc import Mapping
from typing import Any

from pretrain_api import names
from pretrain_api.job import PretrainJob

LABEL_GROUP = "kueue.x-k8s.io/pod-group-name"
ANNOTATION_SIZE = "kueue.x-k8s.io/pod-group-total-count"
ANNOTATION_RETRIABLE = "kueue.x-k8s.io/retriable-in-group"
NEVER_REPLACED = {ANNOTATION_RETRIABLE: "false"}


def group_labels(job: PretrainJob) -> dict[str, str]:
    """Labels of a pod in the job's group; none if the job is in no queue."""
    queue = job.queue
    if queue is None:
        return {}
    return {names.LABEL_QUEUE: queue, LABEL_GROUP: group_name(job)}


def group_name(job: PretrainJob) -> str:
    """Name of the group: a job of the same name is another one."""
    return f"{job.metadata.name}-{(job.metadata.uid or '')[:8]}".rstrip("-")


def group_annotations(job: PretrainJob) -> dict[str, str]:
    """Annotations of a pod in the job's group; none if the job is in no queue."""
    return {} if job.queue is None else {ANNOTATION_SIZE: str(job.spec.workers.replicas)}


def holds_quota(labels: Mapping[str, Any], annotations: Mapping[str, Any]) -> bool:
    """Whether a pod keeps quota for its group, even once it has ended."""
    return LABEL_GROUP in labels and annotations.get(ANNOTATION_RETRIABLE) != "false"
