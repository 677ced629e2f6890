"""The cluster as a whole: bring it up over whatever is there, take it down to nothing."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pretrain_devcluster import (
    binaries,
    cgroups,
    control,
    daemons,
    images,
    network,
    pki,
    preflight,
    seeding,
    sysctls,
)
from pretrain_devcluster.binaries import Binaries
from pretrain_devcluster.layout import MAX_NODES, REGISTRY_ENDPOINT, Layout, node_host
from pretrain_devcluster.node import Node, ready_nodes, remove_mount_points
from pretrain_devcluster.shell import DevclusterError, Progress, run, wait_until

# Made for one cluster and gone with it; images and binaries are kept for the next one.
_PER_CLUSTER = ("config", "etcd", "logs", "pki", "run", "volumes")
_PER_BOOT = ("etc", "var/lib/cni", "var/lib/kubelet", "var/log")


@dataclass(frozen=True)
class Cluster:
    """Handle of the machine's one cluster.

    Attributes:
        layout: where its files are.
        binaries: the programs it runs.
    """

    layout: Layout
    binaries: Binaries

    @staticmethod
    def up(nodes: int = 2, quiet: bool = False) -> Cluster:
        """Brings the cluster up, or does nothing when it is up, and returns its handle.

        Args:
            nodes: how many nodes there are to be at least, 1 to 9.
            quiet: print no progress.

        Raises:
            DevclusterError: the machine lacks something; the message says what to do.
        """
        return _up(Layout.default(), nodes, Progress(quiet))

    @staticmethod
    def current() -> Cluster:
        """Returns the handle of the running cluster.

        Raises:
            DevclusterError: there is none.
        """
        layout = Layout.default()
        control.require_running(layout)
        return Cluster(layout, binaries.locate(layout))

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig file."""
        return self.layout.kubeconfig

    @property
    def registry(self) -> str:
        """Address of the image registry, as the first part of an image reference."""
        return REGISTRY_ENDPOINT

    @property
    def environment(self) -> dict[str, str]:
        """Variables for tools: KUBECONFIG, REGISTRY, and the folder to put first into PATH."""
        return {
            "KUBECONFIG": str(self.kubeconfig),
            "REGISTRY": self.registry,
            "PATH": str(self.layout.path),
        }

    def kubectl(self, *words: str, text: str | None = None) -> str:
        """Runs kubectl as administrator and returns its stdout; `text` goes to its stdin.

        Raises:
            CommandError: kubectl ended with a non-zero status.
        """
        return control.kubectl(self.layout, self.binaries, *words, text=text)

    def helm(self, *words: str) -> str:
        """Runs helm as administrator and returns its stdout.

        Raises:
            CommandError: helm ended with a non-zero status.
        """
        return run(self.binaries.tools / "helm", "--kubeconfig", self.kubeconfig, *words)

    @property
    def nodes(self) -> list[Node]:
        """All nodes, lost ones included, in order."""
        hosts = (node_host(index) for index in range(1, MAX_NODES + 1))
        folders = [host for host in hosts if self.layout.node(host.name).joinpath("etc").exists()]
        return [Node(self.layout, self.binaries, host) for host in folders]

    def node(self, name: str) -> Node:
        """Returns the node of that name.

        Raises:
            DevclusterError: there is none.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(node.name for node in self.nodes)
        raise DevclusterError(f"there is no node {name!r}: the nodes are {known}")

    def ready_nodes(self) -> set[str]:
        """Names of the nodes that Kubernetes holds for Ready."""
        return ready_nodes(self.kubectl("get", "nodes", "--output", "json"))

    def build(
        self, source: Path, targets: Sequence[str] = images.TARGETS, quiet: bool = False
    ) -> dict[str, str]:
        """Builds targets of `source`/Dockerfile and gives them to the registry and all nodes.

        Returns:
            References by digest, by target.

        Raises:
            CommandError: the build failed; the message has the end of its output.
        """
        progress = Progress(quiet)
        references = images.build(self.layout, source, targets, progress)
        for target in targets:
            self._seed(images.built_image(target))
        progress.say("the images are in the registry and on the nodes")
        return references

    def base_image(self, quiet: bool = False) -> str:
        """Makes the base image, pushes it and returns its reference by digest."""
        base = images.ensure_base(self.layout, Progress(quiet))
        return images.publish(self.layout, base, "pretrain-base")

    def _seed(self, image: str) -> None:
        layers = seeding.layers_of(self.layout, image)
        running = [node for node in self.nodes if node.state == "running"]
        _in_parallel(*(lambda node=node: seeding.seed(node, layers) for node in running))


def _up(layout: Layout, nodes: int, progress: Progress) -> Cluster:
    node_names = [node_host(index).name for index in range(1, nodes + 1)]
    preflight.check(layout)
    with locked(layout, progress):
        cluster = Cluster(layout, binaries.locate(layout))
        if _complete(cluster, node_names):
            progress.say(f"the cluster is up: {', '.join(sorted(cluster.ready_nodes()))}")
            return cluster
        progress.say("bringing the cluster up; it changes on this machine:")
        for line in preflight.changes(layout, node_names):
            progress.say(f"  - {line}")
        _in_parallel(
            lambda: preflight.install_packages(progress),
            lambda: binaries.ensure(layout, progress),
        )
        _start(cluster, nodes, progress)
    return cluster


def _complete(cluster: Cluster, node_names: list[str]) -> bool:
    """Whether everything runs, with the present binaries, and is Ready: a second's check."""
    layout = cluster.layout
    if not cluster.binaries.built or preflight.missing_packages():
        return False
    names = control.daemon_names(layout, cluster.binaries)
    if any(daemons.running(layout, name) is None for name in names):
        return False
    nodes = {node.name: node for node in cluster.nodes}
    if any(name not in nodes or nodes[name].state != "running" for name in node_names):
        return False
    return cluster.ready_nodes().issuperset(node_names)


