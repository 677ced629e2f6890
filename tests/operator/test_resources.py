"""What the builders make: the restricted profile, Kubernetes' own schemas, and the contract."""

import json
from typing import Any

import kubernetes_validate
import pytest
from pydantic import ValidationError

from pretrain_api import names
from pretrain_api.config import RunConfig
from pretrain_api.job import PretrainJob
from pretrain_operator.resources import (
    avoiding,
    build_claim,
    build_config,
    build_pod,
    build_policy,
    grace_seconds,
)
from pretrain_operator.testing import job_body

TEMPLATE: dict[str, Any] = {
    "labels": {"kueue.x-k8s.io/queue-name": "gpu"},
    "annotations": {"example.com/team": "llm"},
    "env": [
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
        {"name": "NCCL_DEBUG", "value": "INFO"},
    ],
    "imagePullPolicy": "IfNotPresent",
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"gpu": "h200"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "topologySpreadConstraints": [{"topologyKey": "kubernetes.io/hostname"}],
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "schedulerName": "volcano",
    "terminationGracePeriodSeconds": 300,
    "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "corpus"}}],
    "volumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": True}],
}


def job(**spec: Any) -> PretrainJob:
    body = job_body(**spec)
    body["metadata"] |= {"namespace": "team", "uid": "uid-of-job"}
    return PretrainJob.model_validate(body)


def violations(pod: dict[str, Any]) -> list[str]:
    """What the restricted Pod Security Standard has against a pod."""
    spec, found = pod["spec"], list[str]()
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            found.append(field)
    allowed = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "secret"}
    for volume in spec["volumes"]:
        found += [f"volume {kind}" for kind in volume.keys() - {"name"} - allowed]
    for key, profile in pod["metadata"]["annotations"].items():
        if key.startswith("container.apparmor.security.beta.kubernetes.io/"):
            allowed_profile = profile == "runtime/default" or profile.startswith("localhost/")
            found += [] if allowed_profile else ["AppArmor"]
    shared = spec["securityContext"]
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        own = shared | container.get("securityContext", {})
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            found.append("privilege escalation")
        if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
            found.append("capabilities")
        if own.get("runAsNonRoot") is not True or own.get("runAsUser") == 0:
            found.append("root")
        if own.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            found.append("seccomp")
        found += ["host port" for port in container.get("ports", ()) if port.get("hostPort")]
    return found


@pytest.mark.parametrize(
    ("break_it", "found"),
    [
        (lambda spec: spec.update(hostNetwork=True), "hostNetwork"),
        (lambda spec: spec["volumes"].append({"name": "x", "hostPath": {}}), "volume hostPath"),
        (lambda spec: spec["securityContext"].update(runAsUser=0), "root"),
        (lambda spec: spec["securityContext"].pop("seccompProfile"), "seccomp"),
        (lambda spec: spec["containers"][0].pop("securityContext"), "capabilities"),
    ],
)
def test_the_checker_sees_what_it_should(break_it: Any, found: str) -> None:
    pod = build_pod(job(), 0, 1, "trainer:1", 300)
    break_it(pod["spec"])
    if found == "capabilities":
        pod["spec"]["containers"][0]["securityContext"] = {"capabilities": {"drop": []}}
    assert found in violations(pod)


def test_the_checker_sees_annotations_that_lift_the_confinement() -> None:
    pod = build_pod(job(), 0, 1, "trainer:1", 300)
    key = "container.apparmor.security.beta.kubernetes.io/trainer"
    pod["metadata"]["annotations"][key] = "unconfined"
    assert violations(pod) == ["AppArmor"]
    pod["metadata"]["annotations"][key] = "runtime/default"
    assert violations(pod) == []


@pytest.mark.parametrize(
    "key",
    [
        "container.apparmor.security.beta.kubernetes.io/trainer",
        "seccomp.security.alpha.kubernetes.io/pod",
        "io.kubernetes.cri-o.userns-mode",
    ],
)
def test_no_annotation_of_a_user_lifts_the_confinement(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} is reserved"):
        job(workers={"podTemplate": {"annotations": {key: "unconfined"}}})


