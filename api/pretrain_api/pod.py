"""What a user may say about worker pods: an allow-list, never a whole pod template.

The operator creates pods with rights its users may not have. Whatever could raise a pod's privilege
(host paths, host namespaces, security contexts, another service account, tokens in projected
volumes) is therefore not in the schema at all, and names the operator relies on are reserved.
"""

import re
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, Field, JsonValue, StringConstraints

from pretrain_api.schema import (
    CLIMBS,
    LEAVES,
    NonNegative,
    PathText,
    Positive,
    Rule,
    Section,
    alias,
    cel_mismatch,
)

MAX_ENTRIES = 32  # of labels, tolerations, volumes, ...
MAX_ENV = 128

DNS_LABEL: Final = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
DNS_NAME: Final = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
QUANTITY: Final = r"^([0-9]+|[0-9]+\.[0-9]+)(m|[kMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?$"

DnsLabel = Annotated[str, StringConstraints(pattern=DNS_LABEL, max_length=63)]
DnsName = Annotated[str, StringConstraints(pattern=DNS_NAME, max_length=253)]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=253)]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=253)]
LabelKey = Annotated[
    str,
    StringConstraints(
        pattern=r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
    ),
]
LabelValue = Annotated[
    str, StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")
]
Quantity = Annotated[str, StringConstraints(pattern=QUANTITY, max_length=32)] | NonNegative
Quantities = Annotated[dict[ShortText, Quantity], Field(max_length=32)]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=MAX_ENTRIES)]
Annotations = Annotated[
    dict[LabelKey, Annotated[str, StringConstraints(max_length=16_384)]],
    Field(max_length=MAX_ENTRIES),
]
FreeForm = dict[str, Any]

# What the operator, the agent and torchrun set themselves, and what would change which code runs.
RESERVED_ENV_PREFIXES: Final = ("PRETRAIN_", "PET_", "TORCHELASTIC_")
RESERVED_ENV: Final = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT", "HOME", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH",
    "LD_PRELOAD", "LD_LIBRARY_PATH",
)  # fmt: skip
_RESERVED_ENV = re.compile(
    "^(" + "|".join((*(f"{p}.*" for p in RESERVED_ENV_PREFIXES), *RESERVED_ENV)) + ")$"
)
# Queues and topology hints of the usual schedulers live under these and stay allowed.
_RESERVED_LABEL = re.compile(
    r"^(([-a-z0-9.]*\.)?pretrain\.dev/.*|app\.kubernetes\.io/(name|instance|managed-by)"
    r"|batch\.kubernetes\.io/.*|pod-security\.kubernetes\.io/.*"
    r"|kueue\.x-k8s\.io/(pod-group-.*|retriable-in-group|managed))$"
)
# Annotations that kubelets, runtimes and older API servers read as settings of a pod's confinement.
_RESERVED_ANNOTATION = re.compile(
    _RESERVED_LABEL.pattern
    + r"|^(container\.)?(apparmor|seccomp)\.security\.(alpha|beta)\.kubernetes\.io/.*$"
    r"|^io\.(kubernetes\.cri-o|containerd)[./].*$"
)
_RESERVED_KEYS = {"labels": _RESERVED_LABEL, "annotations": _RESERVED_ANNOTATION}
# Directories of the worker's own volumes; a mount over one would replace what it needs.
_RESERVED_MOUNT = re.compile(
    r"^/(etc|var|opt|usr|home)?/?$|^/((etc|var|opt)/pretrain|dev|proc|sys|tmp)(/.*)?$"
)


class Resources(Section):
    """Requests and limits of a worker, as in a container."""

    limits: Quantities = Field(default_factory=dict)
    """Most that a worker may use of each resource, such as nvidia.com/gpu: 8 or memory: 512Gi."""
    requests: Quantities = Field(default_factory=dict)
    """What a worker is sure to get of each resource. An entry that is missing equals its limit."""


class KeyRef(Section):
    """One key of a Secret or ConfigMap in the job's namespace."""

    name: DnsName
    """Name of the Secret or ConfigMap."""
    key: ShortText
    """Key of the entry within the Secret or ConfigMap."""
    optional: bool = False
    """Start even if the object or the key is missing."""


