"""The chart over many values: valid objects, no right too many, and typos refused."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pretrain_api import names
from pretrain_api.job import PretrainJob
from pretrain_operator import smoketest
from pretrain_operator.cluster import Kind
from pretrain_operator.settings import load

pytestmark = pytest.mark.cluster  # needs helm, which is built with the cluster's tools

Objects = list[dict[str, Any]]
Render = Callable[..., Objects]
Template = Callable[..., subprocess.CompletedProcess[str]]

DIGEST = "sha256:" + "0123456789abcdef" * 4
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "two namespaces": {"watchNamespaces": ["team-a", "team-b"]},
    "foreign registry": {
        "image": {"registry": "registry.example:5000/mirror", "digest": DIGEST},
        "trainerImage": {"registry": "registry.example:5000/mirror", "tag": "nightly"},
        "imagePullSecrets": [{"name": "mirror"}],
    },
    "own account": {"serviceAccount": {"create": False, "name": "robot"}},
    "placed": {
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "control", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "replicas": 2,
        "podAnnotations": {"example.com/a": "b"},
        "podLabels": {"team": "a"},
        "extraEnv": [
            {"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"},
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "proxy", "key": "token"}}},
        ],
    },
    "own class": {"priorityClass": {"create": True, "value": 2000}, "crds": {"enabled": False}},
    "plain": {
        "crds": {"enabled": False},
        "log": {"format": "text", "level": "DEBUG"},
        "workerPeers": [{"namespaceSelector": {"matchLabels": {"team": "it's ops"}}}],
        "ports": {"metrics": 9191, "health": 8181},
        "fullnameOverride": "trainer-control",
    },
}


def of_kind(objects: Objects, kind: str) -> dict[str, Any]:
    [found] = [each for each in objects if each["kind"] == kind]
    return found


def environment(deployment: dict[str, Any]) -> dict[str, str]:
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def rules(objects: Objects) -> Iterator[dict[str, Any]]:
    for each in objects:
        if each["kind"] in {"Role", "ClusterRole"}:
            yield from each["rules"]


def rules_of_the_operator(objects: Objects) -> Iterator[dict[str, Any]]:
    """Rules of the roles that its account is bound to."""
    account = of_kind(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
    bindings = (each for each in objects if each["kind"] in {"RoleBinding", "ClusterRoleBinding"})
    roles = {
        (each["roleRef"]["kind"], each["roleRef"]["name"])
        for each in bindings
        if account in [subject["name"] for subject in each["subjects"]]
    }
    return rules([o for o in objects if (o["kind"], o["metadata"]["name"]) in roles])


def lease_role(objects: Objects) -> dict[str, Any]:
    [found] = [each for each in objects if each["kind"] == "Role" and "lease" in str(each["rules"])]
    return found


@pytest.mark.parametrize("values", VALUES.values(), ids=list(VALUES))
def test_every_object_is_valid(render: Render, values: dict[str, Any]) -> None:
    objects = render(values)
    assert len(objects) >= 4
    for each in objects:
        kubernetes_validate.validate(each, "1.34", strict=True)


@pytest.mark.parametrize("values", VALUES.values(), ids=list(VALUES))
def test_rights_are_spelled_out_and_no_secret_is_readable(
    render: Render, values: dict[str, Any]
) -> None:
    for rule in rules(render(values)):
        for key in ("apiGroups", "resources", "verbs"):
            assert "*" not in rule[key]
        assert "secrets" not in rule["resources"]
        assert not {"pods/exec", "pods/attach", "pods/ephemeralcontainers"} & set(rule["resources"])


def test_the_operator_may_do_what_it_does_and_no_more(render: Render) -> None:
    granted = {
        (resource, verb)
        for rule in rules_of_the_operator(render())
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    created = {"pods", "configmaps", "persistentvolumeclaims", "networkpolicies", "events"}
    watched = {"pretrainjobs", "pods"}
    needed = {(kind.plural, "get") for kind in Kind if kind is not Kind.EVENT}
    needed |= {(resource, "create") for resource in created}
    needed |= {(resource, verb) for resource in watched for verb in ("list", "watch")}
    needed |= {(resource, "delete") for resource in watched}
    needed |= {("pods", "patch"), ("persistentvolumeclaims", "patch")}
    needed |= {("pretrainjobs/status", "patch")}
    needed |= {("leases", "create"), ("leases", "patch")}
    assert granted == needed


def test_kubernetes_own_roles_reach_jobs(render: Render) -> None:
    objects = render()
    roles = {each["metadata"]["name"]: each for each in objects if each["kind"] == "ClusterRole"}
    viewer, editor = roles["pretrain-operator-viewer"], roles["pretrain-operator-editor"]
    into = "rbac.authorization.k8s.io/aggregate-to-"
    assert {label for label in viewer["metadata"]["labels"] if label.startswith(into)} == {
        f"{into}view", f"{into}edit", f"{into}admin"
    }  # fmt: skip
    assert f"{into}view" not in editor["metadata"]["labels"]
    seen = {verb for rule in viewer["rules"] for verb in rule["verbs"]}
    assert seen == {"get", "list", "watch"}
    changed = {resource for rule in editor["rules"] for resource in rule["resources"]}
    assert "pretrainjobs/status" not in changed  # the operator's own memory
    for off in ({"crds": {"aggregateRoles": False}}, {"crds": {"enabled": False}}):
        kinds = [each for each in render(off) if "aggregate-to" in str(each["metadata"])]
        assert kinds == []


@pytest.mark.parametrize("spaces", [[], ["team-a", "team-b"]])
def test_the_smoke_test_may_train_where_jobs_are_served_and_nothing_else(
    render: Render, spaces: list[str]
) -> None:
    hooks = [each for each in render({"watchNamespaces": spaces}) if is_hook(each)]
    pod, role = of_kind(hooks, "Pod"), of_kind(hooks, "Role")
    where = spaces[0] if spaces else "pretrain-system"
    assert f"--namespace={where}" in pod["spec"]["containers"][0]["args"]
    assert role["metadata"]["namespace"] == where
    assert role["rules"] == [
        {"apiGroups": ["pretrain.dev"], "resources": ["pretrainjobs"],
         "verbs": ["get", "create", "delete"]}
    ]  # fmt: skip
    deployment = of_kind(render(), "Deployment")["spec"]["template"]["spec"]
    assert pod["spec"]["securityContext"] == deployment["securityContext"]
    [ours], [theirs] = pod["spec"]["containers"], deployment["containers"]
    assert ours["securityContext"] == theirs["securityContext"]
    assert (ours["image"], ours["command"][-1]) == (theirs["image"], smoketest.__name__)


def pod_template(objects: Objects) -> dict[str, Any] | None:
    """What the smoke test is told about its worker's pod."""
    [container] = of_kind([o for o in objects if is_hook(o)], "Pod")["spec"]["containers"]
    found = [word for word in container["args"] if word.startswith("--pod-template=")]
    return json.loads(found[0].partition("=")[2]) if found else None


