"""The commands above the Kustomize folders, on an API server that has never heard of any of it."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain_devcluster.controlplane import ADMIN_TOKEN, control_plane, kubeconfig
from pretrain_devcluster.layout import Layout
from pretrain_docs import commands

pytestmark = pytest.mark.cluster

COMMANDS = [each.text for each in commands.of(commands.MANIFESTS)]
PROMETHEUS = {"podmonitors": "PodMonitor", "prometheusrules": "PrometheusRule"}


def definition(plural: str, kind: str) -> str:
    """What the Prometheus operator brings along, without its schema."""
    group = "monitoring.coreos.com"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    named = {"plural": plural, "singular": kind.lower(), "kind": kind, "listKind": f"{kind}List"}
    spec = {"group": group, "scope": "Namespaced", "versions": [version], "names": named}
    return json.dumps({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"}, "spec": spec,
    })  # fmt: skip


@pytest.fixture(scope="module")
def run(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], str]]:
    """Runs a command with something on its input, in the repository; returns what it printed."""
    config = tmp_path_factory.mktemp("kube") / "config"
    path = os.pathsep.join([str(Layout.default().path), os.environ["PATH"]])
    with control_plane() as plane:
        config.write_text(kubeconfig(plane.url, ADMIN_TOKEN, plane.authority))

        def typed(text: str, stdin: str = "") -> str:
            done = subprocess.run(
                ["bash", "-c", text], cwd=repository, input=stdin, capture_output=True, text=True,
                env={**os.environ, "KUBECONFIG": str(config), "PATH": path},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        for plural, kind in PROMETHEUS.items():
            typed("kubectl apply -f -", definition(plural, kind))
            typed(f"kubectl wait --for=condition=Established crd {plural}.monitoring.coreos.com")
        yield typed


@pytest.mark.parametrize("text", COMMANDS)
def test_it_works(run: Callable[[str, str], str], text: str) -> None:
    assert run(text, "")


def test_every_folder_is_tried(repository: Path) -> None:
    files = (repository / "manifests").rglob("kustomization.yaml")
    folders = {str(path.parent.relative_to(repository)) for path in files}
    tried = {text.rpartition(" ")[2] for text in COMMANDS if "-k" in text}
    # Components are parts of overlays and can't be applied alone.
    assert tried == {folder for folder in folders if "components" not in folder}
