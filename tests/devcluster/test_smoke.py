"""The real cluster does what the project's other tests take for granted."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator

import pytest

from pretrain_devcluster import Cluster
from pretrain_devcluster.shell import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NAMESPACE = "devcluster-smoke"
MEET = textwrap.dedent(
    """
    import os, pathlib, socket, time
    mine, other = os.environ["MINE"], os.environ["OTHER"]
    shared = pathlib.Path("/shared")
    (shared / mine).write_text(f"written on {mine}")
    pathlib.Path("/dev/shm/word").write_text("in memory")
    deadline = time.monotonic() + 150
    while not (shared / other).exists():
        if time.monotonic() > deadline:
            raise SystemExit("the other pod wrote nothing")
        time.sleep(0.1)
    print((shared / other).read_text())
    print(socket.gethostbyname("kubernetes.default.svc.cluster.local"))
    begin = time.monotonic()
    try:
        socket.gethostbyname("nowhere.invalid")
    except socket.gaierror:
        print("refused at once" if time.monotonic() - begin < 2 else "refused late")
    print(os.getuid(), os.stat(shared / mine).st_gid)
    """
)


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return Cluster.up(nodes=2)


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    document = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": labels},
    }
    cluster.kubectl("apply", "-f", "-", text=json.dumps(document))
    yield NAMESPACE
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def claim(name: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }


def restricted_pod(image: str, node: str, other: str, claim_name: str) -> dict[str, object]:
    """As strict as a pod can be: what runs here runs under any policy."""
    container = {
        "name": "main",
        "image": image,
        "command": ["python3", "-c", MEET],
        "env": [{"name": "MINE", "value": node}, {"name": "OTHER", "value": other}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "shared", "mountPath": "/shared"},
            {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"on-{node}", "namespace": NAMESPACE},
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "runAsGroup": 10001,
                "fsGroup": 10002,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": claim_name}},
                {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
            ],
        },
    }


def test_restricted_pods_on_two_nodes_share_a_claim_and_resolve_names(
    cluster: Cluster, namespace: str
) -> None:
    image = cluster.base_image(quiet=True)
    items = [
        claim("shared"),
        restricted_pod(image, "node1", "node2", "shared"),
        restricted_pod(image, "node2", "node1", "shared"),
    ]
    document = {"apiVersion": "v1", "kind": "List", "items": items}
    cluster.kubectl("apply", "-f", "-", text=json.dumps(document))
    in_namespace = ("--namespace", namespace)
    for node, other in (("node1", "node2"), ("node2", "node1")):
        cluster.kubectl(
            "wait", *in_namespace, f"pod/on-{node}", "--for=jsonpath={.status.phase}=Succeeded",
            "--timeout=180s",  # both nodes pull the image, at once and from one disk
        )  # fmt: skip
        assert cluster.kubectl("logs", *in_namespace, f"on-{node}").splitlines() == [
            f"written on {other}",
            "10.96.0.1",
            "refused at once",
            "10001 10002",
        ]


def test_the_folder_of_a_deleted_claim_is_removed(cluster: Cluster, namespace: str) -> None:
    in_namespace = ("--namespace", namespace)
    cluster.kubectl("apply", "-f", "-", text=json.dumps(claim("short-lived")))
    cluster.kubectl(
        "wait", *in_namespace, "pvc/short-lived", "--for=jsonpath={.status.phase}=Bound",
        "--timeout=20s",
    )  # fmt: skip
    volume = cluster.kubectl(
        "get", *in_namespace, "pvc/short-lived", "--output", "jsonpath={.spec.volumeName}"
    )
    folder = cluster.layout.volumes / volume
    assert folder.is_dir()
    cluster.kubectl("delete", *in_namespace, "pvc/short-lived")
    wait_until(lambda: not folder.exists(), "the volume's folder is removed", 20)


@pytest.mark.parametrize(
    ("lose", "recover"),
    [
        pytest.param("cut", "heal", id="cable"),
        pytest.param("kill", "start", id="power"),
    ],
)
def test_a_lost_node_is_noticed_and_comes_back(cluster: Cluster, lose: str, recover: str) -> None:
    node = cluster.node("node2")
    actions: dict[str, Callable[[], None]] = {
        "cut": node.cut,
        "heal": node.heal,
        "kill": node.kill,
        "start": node.start,
    }
    assert node.name in cluster.ready_nodes()
    actions[lose]()
    try:
        wait_until(lambda: node.name not in cluster.ready_nodes(), "the loss is noticed", 40)
        assert "node1" in cluster.ready_nodes()
    finally:
        actions[recover]()
    wait_until(lambda: node.name in cluster.ready_nodes(), "the node is Ready again", 40)
