"""The release: upgraded, rolled back, removed, put back and doubled, while jobs run."""

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from pretrain_api import names
from pretrain_bench import faults, setup
from pretrain_bench.faults import Scene
from pretrain_bench.jobs import Jobs
from pretrain_bench.trial import newest_start, passed, training
from pretrain_demo.console import Console
from pretrain_demo.install import RELEASE, SYSTEM_NAMESPACE, ensure_namespace, install
from pretrain_demo.target import DemoError, Target, repository
from pretrain_devcluster import Cluster
from pretrain_devcluster.shell import wait_until

pytestmark = pytest.mark.cluster

IN_SYSTEM = f"--namespace={SYSTEM_NAMESPACE}"
CHART = str(repository() / "charts" / RELEASE)
ENDLESS = 1_000_000  # steps


@pytest.fixture(scope="module", autouse=True)
def release(target: Target) -> Iterator[None]:
    """Whatever happens here, other tests find the operator installed as it was."""
    yield
    install(target, Console())


@pytest.fixture(scope="module")
def steady(jobs: Jobs, scene: Callable[[str], Scene]) -> Scene:
    """A job that runs through all of it."""
    jobs.apply("steady", training={"steps": ENDLESS}, checkpoint={"interval": 50})
    made = scene("steady")
    training(made)
    return made


def same_run(scene: Scene) -> Any:
    """What changes if anything is started again: pods, generation and round."""
    pods = frozenset(faults.uid(pod) for pod in scene.running())
    return pods, newest_start(passed(scene, scene.jobs.hear(scene.job).step))


def values_of(target: Target) -> list[str]:
    """Flags that give another release the images of this one."""
    found = json.loads(target.helm("get", "values", RELEASE, IN_SYSTEM, "--output=json"))
    return [f"--set-json={key}={json.dumps(found[key])}" for key in ("image", "trainerImage")]


def wait_for_rollout(target: Target) -> None:
    """Until no old pod is left: helm waits for the new one only."""
    target.kubectl("rollout", "status", f"deployment/{RELEASE}", IN_SYSTEM, "--timeout=2m")


def test_an_upgrade_and_a_rollback_start_nothing_again(steady: Scene, target: Target) -> None:
    before = same_run(steady)
    operator = faults.uid(steady.operator())
    target.helm(
        "upgrade", RELEASE, CHART, IN_SYSTEM, "--reuse-values", "--set=log.level=DEBUG",
        "--wait", "--timeout=3m",
    )  # fmt: skip
    wait_for_rollout(target)
    upgraded = faults.uid(steady.operator())
    assert upgraded != operator
    assert same_run(steady) == before
    target.helm("rollback", RELEASE, IN_SYSTEM, "--wait", "--timeout=3m")
    wait_for_rollout(target)
    assert faults.uid(steady.operator()) not in (operator, upgraded)
    assert same_run(steady) == before


# Prints every program in the image: files that may be run, are for the processor, and no library.
PROGRAMS = """
import os
for folder, _, names in os.walk("/"):
    for path in (os.path.join(folder, name) for name in names):
        if folder.startswith(("/proc", "/sys")) or ".so" in path or os.path.islink(path):
            continue
        if os.access(path, os.X_OK) and open(path, "rb").read(4) == b"\\x7fELF":
            print(os.path.basename(path))
"""


def test_the_operators_image_has_no_program_but_python(target: Target) -> None:
    inside = (IN_SYSTEM, "exec", f"deployment/{RELEASE}", "--")
    programs = target.kubectl(*inside, "python", "-c", PROGRAMS).split()
    assert len(programs) == 1
    assert programs[0].startswith("python3.")
    with pytest.raises(DemoError, match="executable file not found"):
        target.kubectl(*inside, "sh", "-c", "true")
    with pytest.raises(DemoError, match="No module named pip"):
        target.kubectl(*inside, "/usr/bin/python3", "-m", "pip")


SERVED = {
    ("pretrain.dev", "pretrainjobs"): {"get", "list", "watch", "delete"},
    ("pretrain.dev", "pretrainjobs/status"): {"patch"},
    ("", "pods"): {"get", "list", "watch", "create", "patch", "delete"},
    ("", "configmaps"): {"get", "create"},
    ("", "persistentvolumeclaims"): {"get", "create", "patch"},
    ("networking.k8s.io", "networkpolicies"): {"get", "create"},
    ("events.k8s.io", "events"): {"create"},
}
REFUSED = (
    ("", "secrets"),
    ("", "pods/exec"),
    ("", "pods/attach"),
    ("", "pods/ephemeralcontainers"),
    ("", "pods/proxy"),
    ("", "serviceaccounts"),
    ("", "serviceaccounts/token"),
    ("", "namespaces"),
    ("", "persistentvolumes"),
    ("apps", "deployments"),
    ("batch", "jobs"),
    ("rbac.authorization.k8s.io", "roles"),
    ("rbac.authorization.k8s.io", "rolebindings"),
    ("rbac.authorization.k8s.io", "clusterrolebindings"),
    ("apiextensions.k8s.io", "customresourcedefinitions"),
    ("coordination.k8s.io", "leases"),
    ("pretrain.dev", "pretrainjobs/scale"),
)
VERBS = (
    "get", "list", "watch", "create", "update", "patch", "delete", "deletecollection",
    "impersonate", "escalate", "bind",
)  # fmt: skip


