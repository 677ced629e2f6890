"""Jobs, good and bad, and an API server in a hundred lines to try them on.

Two tests ask whether the Kubernetes API server and pydantic agree about a job: one with a stand-in
that applies the CRD as the API server does (defaults, schema, CEL), which is fast, and one with a
real API server, which is right. Both get their jobs from here.
"""

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import cel
import jsonschema
import pytest

from pretrain_api import crd

# Values to try at each key of the spec: legal, at the border, and beyond.
VALUES: dict[str, list[Any]] = {
    "training.dataset": ["c4", "text", "jsonl", "c5", 3],
    "training.datasetPath": ["/data", ""],
    "training.localBatchSize": [1, 2, 3, 8, 0, -1, "2", 2.5],
    "training.globalBatchSize": [-1, 1, 6, 8, 16, 24, 0, -2],
    "training.dataStreams": [1, 2, 4, 8, 3, 0],
    "training.seqLen": [1, 128, 0, 2**24, 2**24 + 1],
    "training.maxNorm": [1, 0.5, 0, -1],
    "training.steps": [1, 2**31 - 1, 0, 2**31, True],
    "training.nonFinite": ["skip", "stop", "ignore"],
    "training.stepz": [1],
    "optimizer.name": ["AdamW", "Adam", "SGD"],
    "optimizer.lr": [1, 3e-4, 0, -1e-4, "3e-4"],
    "optimizer.beta1": [0, 0.9, 1],
    "lrScheduler.decayRatio": [0, 1, 1.1],
    "lrScheduler.decayType": ["sqrt", "cosine", "step"],
    "model.name": ["llama3", "llama4", "mine", ""],
    "model.flavor": ["8B", "debugmodel", "7B"],
    "model.converters": [
        [],
        ["quantize.linear.float8", "quantize.grouped_mm.mx"],
        ["quantize.linear.float8", "quantize.linear.mx"],
        ["quantize.grouped_mm.mx", "quantize.grouped_mm.float8"],
        ["quantize.linear.float4"],
    ],
    "model.tokenizerPath": ["x"],
    "job.description": ["a job", "x" * 1024, "x" * 1025],
    "job.dumpFolder": ["./outputs"],
    "parallelism.dataParallelShardDegree": [-1, 1, 2, 4, 8, 0, -2],
    "parallelism.dataParallelReplicateDegree": [1, 2, 3, 0],
    "parallelism.fsdpReshardAfterForward": ["default", "never", 1, 2, 3, 0, "2", "sometimes", 1.5],
    "parallelism.tensorParallelDegree": [1, 2, 0],
    "parallelism.moduleFqnsPerModelPart": [[["a"], ["b", "c"]], ["a"]],
    "parallelism.disableLossParallel": [True, False],
    "activationCheckpoint.mode": ["full", "none", "memory_budget", "some"],
    "activationCheckpoint.selectiveAcOption": ["op", "2", "0", "two"],
    "checkpoint.enable": [True, False],
    "checkpoint.folder": ["checkpoint", "a/b", "", "/a", "../a", "a//b", "a/..", "..a"],
    "checkpoint.keepLatestK": [0, 1, 2, -1],
    "checkpoint.loadStep": [-1, 0, -2],
    "checkpoint.createSeedCheckpoint": [True],
    "checkpoint.loadOnly": [True],
    "checkpoint.asyncMode": ["disabled", "async"],
    "checkpoint.excludeFromLoading": [["optimizer", "dataloader"], ["weights"]],
    "compile.enable": [True, False],
    "compile.components": [["model"], ["loss"], [], ["model", "loss", "loss"]],
    "compile.backend": ["inductor", "eager", ""],
    "quantize.linear.float8.emulate": [False, True],
    "quantize.linear.float8.recipeName": [
        "tensorwise",
        "rowwise",
        "rowwise_with_gw_hp",
        "colwise",
    ],
    "quantize.linear.float8.enableFsdpFloat8AllGather": [True, False],
    "quantize.linear.float8.precomputeFloat8DynamicScaleForFsdp": [True, False],
    "quantize.linear.float8.filterFqns": [["output"], ["output", "auto_filter_small_kn"]],
    "comm.traceBufSize": [0, 1],
    "workers.replicas": [1, 2, 4, 3, 0, 4096, 4097],
    "workers.minReplicas": [1, 2, 3, 0],
    "workers.maxReplicas": [1, 4, 6, 4097],
    "workers.processesPerWorker": [1, 2, 8, 0],
    "workers.image": ["registry.example/trainer:1", ""],
    "workers.resources.limits": [
        {"nvidia.com/gpu": 8},
        {"nvidia.com/gpu": "2", "memory": "16Gi"},
        {"nvidia.com/gpu": "8k"},
        {"cpu": "-1"},
        {"cpu": -1},
        {"cpu": "1.5e3", "memory": "100M"},
        {"cpu": "fast"},
    ],
    "workers.podTemplate.labels": [
        {"kueue.x-k8s.io/queue-name": "team"},
        {"kueue.x-k8s.io/pod-group-name": "x"},
        {"pretrain.dev/job-name": "x"},
        {"app.kubernetes.io/managed-by": "x"},
        {"not a key": "x"},
        {"key": "not a value"},
    ],
    "workers.podTemplate.annotations": [
        {"example.com/team": "llm", "k8s.v1.cni.cncf.io/networks": "rdma"},
        {"container.apparmor.security.beta.kubernetes.io/trainer": "unconfined"},
        {"seccomp.security.alpha.kubernetes.io/pod": "unconfined"},
        {"container.seccomp.security.alpha.kubernetes.io/trainer": "unconfined"},
        {"io.kubernetes.cri-o.userns-mode": "auto"},
        {"io.kubernetes.cri-o.TrySkipVolumeSELinuxLabel": "true"},
        {"io.containerd.rdt/class": "a"},
        {"pretrain.dev/assignment": "{}"},
        {"kueue.x-k8s.io/pod-group-total-count": "1"},
        {"kueue.x-k8s.io/retriable-in-group": "false"},
    ],
    "workers.podTemplate.env": [
        [{"name": "A", "value": "1"}],
        [{"name": "A"}, {"name": "A"}],
        [{"name": "RANK", "value": "0"}],
        [{"name": "PET_NNODES"}],
        [{"name": "1A"}],
        [{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
        [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        [{"name": "A", "valueFrom": {}}],
        [{"value": "1"}],
    ],
    "workers.podTemplate.volumes": [
        [{"name": "v", "emptyDir": {}}],
        [{"name": "v", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "w", "downwardAPI": {}}],
        [{"name": "v", "secret": {"secretName": "s"}, "emptyDir": {}}],
        [{"name": "v", "hostPath": {"path": "/"}}],
        [{"name": "pretrain-x", "emptyDir": {}}],
        [{"name": "v"}],
    ],
    "workers.podTemplate.volumeMounts": [
        [{"name": "v", "mountPath": "/data"}],
        [{"name": "v", "mountPath": "/etc/pretrain"}],
        [{"name": "v", "mountPath": "data"}],
        [{"name": "v", "mountPath": "/data", "subPath": "../x"}],
    ],
    "workers.podTemplate.tolerations": [
        [{"operator": "Exists"}],
        [{"operator": "Maybe"}],
        [{"value": "a"}],
        [{"key": "a", "value": "b"}],
        [{"operator": "Exists", "value": "b"}],
        [{"key": "a", "tolerationSeconds": 3}],
        [{"key": "a", "tolerationSeconds": 3, "effect": "NoExecute"}],
    ],
    "workers.podTemplate.affinity": [{"nodeAffinity": {"a": [{"b": 1}]}}, {"cosyAffinity": {}}],
    "workers.podTemplate.hostNetwork": [True],
    "workers.podTemplate.terminationGracePeriodSeconds": [30, 0],
    "volumes.checkpoint": [
        {"claimTemplate": {"storage": "1Gi"}},
        {"claimTemplate": {"storage": 5, "accessModes": ["ReadWriteOnce"]}},
        {"claimTemplate": {"storage": "0Gi"}},
        {"claimTemplate": {"storage": "10 GB"}},
        {"claimTemplate": {}},
        {"claimName": "data", "subPath": "a/b"},
        {"claimName": "data", "subPath": "/a"},
        {"claimName": "data", "subPath": "../a"},
        {"claimName": "data", "retention": "Delete"},
        {"claimName": "Data"},
        {"claimName": "data", "claimTemplate": {"storage": "1Gi"}},
        {},
    ],
    "recovery.maxRestarts": [0, -1],
    "recovery.backoffSeconds": [0, 10, 400],
    "recovery.maxBackoffSeconds": [5, 300],
    "recovery.growSnoozeSeconds": [0, 60, -1],
    "suspend": [True, False, "yes"],
    "managedBy": ["kueue.x-k8s.io/multikueue", "me"],
    "activeDeadlineSeconds": [1, 0],
    "ttlSecondsAfterFinished": [0, -1],
    "typo": [1],
}


def make_spec(choices: dict[str, Any]) -> dict[str, Any]:
    """A spec that would be fine, with values chosen for some keys."""
    spec: dict[str, Any] = {"training": {"dataset": "c4"}}
    for path, value in choices.items():
        *sections, key = path.split(".")
        target = spec
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return spec


def random_specs(count: int, seed: int) -> list[dict[str, Any]]:
    """Specs with one value of every kind, and then with several at once."""
    chooser = random.Random(seed)
    singles = [{path: value} for path, values in VALUES.items() for value in values]
    several = [
        {path: chooser.choice(VALUES[path]) for path in chooser.sample(sorted(VALUES), k=size)}
        for size in (chooser.randint(2, 6) for _ in range(count))
    ]
    return [make_spec(choices) for choices in (*singles, *several)]


class StandIn:
    """Admits or refuses a spec by the generated CRD, as the API server would with --validate."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._checker = jsonschema.Draft202012Validator(_closed(schema))

    def errors(self, spec: dict[str, Any]) -> list[str]:
        """Why the spec is refused; empty if it is admitted."""
        spec = _with_defaults(self._schema, json.loads(json.dumps(spec)))
        found = [error.message for error in self._checker.iter_errors(spec)]
        found += [error for error in _duplicates(self._schema, spec)]
        return found or list(_broken_rules(self._schema, spec))

    def update_errors(self, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
        """Why an update is refused; empty if it is made."""
        old, new = (
            _with_defaults(self._schema, json.loads(json.dumps(spec))) for spec in (before, after)
        )
        return [
            rule["message"]
            for rule in self._schema["x-kubernetes-validations"]
            if "oldSelf" in rule["rule"]
            and not _program(rule["rule"]).execute({"self": new, "oldSelf": old})
        ]


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as JSON schema proper, with unknown properties forbidden."""
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    for key, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if result.pop(key, False):
            result[key] = result.pop(bound)
    if "x-kubernetes-int-or-string" in schema:
        result["type"] = ["integer", "string"]
    if "properties" in schema:
        result["properties"] = {k: _closed(v) for k, v in schema["properties"].items()}
        result["additionalProperties"] = False
    elif "additionalProperties" in schema:
        result["additionalProperties"] = _closed(schema["additionalProperties"])
    if "items" in schema:
        result["items"] = _closed(schema["items"])
    return result


def _with_defaults(schema: dict[str, Any], value: Any) -> Any:
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = json.loads(json.dumps(inner["default"]))
            if name in value:
                value[name] = _with_defaults(inner, value[name])
    return value


def _below(schema: dict[str, Any], value: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name, item in value.items():
            yield properties.get(name, schema.get("additionalProperties", {})), item
    elif isinstance(value, list):
        yield from ((schema.get("items", {}), item) for item in value)


def _duplicates(schema: dict[str, Any], value: Any) -> Iterator[str]:
    if schema.get("x-kubernetes-list-type") == "map":
        names = [item.get("name") for item in value if isinstance(item, dict)]
        if len(set(names)) < len(names):
            yield "duplicate name"
    for inner, item in _below(schema, value):
        yield from _duplicates(inner, item)


def _broken_rules(schema: dict[str, Any], value: Any) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not _program(rule["rule"]).execute({"self": value}):
            yield rule["message"]
    for inner, item in _below(schema, value):
        yield from _broken_rules(inner, item)


@cache
def _program(rule: str) -> Any:
    return cel.compile(rule)


@pytest.fixture(scope="session")
def stand_in() -> StandIn:
    (version,) = crd.definition()["spec"]["versions"]
    return StandIn(version["schema"]["openAPIV3Schema"]["properties"]["spec"])


@pytest.fixture(scope="session")
def values() -> dict[str, list[Any]]:
    return VALUES


@pytest.fixture(scope="session")
def specs() -> Callable[[int, int], list[dict[str, Any]]]:
    return random_specs


@pytest.fixture(scope="session")
def spec_with() -> Callable[[dict[str, Any]], dict[str, Any]]:
    return make_spec
