"""KWOK: nodes that say they are ready, and pods on them that say they run."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain_bench.client import MERGE_PATCH, Client
from pretrain_devcluster.controlplane import ControlPlane, kubeconfig
from pretrain_devcluster.layout import Layout
from pretrain_devcluster.shell import DevclusterError, Progress, run, wait_until

VERSION = "v0.8.0"
POD_RANGE = "127.77.0.1/16"  # of the loopback: workers are asked there and nowhere else
STAGES = Path(__file__).with_name("stages.yaml")
START_SECONDS = 60.0
FAKE = {"kwok.x-k8s.io/node": "fake"}


def ensure(layout: Layout, progress: Progress) -> Path:
    """The program, built if it isn't there. Raises DevclusterError if that fails."""
    folder = layout.binaries / f"kwok-{VERSION}"
    if not (folder / "kwok").exists():
        progress.say(f"building KWOK {VERSION} (about 2 minutes on two cores, once)")
        environment = {**os.environ, "CGO_ENABLED": "0", "GOBIN": str(folder)}
        run("go", "install", f"sigs.k8s.io/kwok/cmd/kwok@{VERSION}", env=environment)
    return folder / "kwok"


@contextmanager
def nodes(plane: ControlPlane, client: Client, count: int, folder: Path) -> Iterator[None]:
    """So many ready nodes, with room for everything, for as long as the context lasts.

    Raises DevclusterError if they don't become ready.
    """
    program = ensure(Layout.default(), Progress())
    config = folder / "kwok-kubeconfig"
    config.write_text(kubeconfig(plane.url, plane.token, plane.authority))
    flags = (f"--kubeconfig={config}", f"--config={STAGES}", "--manage-all-nodes=true",
             f"--cidr={POD_RANGE}", "--node-lease-duration-seconds=40")  # fmt: skip
    with (folder / "kwok.log").open("wb") as log:
        argv = ["setpriv", "--pdeathsig", "KILL", str(program), *flags]
        process = subprocess.Popen(argv, stdout=log, stderr=log, cwd=folder)
    try:
        for number in range(count):
            client.request("POST", "/api/v1/nodes", _node(f"pretended-{number}"))
        try:
            wait_until(lambda: _all_ready(client), "pretended nodes are ready", START_SECONDS)
        except DevclusterError as error:
            words = (folder / "kwok.log").read_text(errors="replace")[-1500:]
            raise DevclusterError(f"{error}; KWOK says:\n{words}") from error
        for number in range(count):  # the API server taints a new node, and no controller is here
            path = f"/api/v1/nodes/pretended-{number}"
            client.request("PATCH", path, {"spec": {"taints": None}}, MERGE_PATCH)
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _all_ready(client: Client) -> bool:
    nodes = client.get("/api/v1/nodes")["items"]
    ready = {"type": "Ready", "status": "True"}
    told = (node["status"].get("conditions", ()) for node in nodes)
    return all(any(ready.items() <= each.items() for each in conditions) for conditions in told)


def _node(name: str) -> dict[str, object]:
    room = {"cpu": "1000", "memory": "4Ti", "pods": "1000"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "annotations": FAKE, "labels": {"kubernetes.io/hostname": name}},
        "status": {"allocatable": room, "capacity": room},
    }