def test_the_smoke_tests_worker_gets_what_the_operators_pods_need(render: Render) -> None:
    assert pod_template(render()) is None
    mirror, placed = VALUES["foreign registry"], VALUES["placed"]
    assert pod_template(render(mirror)) == {"imagePullSecrets": mirror["imagePullSecrets"]}
    told = pod_template(render(placed))
    assert told == {key: placed[key] for key in ("nodeSelector", "tolerations")}
    PretrainJob.model_validate(smoketest.build_job("smoke", "team", told))


def is_hook(each: dict[str, Any]) -> bool:
    return "helm.sh/hook" in each["metadata"].get("annotations", {})


def test_with_named_namespaces_nothing_is_granted_outside_them(render: Render) -> None:
    objects = render({"watchNamespaces": ["team-a", "team-b"], "crds": {"enabled": False}})
    kinds = {each["kind"] for each in objects}
    assert not {"ClusterRole", "ClusterRoleBinding"} & kinds
    roles = [each for each in objects if each["kind"] == "RoleBinding" and not is_hook(each)]
    spaces = [each["metadata"]["namespace"] for each in roles]
    assert spaces == ["team-a", "team-b", "pretrain-system"]
    # In its own namespace nothing but the Lease, unless that one is served too.
    assert lease_role(objects)["metadata"]["namespace"] == "pretrain-system"
    served = render({"watchNamespaces": ["pretrain-system"], "crds": {"enabled": False}})
    names_of = [each["metadata"]["name"] for each in served if each["kind"] == "Role"]
    assert len(set(names_of)) == 3


def test_the_operator_runs_under_the_restricted_profile(render: Render) -> None:
    pod = of_kind(render(), "Deployment")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == names.USER_ID
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "limits" in container["resources"]


