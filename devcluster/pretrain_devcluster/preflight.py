"""Look before leaping: what `up` needs of the machine, and what it will change on it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from pretrain_devcluster import binaries, network
from pretrain_devcluster.layout import (
    BRIDGE,
    CGROUP,
    LAN,
    MACHINE_ADDRESS,
    MACHINE_INTERFACE,
    PREFIX,
    SUBNET,
    Layout,
)
from pretrain_devcluster.shell import DevclusterError, Progress, run, succeeds

GIB = 2**30
COLD_DISK = 12 * GIB  # Go caches and binaries; images come on top and `build` asks for them
WARM_DISK = 2 * GIB

# A file that each Debian package brings: looking for it is instant and needs no package database.
PACKAGES = {
    "buildah": "/usr/bin/buildah",
    "conntrack": "/usr/sbin/conntrack",
    "containerd": "/usr/bin/containerd",
    "containernetworking-plugins": "/usr/lib/cni/ptp",
    "debootstrap": "/usr/sbin/debootstrap",
    "docker-registry": "/usr/bin/docker-registry",
    "ethtool": "/usr/sbin/ethtool",
    "iproute2": "/usr/sbin/ip",
    "ipset": "/usr/sbin/ipset",
    "iptables": "/usr/sbin/iptables",
    "openssl": "/usr/bin/openssl",
    "runc": "/usr/sbin/runc",
    "socat": "/usr/bin/socat",
    "util-linux": "/usr/bin/nsenter",
}


def missing_packages() -> list[str]:
    """Names the Debian packages that `up` would install."""
    return [name for name, file in PACKAGES.items() if not Path(file).exists()]


def check(layout: Layout) -> None:
    """Checks rights, compiler and disk.

    Raises:
        DevclusterError: something is missing; the message says what and what to do.
    """
    if os.geteuid() != 0:
        raise DevclusterError(
            "the cluster makes network namespaces and mounts: run it as root (sudo -E)"
        )
    if not succeeds("unshare", "--mount", "--net", "--pid", "--fork", "true"):
        raise DevclusterError(
            "this root may not make namespaces: run on a machine or in a privileged container"
        )
    _check_compiler()
    require_disk(layout, WARM_DISK if layout.binaries.exists() else COLD_DISK, "the cluster")
    missing = missing_packages()
    if missing and shutil.which("apt-get") is None:
        raise DevclusterError(f"not a Debian system: install {', '.join(missing)} by hand")
    if not missing:
        network.check_subnet_free()


def _check_compiler() -> None:
    needed = max(_go_version((binaries.SOURCES / module / "go.mod").read_text())
                 for module in ("hyperkube", "tools"))  # fmt: skip
    wanted = ".".join(map(str, needed))
    if shutil.which("go") is None:
        raise DevclusterError(f"the Go toolchain is missing: install Go {wanted} or newer")
    found = run("go", "env", "GOVERSION").strip()
    if _go_version(found.replace("go", "go ")) < needed:
        raise DevclusterError(f"{found} is too old: install Go {wanted} or newer")


def _go_version(text: str) -> tuple[int, ...]:
    """Reads `go X.Y.Z` out of a go.mod or of a spelled-out compiler version."""
    found = re.search(r"^go (\d+)\.(\d+)(?:\.(\d+))?", text, re.MULTILINE)
    if found is None:
        raise DevclusterError(f"no Go version in {text[:40]!r}")
    return tuple(int(part or 0) for part in found.groups())


def require_disk(layout: Layout, needed: int, purpose: str) -> None:
    """Raises DevclusterError when fewer than `needed` bytes are free below the layout's root."""
    folder = layout.root
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DevclusterError(
            f"{purpose} needs {needed / GIB:.0f} GiB free below {layout.root}, there are "
            f"{free / GIB:.1f}: free some, or set XDG_CACHE_HOME to a larger disk"
        )


def install_packages(progress: Progress) -> None:
    """Installs the missing Debian packages, without what they merely recommend."""
    missing = missing_packages()
    if not missing:
        return
    progress.say(f"installing {len(missing)} Debian packages")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq", env=environment)
    run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, env=environment)
    network.check_subnet_free()


def changes(layout: Layout, nodes: Iterable[str]) -> list[str]:
    """Lists what `up` will change on the machine, one line each."""
    names = list(nodes)
    missing = missing_packages()
    lines = [f"Debian packages: {' '.join(missing)}"] if missing else []
    return [
        *lines,
        f"interface {MACHINE_INTERFACE} with {MACHINE_ADDRESS} of {SUBNET}",
        f"network namespaces {LAN} (with bridge {BRIDGE}), {PREFIX}control, {PREFIX}registry, "
        + ", ".join(PREFIX + name for name in names),
        f"control groups /{CGROUP}/... and, while it runs, a few kernel settings of the kubelet",
        f"empty mount points below /var/lib, and the folder {layout.root}",
    ]
