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
    """Most a worker may use, such as nvidia.com/gpu: 8."""
    requests: Quantities = Field(default_factory=dict)
    """What a worker is sure to get. An entry that is missing equals its limit."""


class KeyRef(Section):
    """One key of a Secret or ConfigMap in the job's namespace."""

    name: DnsName
    """Name of the object."""
    key: ShortText
    """Key within it."""
    optional: bool = False
    """Start even if it is missing."""


class FieldRef(Section):
    """A field of the pod itself."""

    field_path: ShortText
    """Path of the field, such as spec.nodeName."""


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
    """A key of a Secret."""
    config_map_key_ref: KeyRef | None = None
    """A key of a ConfigMap."""
    field_ref: FieldRef | None = None
    """A field of the pod."""

    rules: ClassVar = (one_of("secret_key_ref", "config_map_key_ref", "field_ref"),)


class EnvVar(Section):
    """An environment variable of every process of a worker."""

    name: EnvName
    """Name of the variable."""
    value: Annotated[str, StringConstraints(max_length=16_384)] | None = None
    """Its value."""
    value_from: EnvSource | None = None
    """Where its value comes from."""

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
    """Name of the object."""


class Toleration(Section):
    """A taint the workers' nodes may have."""

    key: LabelKey | None = None
    """Key of the taint; unset with operator Exists is every taint."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How value is compared."""
    value: LabelValue = ""
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; unset is every effect."""
    toleration_seconds: NonNegative | None = None
    """How long a worker stays on a node that gets a NoExecute taint."""

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
    """Node label whose values are the domains."""
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = "DoNotSchedule"
    """What to do when workers can't be spread that evenly."""
    min_domains: Positive | None = None
    """Number of domains to have at least."""
    label_selector: FreeForm | None = None
    """Pods that count."""


class ConfigMapSource(Section):
    """Files from a ConfigMap."""

    name: DnsName
    """Name of the ConfigMap."""
    optional: bool = False
    """Start even if it is missing."""


class SecretSource(Section):
    """Files from a Secret."""

    secret_name: DnsName
    """Name of the Secret."""
    optional: bool = False
    """Start even if it is missing."""


class EmptyDirSource(Section):
    """An empty folder that lives as long as the pod."""

    medium: Literal["", "Memory"] = ""
    """Where it lies: on the node's disk, or in memory."""
    size_limit: Quantity | None = None
    """Most it may hold."""


class ClaimSource(Section):
    """A claim in the job's namespace, such as one with training data."""

    claim_name: DnsName
    """Name of the claim."""
    read_only: bool = False
    """Mount it without the right to write."""


class DownwardItem(Section):
    """One file with a field of the pod."""

    path: PathText
    """Path of the file within the volume."""
    field_ref: FieldRef
    """Field whose value it holds."""


class DownwardSource(Section):
    """Files with fields of the pod itself."""

    items: Annotated[tuple[DownwardItem, ...], Field(strict=False, max_length=MAX_ENTRIES)] = ()
    """The files."""


class Volume(Section):
    """A further volume of the workers. Only kinds that can't reach the node are in the schema."""

    name: DnsLabel
    """Name that volumeMounts refer to."""
    config_map: ConfigMapSource | None = None
    """Files from a ConfigMap."""
    secret: SecretSource | None = None
    """Files from a Secret."""
    empty_dir: EmptyDirSource | None = None
    """An empty folder that lives as long as the pod."""
    persistent_volume_claim: ClaimSource | None = None
    """A claim in the job's namespace."""
    downward_api: DownwardSource | None = None
    """Files with fields of the pod itself."""

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
    """Name of the volume."""
    mount_path: PathText
    """Absolute path in the worker."""
    sub_path: PathText = ""
    """Folder within the volume to mount instead of its root."""
    read_only: bool = False
    """Mount it without the right to write."""

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
    """Labels of the pods, such as a queue's name."""
    annotations: Annotations = Field(default_factory=dict)
    """Annotations of the pods."""
    env: Annotated[
        tuple[EnvVar, ...],
        Field(strict=False, max_length=MAX_ENV, json_schema_extra=_BY_NAME),
        AfterValidator(_unique_names),
    ] = ()
    """Environment variables of every process."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the image is fetched."""
    image_pull_secrets: Annotated[
        tuple[ObjectName, ...],
        Field(strict=False, max_length=MAX_ENTRIES, json_schema_extra=_BY_NAME),
        AfterValidator(_unique_names),
    ] = ()
    """Secrets with which the image is fetched."""
    node_selector: Labels = Field(default_factory=dict)
    """Labels a node must have."""
    tolerations: Annotated[tuple[Toleration, ...], Field(strict=False, max_length=MAX_ENTRIES)] = ()
    """Taints a node may have."""
    affinity: Affinity | None = None
    """Nodes and neighbours workers prefer or need."""
    topology_spread_constraints: Annotated[
        tuple[TopologySpread, ...], Field(strict=False, max_length=MAX_ENTRIES)
    ] = ()
    """How workers are spread over the cluster."""
    priority_class_name: DnsName | None = None
    """Priority of the pods."""
    scheduler_name: DnsName | None = None
    """Scheduler that places the pods."""
    termination_grace_period_seconds: Annotated[int, Field(ge=1, le=86_400)] | None = None
    """Time to save and leave after SIGTERM. Must be longer than a save takes."""
    volumes: Annotated[
        tuple[Volume, ...],
        Field(strict=False, max_length=MAX_ENTRIES, json_schema_extra=_BY_NAME),
        AfterValidator(_unique_names),
    ] = ()
    """Further volumes, such as claims with data."""
    volume_mounts: Annotated[
        tuple[VolumeMount, ...], Field(strict=False, max_length=MAX_ENTRIES)
    ] = ()
    """Where those volumes appear."""

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