class FieldRef(Section):
    """A field of the pod itself."""

    field_path: ShortText
    """Path of the field in the pod, such as spec.nodeName."""


def one_of(*names: str) -> Rule:
    """Exactly one of the optional fields is set."""
    spelled = [alias(name) for name in names]
    return Rule(
        cel="[" + ", ".join(f"has(self.{name})" for name in spelled) + "].filter(x, x).size() == 1",
        message=f"needs exactly one of {', '.join(spelled)}",
        holds=lambda section: sum(getattr(section, n) is not None for n in names) == 1,
    )


class EnvSource(Section):
    """Where the value of a variable comes from."""

    secret_key_ref: KeyRef | None = None
    """Take the value of one key of a Secret."""
    config_map_key_ref: KeyRef | None = None
    """Take the value of one key of a ConfigMap."""
    field_ref: FieldRef | None = None
    """Take the value of a field of the pod."""

    rules: ClassVar = (one_of("secret_key_ref", "config_map_key_ref", "field_ref"),)


class EnvVar(Section):
    """An environment variable of every process of a worker."""

    name: EnvName
    """Name of the environment variable."""
    value: Annotated[str, StringConstraints(max_length=16_384)] | None = None
    """Text the variable is set to. Unset, and without valueFrom, it is empty."""
    value_from: EnvSource | None = None
    """Where the variable's value comes from, in place of value."""

    rules: ClassVar = (
        Rule(
            cel="!(has(self.value) && has(self.valueFrom))",
            message="set value or valueFrom, not both",
            holds=lambda e: e.value is None or e.value_from is None,
        ),
        Rule(
            cel=cel_mismatch(_RESERVED_ENV, "self.name"),
            message="this name is set by the operator or changes which code runs; choose another",
            holds=lambda e: not _RESERVED_ENV.match(e.name),
            path="name",
            explain=lambda e: (
                f"{e.name} is set by the operator or changes which code runs; remove it"
            ),
        ),
    )