@pytest.mark.parametrize("template", [{}, TEMPLATE], ids=["plain", "everything"])
def test_pods_are_restricted_and_valid(template: dict[str, Any]) -> None:
    workers = {
        "replicas": 2,
        "podTemplate": template,
        "resources": {"limits": {"cpu": 2, "memory": "4Gi", "nvidia.com/gpu": 1}},
    }
    pod = build_pod(job(workers=workers), 1, 3, "trainer:1", 300)
    assert violations(pod) == []
    kubernetes_validate.validate(pod, "1.34", strict=True)
    assert pod["metadata"]["name"] == "llama-1-3"
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["automountServiceAccountToken"] is False
    container = pod["spec"]["containers"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_users_choices_reach_the_pod_and_can_not_hide_ours() -> None:
    pod = build_pod(
        job(workers={"podTemplate": TEMPLATE, "image": "own:2"}), 0, 1, "trainer:1", 300
    )
    meta, spec = pod["metadata"], pod["spec"]
    container = spec["containers"][0]
    assert container["image"] == "own:2"
    assert meta["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert meta["labels"][names.LABEL_JOB_UID] == "uid-of-job"
    env = {item["name"]: item for item in container["env"]}
    assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "token"
    assert env[names.ENV_GRACE_SECONDS]["value"] == "300"
    assert spec["terminationGracePeriodSeconds"] == 300
    spread = spec["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]
    assert spread == {names.LABEL_JOB_UID: "uid-of-job"}
    assert {"name": "data", "mountPath": "/data", "readOnly": True}.items() <= next(
        mount for mount in container["volumeMounts"] if mount["name"] == "data"
    ).items()
    unreachable = [t for t in spec["tolerations"] if "unreachable" in t["key"]]
    assert unreachable[0]["tolerationSeconds"] <= 60


def test_everything_a_trainer_writes_to_is_mounted() -> None:
    pod = build_pod(job(), 0, 1, "trainer:1", 300)
    container = pod["spec"]["containers"][0]
    mounts = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
    env = {item["name"]: item.get("value", "") for item in container["env"]}
    for name in ("HOME", "TMPDIR", "TRITON_CACHE_DIR", "HF_HOME"):
        assert any(env[name].startswith(mount) for mount in mounts), name
    assert {"/tmp", "/dev/shm", names.OUTPUT_DIR} <= set(mounts)
    shm = next(v for v in pod["spec"]["volumes"] if v["name"] == "pretrain-shm")["emptyDir"]
    assert shm["medium"] == "Memory"
    assert shm["sizeLimit"]


def test_the_sub_path_alone_is_mounted() -> None:
    volume = {"claimName": "shared", "subPath": "runs/a"}
    pod = build_pod(job(volumes={"checkpoint": volume}), 0, 1, "trainer:1", 300)
    output = next(m for m in pod["spec"]["containers"][0]["volumeMounts"] if "output" in m["name"])
    assert (output["mountPath"], output["subPath"]) == (names.OUTPUT_DIR, "runs/a")
    claim = next(v for v in pod["spec"]["volumes"] if v["name"] == output["name"])
    assert claim["persistentVolumeClaim"]["claimName"] == "shared"


def test_the_config_map_holds_a_complete_configuration_with_the_batch_frozen() -> None:
    made = build_config(
        job(
            training={
                "dataset": "text", "datasetPath": "/data", "steps": 10, "localBatchSize": 3,
            },
            workers={"replicas": 2, "processesPerWorker": 2},
        )
    )  # fmt: skip
    kubernetes_validate.validate(made, "1.34", strict=True)
    assert made["immutable"] is True
    text = made["data"][names.CONFIG_FILE]
    config = RunConfig.model_validate_json(text)
    assert config.job.dump_folder == names.OUTPUT_DIR
    assert (config.training.global_batch_size, config.training.data_streams) == (12, 12)
    assert json.loads(text)["schema_version"] == 1


@pytest.mark.parametrize("retention", ["Retain", "Delete"])
def test_only_a_claim_to_be_deleted_has_an_owner(retention: str) -> None:
    volume = {"claimTemplate": {"storage": "5Gi"}, "retention": retention}
    made = job(volumes={"checkpoint": volume})
    claim = build_claim(made)
    kubernetes_validate.validate(claim, "1.34", strict=True)
    assert ("ownerReferences" in claim["metadata"]) is (retention == "Delete")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_one_worker_needs_no_shared_volume() -> None:
    assert build_claim(job(workers={"replicas": 1}))["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_the_policy_lets_workers_meet_and_others_only_ask() -> None:
    peers = [{"namespaceSelector": {"matchLabels": {"name": "pretrain-system"}}}]
    made = build_policy(job(), peers)
    kubernetes_validate.validate(made, "1.34", strict=True)
    among, status = made["spec"]["ingress"]
    mine = {"podSelector": {"matchLabels": {names.LABEL_JOB_UID: "uid-of-job"}}}
    assert among == {"from": [mine]}
    assert [port["port"] for port in status["ports"]] == [names.HTTP_PORT]
    assert status["from"] == peers
    assert "from" not in build_policy(job(), [])["spec"]["ingress"][1]


@pytest.mark.parametrize(
    ("save", "step", "grace"),
    [(None, None, 120), (10.0, 5.0, 120), (60.0, 7.25, 165), (10_000.0, 1.0, 3600)],
)
def test_the_grace_period_leaves_time_to_save(
    save: float | None, step: float | None, grace: int
) -> None:
    assert grace_seconds(job(), save, step) == grace


def test_a_grace_period_that_the_user_set_stands() -> None:
    workers = {"podTemplate": {"terminationGracePeriodSeconds": 7}}
    assert grace_seconds(job(workers=workers), 100.0, 1.0) == 7


def test_a_node_to_avoid_comes_beside_the_users_own_affinity() -> None:
    soft, hard = "preferredDuringSchedulingIgnoredDuringExecution", {"nodeSelectorTerms": []}
    key = "requiredDuringSchedulingIgnoredDuringExecution"
    own = {"weight": 5, "preference": {"matchExpressions": []}}
    affinity = {"nodeAffinity": {soft: [own], key: hard}, "podAffinity": {"x": 1}}
    before = build_pod(job(workers={"podTemplate": {"affinity": affinity}}), 0, 1, "trainer:1", 300)
    assert avoiding(before, []) == before
    after = avoiding(before, ["a", "b"])["spec"]["affinity"]
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": ["a", "b"]}]
    assert after["nodeAffinity"][soft] == [
        own,
        {"weight": 100, "preference": {"matchFields": fields}},
    ]
    assert (after["nodeAffinity"][key], after["podAffinity"]) == (hard, {"x": 1})
    assert before["spec"]["affinity"] == affinity
