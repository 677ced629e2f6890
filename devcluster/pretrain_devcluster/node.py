"""One node: a process namespace on the bridge with containerd, kube-proxy and kubelet inside.

A node can be lost and cut off like a machine. `kill` takes its power away: processes and network
vanish in the same instant and nobody is told. `cut` pulls its cable: everything on it runs on.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain_devcluster import cgroups, configs, control, daemons, network, node_init, pki
from pretrain_devcluster.binaries import Binaries
from pretrain_devcluster.daemons import Daemon
from pretrain_devcluster.layout import REGISTRY_ENDPOINT, Layout, NodeHost
from pretrain_devcluster.shell import DevclusterError, run

NodeState = Literal["running", "cut", "down"]

# Folders that the node's programs hard-code, each covered by one of the node's own.
_MADE_TO_BE_COVERED = ("/var/lib/cni", "/var/lib/kubelet")
_COVERED = (*_MADE_TO_BE_COVERED, "/var/lib/containerd", "/var/log")


@dataclass(frozen=True)
class Node:
    """Handle of one node; it holds no state, so any number of them may exist."""

    layout: Layout
    binaries: Binaries
    host: NodeHost

    @property
    def name(self) -> str:
        """The node's name in Kubernetes."""
        return self.host.name

    @property
    def folder(self) -> Path:
        """Where the node's own files are on the machine."""
        return self.layout.node(self.name)

    @property
    def state(self) -> NodeState:
        """What the machine knows of the node, which may be ahead of what Kubernetes knows."""
        if daemons.running(self.layout, self.name) is None:
            return "down"
        return "running" if network.connected(self.host) else "cut"

    def start(self, nodes: int | None = None) -> None:
        """Boots the node, unless it runs; its images survive, all else is as after a boot.

        Args:
            nodes: how many nodes share the machine's memory; None leaves the share as it was.
        """
        if self.state == "cut":
            self.heal()
        if self.state == "running" and not self._outdated():
            return
        self.kill()
        self._write_configs(nodes)
        network.ensure_host(self.host)
        cgroups.ensure(self.host.cgroup, cgroups.machine_hierarchies())
        daemons.ensure(self.layout, self._daemon())

    def kill(self) -> None:
        """Takes the node's power away: a silent loss, noticed by Kubernetes after 20 s."""
        daemons.stop(self.layout, self.name, sharply=True)
        daemons.kill_members(self.host.netns)
        network.remove_host(self.host)

    def cut(self) -> None:
        """Cuts the node off from the network while everything on it runs on."""
        self._require_running()
        network.connect(self.host, connected=False)

    def heal(self) -> None:
        """Connects the node again."""
        self._require_running()
        network.connect(self.host, connected=True)

    def ctr(self, *words: str) -> str:
        """Runs containerd's own client on the node, where pods' images are, and returns its stdout.

        Raises:
            CommandError: it ended with a non-zero status.
        """
        self._require_running()
        return run(*self._enter(), "ctr", "--namespace", "k8s.io", *words)

    def on_machine(self, path: str) -> Path:
        """Translates a path below one of the node's own folders to the machine's path."""
        return self._own(path)

    def _enter(self) -> list[str]:
        """The node's process 1 is the only child of its daemon, and has the node's mounts."""
        pid = daemons.running(self.layout, self.name)
        init = Path(f"/proc/{pid}/task/{pid}/children").read_text().strip()
        return ["nsenter", f"--target={init}", "--mount", "--"]

    def _require_running(self) -> None:
        if self.state == "down":
            raise DevclusterError(f"{self.name} is down: start it first")

    def _daemon(self) -> Daemon:
        isolate = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
        init = (sys.executable, "-I", node_init.__file__, str(self._file("node.json")))
        return Daemon(self.name, self.host, (*isolate, *init))

    def _outdated(self) -> bool:
        """Whether the node runs other programs than those that would be started now."""
        file = self._file("node.json")
        return not file.exists() or file.read_text() != self._description()

    def _file(self, name: str) -> Path:
        return self.folder / "etc" / name

    def _description(self) -> str:
        """Renders the input of `node_init`."""
        containerd = ["containerd", "--config", str(self._file("containerd.toml"))]
        proxy = [
            self.binaries.kube("kube-proxy"), f"--config={self._file('kube-proxy.json')}",
        ]  # fmt: skip
        kubelet = [
            self.binaries.kube("kubelet"),
            f"--config={self._file('kubelet.json')}",
            f"--kubeconfig={control.kubeconfig_file(self.layout, pki.kubelet(self.host))}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.host.address}",
        ]
        programs = [
            self._program("containerd", containerd),
            self._program("kube-proxy", proxy),
            self._program("kubelet", kubelet, after=configs.CONTAINERD_SOCKET),
        ]
        binds = [(str(self._own(target)), target) for target in _COVERED]
        return configs.as_json({"hostname": self.name, "binds": binds, "programs": programs})

    def _own(self, target: str) -> Path:
        """The node's own folder behind a folder of the machine."""
        return self.folder / target.removeprefix("/")

    def _program(self, name: str, argv: list[str], after: str | None = None) -> node_init.Program:
        log = daemons.log_file(self.layout, f"{self.name}-{name}")
        return {"argv": argv, "log": str(log), "after": after}

    def _write_configs(self, nodes: int | None) -> None:
        for folder in (*_COVERED, *(self._own(target) for target in _COVERED)):
            Path(folder).mkdir(parents=True, exist_ok=True)
        certs = self._file("certs.d") / REGISTRY_ENDPOINT
        cni = self._file("cni")
        for folder in (certs, cni, self.layout.logs):
            folder.mkdir(parents=True, exist_ok=True)
        control.write_kubeconfig(self.layout, pki.kubelet(self.host))
        (certs / "hosts.toml").write_text(configs.registry_mirror())
        (cni / "pods.conflist").write_text(configs.cni(self.host))
        self._file("containerd.toml").write_text(
            configs.containerd(pause_image(self.binaries), certs.parent, cni)
        )
        proxy_user = control.kubeconfig_file(self.layout, pki.PROXY)
        self._file("kube-proxy.json").write_text(configs.kube_proxy(self.host, proxy_user))
        if nodes is not None or not self._file("kubelet.json").exists():
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            text = configs.kubelet(self.layout, self.host, memory, nodes or 1)
            self._file("kubelet.json").write_text(text)
        self._file("node.json").write_text(self._description())


def remove_mount_points() -> None:
    """Removes the folders of the machine that were made only to be covered, if they are empty."""
    for folder in _MADE_TO_BE_COVERED:
        with contextlib.suppress(OSError):  # not there, or somebody else's as it is not empty
            Path(folder).rmdir()


def pause_image(binaries: Binaries) -> str:
    """Reference of the image that holds a pod's namespaces, one per build of the binaries."""
    return f"{REGISTRY_ENDPOINT}/pause:{binaries.hyperkube.name.rpartition('-')[2]}"


def ready_nodes(node_list: str) -> set[str]:
    """Names the nodes that are Ready, from the JSON of `kubectl get nodes`."""
    return {
        item["metadata"]["name"]
        for item in json.loads(node_list)["items"]
        for condition in item["status"].get("conditions", [])
        if condition["type"] == "Ready" and condition["status"] == "True"
    }
