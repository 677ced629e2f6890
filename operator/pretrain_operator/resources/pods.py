"""The worker pod: one container, the restricted profile, and what a trainer needs to live in it.

The root file system is read-only, so HOME, TMPDIR and caches are one scratch volume and
/dev/shm is a memory volume with a size. A pod is never restarted by the kubelet: whether and where
a worker runs again is decided with the whole job in view. The assignment is not in the pod as
created; it comes as an annotation once all members have an address.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain_api import names
from pretrain_api.job import PretrainJob
from pretrain_api.pod import PodTemplate, Resources
from pretrain_api.schema import Section
from pretrain_operator.resources.config import config_name
from pretrain_operator.resources.metadata import metadata
from pretrain_operator.resources.podgroup import group_annotations, group_labels
from pretrain_operator.resources.volumes import claim_name

Body = dict[str, Any]

DEFAULT_GRACE_SECONDS = 120  # to finish the step, save and leave
MAX_GRACE_SECONDS = 3600  # a node that is drained waits for it
SPARE_SECONDS = 30  # beyond what saves took so far: for the order to arrive and the pod to end
NODE_LOSS_SECONDS = 20  # after which a pod leaves a node that doesn't answer (default: 300)
SHM_SIZE = "1Gi"  # enough for the loaders and gloo; NCCL wants about 100 MiB per rank
SCRATCH = "pretrain-scratch"
SHM = "pretrain-shm"
CONFIG = "pretrain-config"
PODINFO = "pretrain-podinfo"
OUTPUT = "pretrain-output"


def pod_name(job_name: str, index: int, created_in: int) -> str:
    """Name of the pod of one worker, made in one generation."""
    return f"{job_name}-{index}-{created_in}"


def build_pod(job: PretrainJob, index: int, created_in: int, image: str, grace: int) -> Body:
    """Pod of worker ``index``, made for generation ``created_in``.

    ``image`` is used if the job names none; ``grace`` is what :func:`grace_seconds` says.
    """
    template = job.spec.workers.pod_template
    meta = metadata(job.metadata, pod_name(job.metadata.name, index, created_in))
    meta["labels"] = {
        **template.labels,
        **meta["labels"],
        **group_labels(job),
        "app.kubernetes.io/component": "worker",
        names.LABEL_WORKER: str(index),
        names.LABEL_GENERATION: str(created_in),
    }
    # Moving a worker for better packing costs a restart of everybody.
    keep = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    meta["annotations"] = {**keep, **template.annotations, **group_annotations(job)}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": _spec(job, image, grace)}


def _spec(job: PretrainJob, image: str, grace: int) -> Body:
    template = job.spec.workers.pod_template
    spec: Body = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # Torch looks up peers by name; a resolver that doesn't answer would cost 10 s each time.
        "dnsConfig": {
            "options": [{"name": "timeout", "value": "1"}, {"name": "attempts", "value": "1"}]
        },
        "terminationGracePeriodSeconds": grace,
        "securityContext": _pod_security(),
        "tolerations": _tolerations(template),
        "containers": [_container(job, image, grace)],
        "volumes": _volumes(job),
    }
    return spec | _scheduling(job)


def grace_seconds(job: PretrainJob, save: float | None, step: float | None) -> int:
    """Seconds from SIGTERM to SIGKILL: the user's, or what it takes to save and leave.

    ``save`` and ``step`` are the seconds the last of each took; twice that leaves room for a slow
    one, and for one of each that had just begun.
    """
    chosen = job.spec.workers.pod_template.termination_grace_period_seconds
    if chosen:
        return chosen
    measured = 2 * (save or 0.0) + 2 * (step or 0.0) + SPARE_SECONDS
    return min(max(DEFAULT_GRACE_SECONDS, math.ceil(measured)), MAX_GRACE_SECONDS)


def _pod_security() -> Body:
    return {
        "runAsNonRoot": True,
        "runAsUser": names.USER_ID,
        "runAsGroup": names.USER_ID,
        "fsGroup": names.USER_ID,
        # Changing the owner of every file of a big volume at each start would take minutes.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container(job: PretrainJob, image: str, grace: int) -> Body:
    workers = job.spec.workers
    container: Body = {
        "name": names.CONTAINER,
        "image": workers.image or image,
        "command": ["python", "-m", "pretrain_agent"],
        "env": [*_environment(job, grace), *_plain(workers.pod_template.env)],
        "ports": [
            {"name": "http", "containerPort": names.HTTP_PORT, "protocol": "TCP"},
            {"name": "meeting", "containerPort": names.MEETING_PORT, "protocol": "TCP"},
        ],
        "resources": _resources(workers.resources),
        "readinessProbe": {
            "httpGet": {"path": "/readyz", "port": names.HTTP_PORT},
            "initialDelaySeconds": 2,
            "periodSeconds": 1,
            "timeoutSeconds": 2,
            "failureThreshold": 5,
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "File",
        "volumeMounts": [*_mounts(job), *_plain(workers.pod_template.volume_mounts)],
    }
    if workers.pod_template.image_pull_policy:
        container["imagePullPolicy"] = workers.pod_template.image_pull_policy
    return container


def _environment(job: PretrainJob, grace: int) -> list[Body]:
    scratch = names.SCRATCH_DIR
    fixed: Mapping[str, str] = {
        names.ENV_CONFIG: f"{names.CONFIG_DIR}/{names.CONFIG_FILE}",
        names.ENV_ASSIGNMENT: f"{names.PODINFO_DIR}/{names.ASSIGNMENT_FILE}",
        names.ENV_PROCESSES: str(job.spec.workers.processes_per_worker),
        names.ENV_HTTP_PORT: str(names.HTTP_PORT),
        names.ENV_MEETING_PORT: str(names.MEETING_PORT),
        names.ENV_TERMINATION_LOG: "/dev/termination-log",
        names.ENV_GRACE_SECONDS: str(grace),
        names.ENV_JOB_NAME: job.metadata.name,
        names.ENV_JOB_UID: job.metadata.uid or "",
        "HOME": scratch,
        "TMPDIR": f"{scratch}/tmp",
        "XDG_CACHE_HOME": f"{scratch}/cache",
        "TRITON_CACHE_DIR": f"{scratch}/cache/triton",
        "HF_HOME": f"{scratch}/cache/huggingface",
    }
    fields = {
        names.ENV_HOST: "status.podIP",
        names.ENV_NAMESPACE: "metadata.namespace",
        names.ENV_POD_NAME: "metadata.name",
    }
    return [
        *({"name": name, "value": value} for name, value in fixed.items()),
        *(
            {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
            for name, path in fields.items()
        ),
    ]


def _resources(resources: Resources) -> Body:
    """Requests and limits as text; what has a limit and no request requests its limit."""
    limits = {name: str(amount) for name, amount in resources.limits.items()}
    requests = {name: str(amount) for name, amount in resources.requests.items()}
    return {
        key: amounts
        for key, amounts in (("limits", limits), ("requests", limits | requests))
        if amounts
    }


def _volumes(job: PretrainJob) -> list[Body]:
    claim = claim_name(job)
    output: Body = {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {}}
    annotation = f"metadata.annotations['{names.ANNOTATION_ASSIGNMENT}']"
    podinfo = [{"path": names.ASSIGNMENT_FILE, "fieldRef": {"fieldPath": annotation}}]
    return [
        {"name": SCRATCH, "emptyDir": {}},
        {"name": SHM, "emptyDir": {"medium": "Memory", "sizeLimit": SHM_SIZE}},
        {"name": CONFIG, "configMap": {"name": config_name(job.metadata.name)}},
        {"name": PODINFO, "downwardAPI": {"items": podinfo}},
        {"name": OUTPUT, **output},
        *_plain(job.spec.workers.pod_template.volumes),
    ]


def _mounts(job: PretrainJob) -> list[Body]:
    volume = job.spec.volumes.checkpoint
    output: Body = {"name": OUTPUT, "mountPath": names.OUTPUT_DIR}
    if volume and volume.sub_path:
        output["subPath"] = volume.sub_path
    return [
        {"name": SCRATCH, "mountPath": names.SCRATCH_DIR},
        # Libraries that ignore TMPDIR write to /tmp.
        {"name": SCRATCH, "mountPath": "/tmp", "subPath": "tmp"},
        {"name": SHM, "mountPath": "/dev/shm"},
        {"name": CONFIG, "mountPath": names.CONFIG_DIR, "readOnly": True},
        {"name": PODINFO, "mountPath": names.PODINFO_DIR, "readOnly": True},
        output,
    ]


def _tolerations(template: PodTemplate) -> list[Body]:
    """The user's, and a short stay on lost nodes unless the user says otherwise."""
    own = _plain(template.tolerations)
    chosen = {toleration.get("key") for toleration in own}
    lost = [
        {
            "key": key,
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": NODE_LOSS_SECONDS,
        }
        for key in ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
        if key not in chosen
    ]
    return [*own, *lost]