@pytest.mark.parametrize("values", [{}, VALUES["plain"]], ids=["release", "renamed"])
def test_one_operator_at_a_time_by_a_lease_it_may_keep(
    render: Render, values: dict[str, Any]
) -> None:
    objects = render(values)
    deployment = of_kind(objects, "Deployment")
    settings = load(environment(deployment))
    assert settings.lease_namespace == deployment["metadata"]["namespace"]
    role = lease_role(objects)
    assert role["metadata"]["namespace"] == settings.lease_namespace
    granted = {
        (verb, *rule.get("resourceNames", ())) for rule in role["rules"] for verb in rule["verbs"]
    }
    name = settings.lease_name
    assert granted == {("create",), ("get", name), ("patch", name)}
    [binding] = [
        each
        for each in objects
        if each["kind"] == "RoleBinding" and each["roleRef"]["name"] == role["metadata"]["name"]
    ]
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    assert binding["subjects"][0]["name"] == account


def test_an_upgrade_overlaps_and_a_standby_is_somewhere_else(render: Render) -> None:
    spec = of_kind(render(VALUES["placed"]), "Deployment")["spec"]
    assert spec["replicas"] == 2
    # Without a gap: the old one is told to end when the new one is ready.
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    [spread] = spec["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"] == spec["selector"]
    keys = [each["key"] for each in spec["template"]["spec"]["tolerations"]]
    assert keys == ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable", "control"]


@pytest.mark.parametrize(("replicas", "budgets"), [(0, 0), (1, 0), (2, 1), (5, 1)])
def test_a_drain_takes_one_of_several_operators_and_waits_for_none_that_is_alone(
    render: Render, replicas: int, budgets: int
) -> None:
    objects = render({"replicas": replicas})
    found = [each["spec"] for each in objects if each["kind"] == "PodDisruptionBudget"]
    assert len(found) == budgets
    for budget in found:
        assert budget["maxUnavailable"] == 1
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        assert budget["selector"] == of_kind(objects, "Deployment")["spec"]["selector"]


def priority(objects: Objects) -> tuple[str | None, list[tuple[str, int]]]:
    """The class of the operator's pods, and the classes that the chart makes."""
    pod = of_kind(objects, "Deployment")["spec"]["template"]["spec"]
    classes = [each for each in objects if each["kind"] == "PriorityClass"]
    made = [(each["metadata"]["name"], each["value"]) for each in classes]
    return pod.get("priorityClassName"), made


def test_the_operator_has_the_priority_class_that_the_values_name_or_make(render: Render) -> None:
    assert priority(render()) == (None, [])
    assert priority(render({"priorityClassName": "high"})) == ("high", [])
    own = {"create": True}
    made = ("pretrain-operator", 1_000_000)
    assert priority(render({"priorityClass": own})) == (made[0], [made])
    named = own | {"name": "control", "value": -5}
    assert priority(render({"priorityClass": named})) == ("control", [("control", -5)])
    # Without its switch, the rest makes nothing.
    assert priority(render({"priorityClass": named | {"create": False}})) == (None, [])


def test_the_identity_is_that_of_the_pod(render: Render) -> None:
    [container] = of_kind(render(), "Deployment")["spec"]["template"]["spec"]["containers"]
    fields = {
        each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"]
        for each in container["env"]
        if "valueFrom" in each
    }
    assert fields == {"POD_NAME": "metadata.name", "POD_UID": "metadata.uid"}
    order = [each["name"] for each in container["env"]]  # only what comes before is filled in
    assert order.index("PRETRAIN_OPERATOR_LEASE_IDENTITY") > order.index("POD_UID")


def test_images_come_from_where_the_values_say(render: Render) -> None:
    deployment = of_kind(render(VALUES["foreign registry"]), "Deployment")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    variables = environment(deployment)
    mirror = "registry.example:5000/mirror"
    assert container["image"] == f"{mirror}/pretrain-operator@{DIGEST}"
    assert variables["PRETRAIN_OPERATOR_TRAINER_IMAGE"] == f"{mirror}/pretrain-trainer:nightly"


@pytest.mark.parametrize("values", VALUES.values(), ids=list(VALUES))
def test_the_operator_reads_every_setting_the_chart_writes(
    render: Render, values: dict[str, Any]
) -> None:
    settings = load(environment(of_kind(render(values), "Deployment")))
    assert list(settings.namespaces) == values.get("watchNamespaces", [])
    assert settings.log_format == values.get("log", {}).get("format", "json")


def test_the_operator_is_a_peer_wherever_others_are_named(render: Render) -> None:
    assert load(environment(of_kind(render(), "Deployment"))).worker_peers == ()
    named = VALUES["plain"]["workerPeers"]
    deployment = of_kind(render({"workerPeers": named}), "Deployment")
    *others, own = load(environment(deployment)).worker_peers
    assert others == named
    space = {"kubernetes.io/metadata.name": deployment["metadata"]["namespace"]}
    assert own == {
        "namespaceSelector": {"matchLabels": space},
        "podSelector": deployment["spec"]["selector"],
    }


