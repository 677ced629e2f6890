"""Configuration files and command lines of every program, rendered by pure functions.

JSON stands in for YAML throughout: every JSON document is a YAML document, and the standard library
writes JSON.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from pretrain_devcluster import pki
from pretrain_devcluster.layout import (
    API_PORT,
    API_URL,
    CONTROL,
    DNS_ADDRESS,
    DOMAIN,
    POD_RANGE,
    PROVISIONER,
    REGISTRY,
    REGISTRY_ENDPOINT,
    REGISTRY_PORT,
    SERVICE_RANGE,
    Layout,
    NodeHost,
)

CNI_BINARIES = Path("/usr/lib/cni")
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
MIB = 2**20
# Kept for the machine itself and the control plane, never offered to pods.
CONTROL_PLANE_MEMORY = 2048 * MIB
_ETCD_URL = "http://127.0.0.1:2379"


def as_json(document: object) -> str:
    """Renders a document for people to read."""
    return json.dumps(document, indent=1) + "\n"


def kubeconfig(authority: bytes, certificate: bytes, key: bytes) -> str:
    """Renders a kubeconfig that needs no other file. Arguments are PEM text."""

    def encode(pem: bytes) -> str:
        return base64.b64encode(pem).decode()

    name = "pretrain-devcluster"
    cluster = {"server": API_URL, "certificate-authority-data": encode(authority)}
    user = {"client-certificate-data": encode(certificate), "client-key-data": encode(key)}
    return as_json({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    })  # fmt: skip


def _flags(options: dict[str, object]) -> tuple[str, ...]:
    """Renders command line flags, booleans in Go's spelling."""

    def spell(value: object) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return tuple(f"--{name}={spell(value)}" for name, value in options.items())


def etcd_flags(layout: Layout) -> tuple[str, ...]:
    """No fsync: the database of a development cluster may be lost with the machine's power."""
    return _flags({
        "name": "devcluster",
        "data-dir": layout.etcd,
        "listen-client-urls": _ETCD_URL,
        "advertise-client-urls": _ETCD_URL,
        "listen-peer-urls": "http://127.0.0.1:2380",
        "unsafe-no-fsync": True,
        "log-level": "warn",
    })  # fmt: skip


def api_server_flags(layout: Layout) -> tuple[str, ...]:
    """Aggregator routing lets webhooks be called without a kube-proxy beside the API server."""
    return _flags({
        "etcd-servers": _ETCD_URL,
        "advertise-address": CONTROL.address,
        "bind-address": CONTROL.address,
        "secure-port": API_PORT,
        "service-cluster-ip-range": SERVICE_RANGE,
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "enable-aggregator-routing": True,
        "allow-privileged": True,
        "client-ca-file": pki.AUTHORITY.certificate(layout),
        "tls-cert-file": pki.API_SERVER.certificate(layout),
        "tls-private-key-file": pki.API_SERVER.key(layout),
        "kubelet-certificate-authority": pki.AUTHORITY.certificate(layout),
        "kubelet-client-certificate": pki.KUBELET_CLIENT.certificate(layout),
        "kubelet-client-key": pki.KUBELET_CLIENT.key(layout),
        # Nodes' names are not in any DNS that the API server asks.
        "kubelet-preferred-address-types": "InternalIP",
        "service-account-issuer": f"https://kubernetes.default.svc.{DOMAIN}",
        "service-account-key-file": pki.service_account_key(layout),
        "service-account-signing-key-file": pki.service_account_key(layout),
    })  # fmt: skip


def controller_manager_flags(layout: Layout, kubeconfig_file: Path) -> tuple[str, ...]:
    """A lost node is noticed after 20 s, half of the stock value: tests wait for it."""
    return _flags({
        "kubeconfig": kubeconfig_file,
        "authentication-kubeconfig": kubeconfig_file,
        "authorization-kubeconfig": kubeconfig_file,
        "bind-address": "127.0.0.1",
        "leader-elect": False,
        "use-service-account-credentials": True,
        "root-ca-file": pki.AUTHORITY.certificate(layout),
        "service-account-private-key-file": pki.service_account_key(layout),
        "node-monitor-grace-period": "20s",
    })  # fmt: skip


def scheduler_flags(kubeconfig_file: Path) -> tuple[str, ...]:
    """The scheduler as it is."""
    return _flags({
        "kubeconfig": kubeconfig_file,
        "authentication-kubeconfig": kubeconfig_file,
        "authorization-kubeconfig": kubeconfig_file,
        "bind-address": "127.0.0.1",
        "leader-elect": False,
    })  # fmt: skip