def _scheduling(job: PretrainJob) -> Body:
    template = job.spec.workers.pod_template
    chosen: Body = {
        "nodeSelector": dict(template.node_selector),
        "affinity": _plain_one(template.affinity) if template.affinity else {},
        "topologySpreadConstraints": _spread(job),
        "priorityClassName": template.priority_class_name,
        "runtimeClassName": template.runtime_class_name,
        "schedulerName": template.scheduler_name,
        "imagePullSecrets": _plain(template.image_pull_secrets),
    }
    return {key: value for key, value in chosen.items() if value}


def avoiding(pod: Body, nodes: Sequence[str]) -> Body:
    """``pod`` with a preference for other nodes than these.

    A node that has just lost its power is ready for most of a minute as far as the scheduler knows,
    and has all the room that was its pod's. A preference only: there may be no other node, and this
    one may be well.
    """
    if not nodes:
        return pod
    other = {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": [*nodes]}]}
    affinity = pod["spec"].get("affinity", {})
    of_nodes = affinity.get("nodeAffinity", {})
    key = "preferredDuringSchedulingIgnoredDuringExecution"
    wishes = [*of_nodes.get(key, []), {"weight": 100, "preference": other}]
    affinity = {**affinity, "nodeAffinity": {**of_nodes, key: wishes}}
    return {**pod, "spec": {**pod["spec"], "affinity": affinity}}


def _spread(job: PretrainJob) -> list[Body]:
    mine = {"matchLabels": {names.LABEL_JOB_UID: job.metadata.uid or ""}}
    constraints = _plain(job.spec.workers.pod_template.topology_spread_constraints)
    return [{"labelSelector": mine} | constraint for constraint in constraints]


def _plain(sections: Sequence[Section]) -> list[Body]:
    return [_plain_one(section) for section in sections]


def _plain_one(section: Section) -> Body:
    """Camel case, as Kubernetes spells it, without what the user left unset."""
    return section.model_dump(mode="json", by_alias=True, exclude_none=True)