def test_variables_of_the_values_are_added_to_the_charts(render: Render) -> None:
    [plain] = of_kind(render(), "Deployment")["spec"]["template"]["spec"]["containers"]
    placed = VALUES["placed"]
    [more] = of_kind(render(placed), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert more["env"] == plain["env"] + placed["extraEnv"]


@pytest.mark.parametrize("keep", [True, False])
def test_the_definition_survives_an_uninstall_unless_told_otherwise(
    render: Render, keep: bool
) -> None:
    crd = of_kind(render({"crds": {"keep": keep}}), "CustomResourceDefinition")
    policy = crd["metadata"].get("annotations", {}).get("helm.sh/resource-policy")
    assert policy == ("keep" if keep else None)


def test_the_definition_is_the_generated_one(render: Render, repository: Path) -> None:
    crd = of_kind(render(), "CustomResourceDefinition")
    generated = yaml.safe_load(
        (repository / "manifests" / "base" / "crds" / "pretrain.dev_pretrainjobs.yaml").read_text()
    )
    assert crd["spec"] == generated["spec"]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"imag": {}}, "imag"),
        ({"image": {"taag": "x"}}, "taag"),
        ({"replicas": -1}, "replicas"),
        ({"image": {"digest": "sha256:short"}}, "digest"),
        ({"watchNamespaces": ["Team_A"]}, "watchNamespaces"),
        ({"ports": {"health": 80}}, "health"),
        ({"ports": {"health": 9090}}, "both 9090; each needs a port of its own"),
        ({"image": {"registry": "a.example/b/"}}, "image.registry ends with a slash"),
        ({"trainerImage": {"registry": "b/"}}, "trainerImage.registry ends with a slash"),
        ({"extraEnv": [{"value": "x"}]}, "extraEnv"),
        ({"extraEnv": [{"name": "POD_UID", "value": "x"}]}, "the chart sets POD_UID itself"),
        ({"extraEnv": [{"name": "PRETRAIN_OPERATOR_RECONCILERS"}]}, "RECONCILERS itself"),
        ({"log": {"format": "xml"}}, "format"),
        ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
        ({"priorityClass": {"value": 2_000_000_000}}, "value"),
        ({"priorityClass": {"create": True, "value": None}}, "value is needed"),
        ({"priorityClass": {"name": "Not_A_Name"}}, "name"),
        ({"priorityClassName": "a", "priorityClass": {"create": True}}, "set one of them"),
    ],
)
def test_a_mistake_in_the_values_is_refused(
    template: Template, values: dict[str, Any], word: str
) -> None:
    outcome = template(values)
    assert outcome.returncode != 0
    assert word in outcome.stderr


@pytest.fixture(scope="module")
def notes(helm: str, chart: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What an installation with the given values says; no cluster is asked."""
    copy = tmp_path_factory.mktemp("notes") / chart.name
    shutil.copytree(chart, copy)
    (copy / "templates" / "NOTES.txt").rename(copy / "files" / "NOTES.txt")
    told = copy / "templates" / "notes.yaml"
    told.write_text('notes: {{ tpl (.Files.Get "files/NOTES.txt") . | toJson }}\n')

    def said(values: dict[str, Any]) -> str:
        done = subprocess.run(
            [helm, "template", "pretrain-operator", copy, "--kube-version=1.34.0",
             "--show-only=templates/notes.yaml", "--values=-"],
            input=yaml.safe_dump(values), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return " ".join(yaml.safe_load(done.stdout)["notes"].split())

    return said


@pytest.mark.parametrize(
    ("values", "empty"),
    [
        ({}, "image.registry and trainerImage.registry"),
        ({"image": {"registry": "a.example"}}, "trainerImage.registry"),
        ({"image": {"repository": "a.example/b"}, "trainerImage": {"registry": "b"}}, ""),
    ],
)
def test_images_that_nobody_has_published_are_warned_of(
    notes: Callable[..., str], values: dict[str, Any], empty: str
) -> None:
    said = notes(values)
    assert ("WARNING" in said) is bool(empty)
    assert f"nothing is set for {empty}." in said or not empty


def test_what_deletes_every_job_says_so(notes: Callable[..., str]) -> None:
    before, command, _ = notes({}).partition("kubectl delete crd")
    assert command
    assert "every job in every namespace" in before
    assert "kubectl delete crd" not in notes({"crds": {"keep": False}})