def _start(cluster: Cluster, nodes: int, progress: Progress) -> None:
    layout = cluster.layout
    hosts = [node_host(index) for index in range(1, nodes + 1)]
    sysctls.remember(layout)
    network.ensure_lan()
    pki.ensure(layout, hosts)
    control.write_configs(layout)
    progress.say("starting the control plane and the registry")
    control.start_storage(layout, cluster.binaries)
    progress.say(f"starting {nodes} nodes")
    _in_parallel(
        lambda: control.start_clients(layout, cluster.binaries),
        lambda: images.ensure_pause(layout, cluster.binaries),
        *(lambda host=host: Node(layout, cluster.binaries, host).start(nodes) for host in hosts),
    )
    wanted = {host.name for host in hosts}
    wait_until(
        lambda: cluster.ready_nodes() >= wanted,
        f"all nodes are Ready (logs are in {layout.logs})",
        90,
    )
    progress.say(f"the cluster is up: {', '.join(sorted(wanted))}")


def down(layout: Layout, purge: bool, progress: Progress) -> None:
    """Removes every process, namespace, interface, mount and control group of the cluster.

    Args:
        layout: where the cluster's files are.
        purge: also remove images, binaries and everything else below the layout's root.
        progress: gets a few lines.
    """
    with locked(layout, progress):
        progress.say("stopping every process")
        control.stop(layout)
        control.collect_garbage(layout)
        network.remove_all()
        cgroups.remove_all()
        sysctls.restore(layout)
        remove_mount_points()
        _unmount_leftovers(layout)
        for name in _PER_CLUSTER:
            shutil.rmtree(layout.state / name, ignore_errors=True)
        for folder in layout.nodes.glob("*"):
            for name in _PER_BOOT:
                shutil.rmtree(folder / name, ignore_errors=True)
        layout.kubeconfig.unlink(missing_ok=True)
    if purge:
        progress.say("removing images and binaries")
        images.remove_storage(layout)
        shutil.rmtree(layout.root)
    progress.say("the cluster is down")


def _unmount_leftovers(layout: Layout) -> None:
    """Mounts vanish with a node; one left by a crash must go before files behind it are deleted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        target = Path(line.split()[1])
        if target.is_relative_to(layout.nodes):
            run("umount", target)


@contextlib.contextmanager
def locked(layout: Layout, progress: Progress) -> Iterator[None]:
    """Lets one `up` or `down` at a time touch the machine; a second one waits its turn."""
    layout.state.mkdir(parents=True, exist_ok=True)
    with (layout.state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("waiting for another run to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _in_parallel(*actions: Callable[[], object]) -> None:
    """Runs actions at the same time; raises the first one's error once all have ended."""
    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(action) for action in actions]:
            future.result()


def status(layout: Layout) -> dict[str, object]:
    """Describes the cluster: processes, nodes, and bytes on disk that outlive it."""
    programs = binaries.locate(layout)
    cluster = Cluster(layout, programs)
    names = control.daemon_names(layout, programs)
    answering = daemons.running(layout, "kube-apiserver") is not None
    ready = cluster.ready_nodes() if answering else set()
    return {
        "processes": {name: daemons.running(layout, name) for name in names},
        "nodes": {
            node.name: f"{node.state}, {'Ready' if node.name in ready else 'NotReady'}"
            for node in cluster.nodes
        },
        "kubeconfig": str(layout.kubeconfig),
        "registry": REGISTRY_ENDPOINT,
        "folder": str(layout.root),
    }