def can_i(jobs: Jobs, user: str, groups: list[str], namespace: str, asked: Any) -> bool:
    """What `kubectl auth can-i` asks, without a process for each question."""
    (group, resource), verb = asked
    base, _, part = resource.partition("/")
    attributes = {
        "namespace": namespace, "verb": verb, "group": group, "resource": base, "subresource": part,
    }  # fmt: skip
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "groups": groups, "resourceAttributes": attributes},
    }
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    return json.loads(jobs.client.request("POST", path, review))["status"]["allowed"]


def who_is(account: str) -> tuple[str, list[str]]:
    """User and groups of a service account, namespace/name."""
    where, _, name = account.partition("/")
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{where}", "system:authenticated"]
    return f"system:serviceaccount:{where}:{name}", groups


def rights(jobs: Jobs, account: str, namespace: str) -> dict[tuple[str, str], set[str]]:
    """Verbs that a service account, namespace/name, may do in a namespace, by resource."""
    found: dict[tuple[str, str], set[str]] = {}
    for asked in itertools.product((*SERVED, *REFUSED, ("", "nodes")), VERBS):
        if can_i(jobs, *who_is(account), namespace, asked):
            found.setdefault(asked[0], set()).add(asked[1])
    return found


def test_the_operator_may_do_what_it_needs_and_nothing_else(jobs: Jobs) -> None:
    account = f"{SYSTEM_NAMESPACE}/{RELEASE}"
    assert rights(jobs, account, jobs.namespace) == SERVED | {("", "nodes"): {"get"}}


def test_a_worker_may_do_nothing(jobs: Jobs) -> None:
    assert rights(jobs, f"{jobs.namespace}/default", jobs.namespace) == {}


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("view", {"get", "list", "watch"}),
        ("edit", set(VERBS[:8])),
        ("admin", set(VERBS[:8])),
    ],
)
def test_kubernetes_own_roles_reach_jobs(jobs: Jobs, role: str, expected: set[str]) -> None:
    jobs.kubectl("create", "serviceaccount", f"who-may-{role}")
    binding = (f"--clusterrole={role}", f"--serviceaccount={jobs.namespace}:who-may-{role}")
    jobs.kubectl("create", "rolebinding", f"who-may-{role}", *binding)
    account = f"{jobs.namespace}/who-may-{role}"
    look = (("pretrain.dev", "pretrainjobs"), "get")
    bound = partial(can_i, jobs, *who_is(account), jobs.namespace, look)
    wait_until(bound, "the API server has heard of the binding", 10)
    found = rights(jobs, account, jobs.namespace)
    assert found["pretrain.dev", "pretrainjobs"] == expected
    assert found["pretrain.dev", "pretrainjobs/status"] == {"get"}
    changes = {"patch", "update"} & expected
    assert found["pretrain.dev", "pretrainjobs/scale"] == {"get"} | changes


def test_uninstalled_and_installed_again(steady: Scene, jobs: Jobs, target: Target) -> None:
    before = same_run(steady)
    jobs.apply("orphan")
    jobs.wait("orphan", lambda _: bool(jobs.pods("orphan")))
    target.helm("uninstall", RELEASE, IN_SYSTEM, "--wait")
    # The jobs are still there and train; they can be deleted without an operator.
    assert same_run(steady) == before
    jobs.delete("orphan")
    selector = f"--selector={names.LABEL_JOB}=orphan"
    jobs.kubectl("wait", "pods,configmaps,pvc", selector, "--for=delete", "--timeout=90s")
    install(target, Console())
    step = jobs.hear(steady.job).step
    jobs.wait(steady.job, lambda job: job.step > step, what="progress told by the new operator")
    assert same_run(steady) == before
    jobs.delete(steady.job)


@pytest.fixture
def teams(target: Target, cluster: Cluster) -> Iterator[dict[str, Jobs]]:
    """Two namespaces, each with a release of its own that serves it, and no other release."""
    flags = values_of(target)
    target.helm("uninstall", RELEASE, IN_SYSTEM, "--wait")
    contexts = {team: setup.fresh_namespace(target, cluster, team) for team in ("team-a", "team-b")}
    served = {team: context.__enter__() for team, context in contexts.items()}
    try:
        for team in served:
            ensure_namespace(target, f"{team}-system")
            target.helm(
                "upgrade", "--install", RELEASE, CHART, f"--namespace={team}-system", *flags,
                f"--set-json=watchNamespaces={json.dumps([team])}", "--set=crds.enabled=false",
                "--wait", "--timeout=3m",
            )  # fmt: skip
        yield served
    finally:
        for team, context in contexts.items():
            words = ("uninstall", RELEASE, f"--namespace={team}-system", "--ignore-not-found")
            target.helm(*words, "--wait")
            target.kubectl("delete", "namespace", f"{team}-system", "--wait=false")
            context.__exit__(None, None, None)


def test_two_releases_serve_their_own_namespaces(teams: dict[str, Jobs], jobs: Jobs) -> None:
    jobs.apply("nobodys", training={"steps": 3})
    for served in teams.values():
        served.apply("toy", training={"steps": 3})
    for team, served in teams.items():
        job = served.complete("toy")
        assert job.restarts == 0
        other = "team-b" if team == "team-a" else "team-a"
        account = f"{team}-system/{RELEASE}"
        assert rights(served, account, team) == SERVED
        assert rights(served, account, other) == {}
        assert rights(served, account, "kube-system") == {}
        told = served.kubectl(
            "get", "events", f"--field-selector=involvedObject.kind={names.KIND}",
            "-o", "jsonpath={.items[*].reason}",
        )  # fmt: skip
        assert told.split().count("Created") == 1
    assert jobs.read("nobodys").status.conditions == ()
    jobs.delete("nobodys")
