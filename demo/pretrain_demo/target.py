"""Which cluster may be touched, and how to reach that one and no other.

The demo kills pods, so a wrong cluster is the worst thing that can happen to it. By default it uses
the one that devcluster/ makes on this machine, by the path of its kubeconfig; whatever KUBECONFIG
a shell exports is dropped from the environment of every command. A cluster of yours is used only
when named outright: CLUSTER=existing with a CONTEXT of your kubeconfig and a REGISTRY that its
nodes pull from.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pretrain_devcluster.layout import REGISTRY_ENDPOINT, Layout

# Variables that point kubectl or helm at a cluster or a namespace behind our back.
REDIRECTS = ("KUBECONFIG", "KUBERNETES_MASTER", "POD_NAMESPACE", "KUBECTL_COMMAND_HEADERS")


class DemoError(Exception):
    """Something went wrong; the message says in one sentence what, and what to do."""


@dataclass(frozen=True)
class Target:
    """One cluster, and the programs that talk to it."""

    own: bool  # made by devcluster/ on this machine
    registry: str  # where images are pushed to and pulled from
    kubectl_flags: tuple[str, ...]
    helm_flags: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)

    def kubectl(self, *words: str, text: str | None = None, check: bool = True) -> str:
        """Run kubectl on this cluster and return what it printed.

        Args:
            words: verb, object and flags.
            text: what kubectl reads on stdin.
            check: raise DemoError, with kubectl's own words, if it fails.
        """
        return self._run(["kubectl", *self.kubectl_flags, *words], text, check)

    def helm(self, *words: str) -> str:
        """Run helm on this cluster and return what it printed. Raises DemoError if it fails."""
        return self._run(["helm", *self.helm_flags, *words], None, True)

    def describe(self) -> str:
        """One line that says which cluster this is, with the server's address."""
        view = ("config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}")
        return f"{' '.join(self.kubectl_flags)} at {self.kubectl(*view)}, registry {self.registry}"

    def _run(self, argv: list[str], text: str | None, check: bool) -> str:
        program = shutil.which(argv[0], path=self.environment.get("PATH"))
        if program is None:
            raise DemoError(f"{argv[0]} is not on PATH; install it")
        done = subprocess.run(
            [program, *argv[1:]], input=text or "", env=dict(self.environment),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise DemoError(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")
        return done.stdout


def choose(environ: Mapping[str, str]) -> Target:
    """The target that the variables CLUSTER, CONTEXT and REGISTRY name.

    Raises DemoError if they are incomplete or contradict each other.
    """
    kind = environ.get("CLUSTER") or "devcluster"
    context, registry = environ.get("CONTEXT"), environ.get("REGISTRY")
    if kind == "existing":
        if not context or not registry:
            raise DemoError(
                "CLUSTER=existing needs CONTEXT, a context of your kubeconfig, and REGISTRY, a "
                "registry you can push to and its nodes can pull from"
            )
        return existing(environ, context, registry)
    if kind != "devcluster":
        raise DemoError(f"CLUSTER is {kind!r}; use devcluster or existing")
    if context or registry:
        raise DemoError("CONTEXT and REGISTRY mean something only with CLUSTER=existing")
    return devcluster(environ, Layout.default())


def existing(environ: Mapping[str, str], context: str, registry: str) -> Target:
    """A cluster of the user's, by the name of its context."""
    keep = {key: value for key, value in environ.items() if not key.startswith("HELM_KUBE")}
    return Target(
        own=False,
        registry=registry.rstrip("/"),
        kubectl_flags=(f"--context={context}",),
        helm_flags=(f"--kube-context={context}",),
        environment=keep,
    )


def devcluster(environ: Mapping[str, str], layout: Layout) -> Target:
    """The cluster of this machine, by the path of its kubeconfig and with its own tools."""
    clean = {
        key: value
        for key, value in environ.items()
        if key not in REDIRECTS and not key.startswith("HELM_")
    }
    clean["PATH"] = os.pathsep.join([str(layout.path), environ.get("PATH", "")])
    flag = f"--kubeconfig={layout.kubeconfig}"
    return Target(
        own=True,
        registry=REGISTRY_ENDPOINT,
        kubectl_flags=(flag,),
        helm_flags=(flag,),
        environment=clean,
    )


def repository() -> Path:
    """The root of the working tree, which holds chart, examples and Dockerfile."""
    return Path(__file__).resolve().parent.parent.parent
