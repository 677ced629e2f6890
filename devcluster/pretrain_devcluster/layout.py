"""Names, addresses and folders: everything about the cluster that never changes.

The cluster is a handful of network namespaces on one bridge, and the bridge lives in a namespace
too. The machine's own namespace holds a single interface, the end of a cable to that bridge, and is
only ever a client: nothing on the machine forwards, masquerades or listens for the cluster, so no
firewall rule of the machine matters to it and none has to be removed afterwards.

    machine (172.30.0.1) ----+
                             |                 +-- control   172.30.0.2   etcd, API server, DNS, ...
                            lan (bridge) ------+-- registry  172.30.0.3
                                               +-- node1     172.30.0.11  pods 10.88.1.0/24
                                               +-- node2     172.30.0.12  pods 10.88.2.0/24
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PREFIX = "pretrain-"  # of every network namespace the cluster makes
LAN = f"{PREFIX}lan"
BRIDGE = "lan0"
MACHINE_INTERFACE = "pretrain0"
CGROUP = "pretrain"  # parent of every node's control group

SUBNET = "172.30.0.0/24"
MACHINE_ADDRESS = "172.30.0.1"
POD_RANGE = "10.88.0.0/16"
SERVICE_RANGE = "10.96.0.0/16"
API_SERVICE_ADDRESS = "10.96.0.1"
DNS_ADDRESS = "10.96.0.10"
DOMAIN = "cluster.local"
API_PORT = 6443
REGISTRY_PORT = 5000
PROVISIONER = "pretrain.dev/folders"
MAX_NODES = 9  # one digit of the addresses below; every host gets a route to all of them


@dataclass(frozen=True)
class Host:
    """One network namespace on the bridge, with one address.

    Attributes:
        name: short name, also of its bridge port; at most 15 characters.
        address: IPv4 address in `SUBNET`.
    """

    name: str
    address: str

    @property
    def netns(self) -> str:
        """Name of the network namespace, as `ip netns` lists it."""
        return PREFIX + self.name


CONTROL = Host("control", "172.30.0.2")
REGISTRY = Host("registry", "172.30.0.3")
REGISTRY_ENDPOINT = f"{REGISTRY.address}:{REGISTRY_PORT}"
API_URL = f"https://{CONTROL.address}:{API_PORT}"


@dataclass(frozen=True)
class NodeHost(Host):
    """A host that runs a kubelet, with a pod range of its own."""

    index: int

    @property
    def pod_range(self) -> str:
        """The node's share of `POD_RANGE`."""
        return f"10.88.{self.index}.0/24"

    @property
    def cgroup(self) -> str:
        """Path below every controller's root."""
        return f"/{CGROUP}/{self.name}"


def node_host(index: int) -> NodeHost:
    """Returns the host of node number `index`, counted from 1."""
    if not 1 <= index <= MAX_NODES:
        raise ValueError(f"node number {index} is not between 1 and {MAX_NODES}")
    return NodeHost(f"node{index}", f"172.30.0.{10 + index}", index)


ALL_NODE_HOSTS = tuple(node_host(index) for index in range(1, MAX_NODES + 1))


@dataclass(frozen=True)
class Layout:
    """Where things are on disk. `root` is the only choice; the rest follows from it."""

    root: Path

    @staticmethod
    def default() -> Layout:
        """The layout below `$XDG_CACHE_HOME`, or `~/.cache` where that is unset."""
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Layout(Path(cache) / "pretrain-operator")

    @property
    def binaries(self) -> Path:
        """One folder per build, named by the hash of its sources."""
        return self.root / "bin"

    @property
    def state(self) -> Path:
        """All that belongs to the cluster, running or not."""
        return self.root / "devcluster"

    @property
    def run(self) -> Path:
        """Process records and the lock."""
        return self.state / "run"

    @property
    def logs(self) -> Path:
        """One log file per process."""
        return self.state / "logs"

    @property
    def pki(self) -> Path:
        """Certificates, keys and kubeconfig files; readable by root only."""
        return self.state / "pki"

    @property
    def config(self) -> Path:
        """Rendered configuration files."""
        return self.state / "config"

    @property
    def path(self) -> Path:
        """Folder with kubectl and helm only, fit to be put into PATH."""
        return self.state / "path"

    @property
    def etcd(self) -> Path:
        """The cluster's database."""
        return self.state / "etcd"

    @property
    def volumes(self) -> Path:
        """One folder per provisioned PersistentVolume."""
        return self.state / "volumes"

    @property
    def registry(self) -> Path:
        """Image registry storage; outlives the cluster."""
        return self.state / "registry"

    @property
    def buildah(self) -> Path:
        """Image build storage; outlives the cluster."""
        return self.state / "buildah"

    @property
    def nodes(self) -> Path:
        """One folder per node; its images outlive the cluster."""
        return self.state / "nodes"

    @property
    def kubeconfig(self) -> Path:
        """Administrator's kubeconfig."""
        return self.state / "kubeconfig"

    def node(self, name: str) -> Path:
        """Folder of one node, with what a machine would have below /var."""
        return self.nodes / name