def provisioner_flags(layout: Layout, kubeconfig_file: Path) -> tuple[str, ...]:
    """The volume provisioner of this cluster's own."""
    return _flags({"kubeconfig": kubeconfig_file, "name": PROVISIONER, "root": layout.volumes})


def corefile(kubeconfig_file: Path) -> str:
    """Names of the cluster are answered, all others do not exist.

    The cluster reaches nothing outside itself, and saying so at once beats a resolver's time-out.
    Nothing is cached: a pod that was just made must be found by its peers.
    """
    return f"""\
{DOMAIN}:53 in-addr.arpa:53 {{
    bind {CONTROL.address}
    errors
    health 127.0.0.1:8080
    ready 127.0.0.1:8181
    kubernetes {DOMAIN} in-addr.arpa {{
        kubeconfig {kubeconfig_file}
        pods verified
        ttl 5
    }}
}}
.:53 {{
    bind {CONTROL.address}
    errors
    template ANY ANY . {{
        rcode NXDOMAIN
    }}
}}
"""


def registry(layout: Layout) -> str:
    """The image registry: plain http, because only this machine can reach it."""
    return as_json({
        "version": "0.1",
        "log": {"level": "warn"},
        "storage": {
            "filesystem": {"rootdirectory": str(layout.registry)},
            "delete": {"enabled": True},
        },
        "http": {"addr": f"{REGISTRY.address}:{REGISTRY_PORT}"},
    })  # fmt: skip


def registry_mirror() -> str:
    """Tells containerd to speak plain http to the registry."""
    return f'[host."http://{REGISTRY_ENDPOINT}"]\ncapabilities = ["pull", "resolve"]\n'


def containerd(pause_image: str, certs_folder: Path, cni_folder: Path) -> str:
    """Puts containerd at its standard paths: every node sees folders of its own there.

    Layer archives are dropped once unpacked (a node needs only what it runs), and no container may
    ask for a lower out-of-memory score than containerd has, which some machines would refuse.
    """
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""\
version = 2
disabled_plugins = [
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{CONTAINERD_SOCKET}"
[{cri}]
sandbox_image = "{pause_image}"
restrict_oom_score_adj = true
max_concurrent_downloads = 4
[{cri}.containerd]
discard_unpacked_layers = true
[{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[{cri}.cni]
bin_dir = "{CNI_BINARIES}"
conf_dir = "{cni_folder}"
[{cri}.registry]
config_path = "{certs_folder}"
"""


def cni(host: NodeHost) -> str:
    """Pods hang on cables of their own and everything is routed.

    With one bridge for all pods of a node, replies between two of them would bypass the address
    translation of Services unless the kernel's bridge filter were loaded; routing needs no such
    thing.
    """
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": host.pod_range}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return as_json({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {"type": "ptp", "ipam": ipam},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    })  # fmt: skip


def kubelet(layout: Layout, host: NodeHost, machine_memory: int, nodes: int) -> str:
    """The kubelet's configuration.

    Processors are promised to every node in full, so the machine is overcommitted on purpose: pods
    would otherwise ask for quarters of a processor. Memory is divided, because running out of it
    kills.

    Args:
        layout: where certificates are.
        host: the node.
        machine_memory: bytes.
        nodes: number of nodes that share the machine.
    """
    identity = pki.kubelet(host)
    share = max(machine_memory - CONTROL_PLANE_MEMORY, 0) // nodes
    return as_json({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki.AUTHORITY.certificate(layout))},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(identity.certificate(layout)),
        "tlsPrivateKeyFile": str(identity.key(layout)),
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": host.cgroup,
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": DOMAIN,
        "resolvConf": "",
        "systemReserved": {"memory": str(machine_memory - share)},
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "maxPods": 100,
        "serializeImagePulls": False,
        "nodeStatusUpdateFrequency": "5s",
        "imageGCHighThresholdPercent": 99,
        "imageGCLowThresholdPercent": 98,
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
            "nodefs.inodesFree": "1%",
        },
    })  # fmt: skip


def kube_proxy(host: NodeHost, kubeconfig_file: Path) -> str:
    """kube-proxy's configuration; the kernel's connection table is not its to resize."""
    return as_json({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clusterCIDR": POD_RANGE,
        "hostnameOverride": host.name,
        "clientConnection": {"kubeconfig": str(kubeconfig_file)},
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
        "oomScoreAdj": 0,
    })  # fmt: skip