def _unique_names(items: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [item.name for item in items]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is there more than once; names must differ")
    return items


# The API server keeps lists of this type unique by name, and merges them item by item.
_BY_NAME: Final[dict[str, JsonValue]] = {
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["name"],
}


class ObjectName(Section):
    """A reference to an object in the job's namespace."""

    name: DnsName
    """Name of the object in the job's namespace."""


class Toleration(Section):
    """A taint the workers' nodes may have."""

    key: LabelKey | None = None
    """Key of the taint that is put up with. Unset, with operator Exists, is every taint."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Equal: key and value are those of the taint. Exists: the key is, whatever its value."""
    value: LabelValue = ""
    """Value of the taint, for operator Equal. Unset is the empty value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint that is put up with. Unset is every effect."""
    toleration_seconds: NonNegative | None = None
    """Seconds a worker stays on a node that gets a NoExecute taint. Unset is for ever."""

    rules: ClassVar = (
        Rule(
            path="key",
            cel="has(self.key) || (has(self.operator) && self.operator == 'Exists')",
            message="is missing; only operator Exists can do without",
            holds=lambda t: t.key is not None or t.operator == "Exists",
        ),
        Rule(
            path="value",
            cel="!(has(self.operator) && self.operator == 'Exists') || !has(self.value) || "
            "self.value == ''",
            message="has no meaning with operator Exists; remove it",
            holds=lambda t: t.operator != "Exists" or t.value == "",
        ),
        Rule(
            path="toleration_seconds",
            cel="!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            message="has a meaning with effect NoExecute only; remove it",
            holds=lambda t: t.toleration_seconds is None or t.effect == "NoExecute",
        ),
    )


class Affinity(Section):
    """Which nodes and which neighbours workers prefer or need; as in a pod."""

    node_affinity: FreeForm | None = None
    """Nodes, as in a pod's spec.affinity.nodeAffinity."""
    pod_affinity: FreeForm | None = None
    """Neighbours to seek, as in a pod's spec.affinity.podAffinity."""
    pod_anti_affinity: FreeForm | None = None
    """Neighbours to avoid, as in a pod's spec.affinity.podAntiAffinity."""


class TopologySpread(Section):
    """How workers are spread over zones, racks or nodes. Unset labelSelector means this job's."""

    max_skew: Positive = 1
    """Largest difference in the number of workers between two domains."""
    topology_key: LabelKey
    """Label of nodes whose values are the domains, such as topology.kubernetes.io/zone."""
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = "DoNotSchedule"
    """What to do with a worker that can't be placed that evenly: wait, or place it anyway."""
    min_domains: Positive | None = None
    """Number of domains there must be at least. Unset asks for none in particular."""
    label_selector: FreeForm | None = None
    """Selects the pods that are counted in each domain. Unset is this job's workers."""


class ConfigMapSource(Section):
    """Files from a ConfigMap."""

    name: DnsName
    """Name of the ConfigMap in the job's namespace."""
    optional: bool = False
    """Start even if the ConfigMap is missing."""


class SecretSource(Section):
    """Files from a Secret."""

    secret_name: DnsName
    """Name of the Secret in the job's namespace."""
    optional: bool = False
    """Start even if the Secret is missing."""


class EmptyDirSource(Section):
    """An empty folder that lives as long as the pod."""

    medium: Literal["", "Memory"] = ""
    """Where the folder lies: Memory, or the node's disk if unset."""
    size_limit: Quantity | None = None
    """Most bytes the folder may hold, usually with a unit, such as 10Gi. Unset is no limit."""


class ClaimSource(Section):
    """A claim in the job's namespace, such as one with training data."""

    claim_name: DnsName
    """Name of the PersistentVolumeClaim in the job's namespace."""
    read_only: bool = False
    """Mount the claim without the right to write."""


class DownwardItem(Section):
    """One file with a field of the pod."""

    path: PathText
    """Path of the file within the volume."""
    field_ref: FieldRef
    """The field of the pod whose value the file holds."""


class DownwardSource(Section):
    """Files with fields of the pod itself."""

    items: Annotated[tuple[DownwardItem, ...], Field(strict=False, max_length=MAX_ENTRIES)] = ()
    """One file for each field of the pod."""


class Volume(Section):
    """A further volume of the workers. Only kinds that can't reach the node are in the schema."""

    name: DnsLabel
    """Name by which volumeMounts refer to this volume."""
    config_map: ConfigMapSource | None = None
    """The volume holds a file for each key of a ConfigMap."""
    secret: SecretSource | None = None
    """The volume holds a file for each key of a Secret."""
    empty_dir: EmptyDirSource | None = None
    """An empty folder that lives as long as the pod."""
    persistent_volume_claim: ClaimSource | None = None
    """The volume of a PersistentVolumeClaim in the job's namespace."""
    downward_api: DownwardSource | None = None
    """The volume holds files with fields of the pod itself."""

    rules: ClassVar = (
        one_of("config_map", "secret", "empty_dir", "persistent_volume_claim", "downward_api"),
        Rule(
            cel="!self.name.startsWith('pretrain-')",
            message="names that begin with pretrain- are the operator's; choose another",
            holds=lambda v: not v.name.startswith("pretrain-"),
            path="name",
        ),
    )


class VolumeMount(Section):
    """Where a volume appears in a worker."""

    name: DnsLabel
    """Name of one of podTemplate.volumes."""
    mount_path: PathText
    """Absolute path at which a worker sees the volume, such as /data."""
    sub_path: PathText = ""
    """Folder within the volume to mount. Unset is its root."""
    read_only: bool = False
    """Mount the volume without the right to write."""

    rules: ClassVar = (
        Rule(
            cel=f"self.mountPath.startsWith('/') && {cel_mismatch(CLIMBS, 'self.mountPath')}",
            message="must be an absolute path without . or .. or //",
            holds=lambda m: m.mount_path.startswith("/") and not CLIMBS.search(m.mount_path),
            path="mount_path",
        ),
        Rule(
            cel=cel_mismatch(_RESERVED_MOUNT, "self.mountPath"),
            message="would cover what a worker needs; choose a folder such as /data",
            holds=lambda m: not _RESERVED_MOUNT.match(m.mount_path),
            path="mount_path",
        ),
        Rule(
            cel=f"!has(self.subPath) || {cel_mismatch(LEAVES, 'self.subPath')}",
            message="must be a relative path without . or .. or //",
            holds=lambda m: not LEAVES.search(m.sub_path),
            path="sub_path",
        ),
    )


class PodTemplate(Section):
    """The parts of a worker's pod a user may choose. May change only while suspended."""

    labels: Labels = Field(default_factory=dict)
    """Labels to add to the pods, such as a queue's name."""
    annotations: Annotations = Field(default_factory=dict)
    """Annotations to add to the pods."""
    env: Annotated[
        tuple[EnvVar, ...],
        Field(strict=False, max_length=MAX_ENV, json_schema_extra=_BY_NAME),
        AfterValidator(_unique_names),
    ] = ()
    """Environment variables of every process of a worker."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the image is pulled. Unset is Kubernetes' own: Always for the tag latest, otherwise
    IfNotPresent."""
    image_pull_secrets: Annotated[
        tuple[ObjectName, ...],
        Field(strict=False, max_length=MAX_ENTRIES, json_schema_extra=_BY_NAME),
        AfterValidator(_unique_names),
    ] = ()
    """Secrets of the job's namespace with which the image is pulled."""
    node_selector: Labels = Field(default_factory=dict)
    """Labels a node must have to get a worker."""
    tolerations: Annotated[tuple[Toleration, ...], Field(strict=False, max_length=MAX_ENTRIES)] = ()
    """Taints that workers put up with on a node."""
    affinity: Affinity | None = None
    """Nodes and neighbours that workers prefer or need."""
    topology_spread_constraints: Annotated[
        tuple[TopologySpread, ...], Field(strict=False, max_length=MAX_ENTRIES)
    ] = ()
    """How workers are spread over zones, racks or nodes."""
    priority_class_name: DnsName | None = None
    """PriorityClass of the pods. Unset is the cluster's default."""
    runtime_class_name: DnsName | None = None
    """RuntimeClass of the pods, such as nvidia where GPUs need one. Unset is the node's default."""
    scheduler_name: DnsName | None = None
    """Scheduler that places the pods. Unset is the cluster's default."""
    termination_grace_period_seconds: Annotated[int, Field(ge=1, le=86_400)] | None = None
    """Seconds a worker has to save and leave after SIGTERM; must be more than a save takes. Unset
    is 120, and more once saves were seen to take longer."""
    volumes: Annotated[
        tuple[Volume, ...],
        Field(strict=False, max_length=MAX_ENTRIES, json_schema_extra=_BY_NAME),
        AfterValidator(_unique_names),
    ] = ()
    """Further volumes of the pods, such as claims with data."""
    volume_mounts: Annotated[
        tuple[VolumeMount, ...], Field(strict=False, max_length=MAX_ENTRIES)
    ] = ()
    """Where the volumes of this template appear in a worker."""

    rules: ClassVar = (
        *(
            Rule(
                cel=f"!has(self.{field}) || self.{field}.all(k, {cel_mismatch(pattern, 'k')})",
                message="holds a key reserved for the operator or for Kubernetes; remove it",
                holds=lambda t, field=field: not reserved_keys(t, field),
                path=field,
                explain=lambda t, field=field: (
                    ", ".join(reserved_keys(t, field))
                    + " is reserved for the operator or for Kubernetes; remove it"
                ),
            )
            for field, pattern in _RESERVED_KEYS.items()
        ),
        Rule(
            cel="!has(self.volumeMounts) || self.volumeMounts.all(m, "
            "has(self.volumes) && self.volumes.exists(v, v.name == m.name))",
            message="every volumeMount must name one of podTemplate.volumes",
            holds=lambda t: {m.name for m in t.volume_mounts} <= {v.name for v in t.volumes},
            path="volume_mounts",
        ),
    )


def reserved_keys(template: PodTemplate, field: str) -> list[str]:
    """The keys of ``field``, labels or annotations, that a user may not set."""
    return [key for key in getattr(template, field) if _RESERVED_KEYS[field].match(key)]
