"""Build the cluster's Go programs, once per version.

The two Go modules beside this package pin every dependency with its hash. A build goes into a
folder named by the hash of those sources and of the compiler's version, and is never built again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain_devcluster.layout import Layout
from pretrain_devcluster.shell import DevclusterError, Progress, run

SOURCES = Path(__file__).resolve().parent.parent
HYPERKUBE_PROGRAMS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
    "local-provisioner",
)


@dataclass(frozen=True)
class Binaries:
    """Folders of the built programs."""

    hyperkube: Path
    tools: Path

    def kube(self, program: str) -> str:
        """Path of one of `HYPERKUBE_PROGRAMS`."""
        return str(self.hyperkube / program)

    @property
    def built(self) -> bool:
        """Whether nothing has to be built."""
        return self.hyperkube.exists() and self.tools.exists()


def kubernetes_version() -> str:
    """The pinned version, such as `v1.34.3`, read from the module that pins it."""
    return module_version((SOURCES / "hyperkube" / "go.mod").read_text(), "k8s.io/kubernetes")


def module_version(go_mod: str, module: str) -> str:
    """Finds the version that the text of a go.mod requires of a module.

    Raises:
        DevclusterError: the module is not required.
    """
    found = re.search(rf"^(?:require)?\s*{re.escape(module)} (v\S+)", go_mod, re.MULTILINE)
    if found is None:
        raise DevclusterError(f"go.mod does not require {module}")
    return found.group(1)


def source_key(folder: Path, compiler: str) -> str:
    """Hashes everything that decides what a module's build contains."""
    digest = hashlib.sha256(compiler.encode())
    files = [folder / "go.mod", folder / "go.sum", *folder.rglob("*.go")]
    for file in sorted(files):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def locate(layout: Layout) -> Binaries:
    """Says where the builds of the present sources are or will be."""
    compiler = run("go", "env", "GOVERSION").strip()
    folders = {
        name: layout.binaries / f"{name}-{source_key(SOURCES / name, compiler)}"
        for name in ("hyperkube", "tools")
    }
    return Binaries(**folders)


def ensure(layout: Layout, progress: Progress) -> Binaries:
    """Builds what is missing and links kubectl and helm into the folder for PATH."""
    binaries = locate(layout)
    if not binaries.hyperkube.exists():
        progress.say(
            f"building Kubernetes {kubernetes_version()} (about 5 minutes on two cores, once)"
        )
        _build(binaries.hyperkube, _build_hyperkube)
    if not binaries.tools.exists():
        progress.say("building Helm and CoreDNS (about 3 minutes on two cores, once)")
        _build(binaries.tools, _build_tools)
    layout.path.mkdir(parents=True, exist_ok=True)
    _link(layout.path / "kubectl", binaries.hyperkube / "kubectl")
    _link(layout.path / "helm", binaries.tools / "helm")
    return binaries


def _build(target: Path, build: Callable[[Path], None]) -> None:
    """Builds into a folder beside the target and renames it, so a target is always complete."""
    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    build(unfinished)
    unfinished.rename(target)


def _build_hyperkube(target: Path) -> None:
    version = kubernetes_version()
    major, minor, _ = version.removeprefix("v").split(".", 2)
    module = "k8s.io/component-base/version"
    stamps = f"-X {module}.gitVersion={version} -X {module}.gitMajor={major} "
    _go_build("hyperkube", ".", target / "hyperkube", stamps + f"-X {module}.gitMinor={minor}")
    _go_build("hyperkube", "./pause", target / "pause")
    for program in HYPERKUBE_PROGRAMS:
        (target / program).symlink_to("hyperkube")


def _build_tools(target: Path) -> None:
    version = module_version((SOURCES / "tools" / "go.mod").read_text(), "helm.sh/helm/v3")
    stamp = f"-X helm.sh/helm/v3/internal/version.version={version}"
    _go_build("tools", "helm.sh/helm/v3/cmd/helm", target / "helm", stamp)
    _go_build("tools", "./coredns", target / "coredns")


def _go_build(module: str, package: str, output: Path, stamps: str = "") -> None:
    """Builds static and stripped, with no trace of the machine, and with hashes checked."""
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
    run(
        "go", "build", "-trimpath", "-buildvcs=false", f"-ldflags=-s -w {stamps}",
        "-o", output, package,
        cwd=SOURCES / module, env=environment,
    )  # fmt: skip


def _link(link: Path, target: Path) -> None:
    if not (link.is_symlink() and link.readlink() == target):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
