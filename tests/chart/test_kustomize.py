"""Base and overlays, built by kubectl, are what the chart renders with the values for each."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain_devcluster.layout import Layout

pytestmark = pytest.mark.cluster  # needs kubectl and helm, which are built with the cluster's tools

Objects = list[dict[str, Any]]
OVERLAYS: dict[str, dict[str, Any]] = {
    "base": {},
    "overlays/namespaced": {"watchNamespaces": ["training"]},
    "overlays/standby": {"replicas": 2},
    "overlays/monitoring": {
        "podMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
    },
}
RELEASE_ONLY = {  # labels by which Helm knows its own
    "app.kubernetes.io/instance",
    "app.kubernetes.io/version",
    "app.kubernetes.io/managed-by",
    "helm.sh/chart",
}


@pytest.fixture(scope="module")
def build(helm: str, repository: Path) -> Callable[[str], Objects]:
    """`kubectl kustomize` of a folder of manifests/."""
    assert helm  # the same tools bring kubectl
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Layout.default().path)])
    kubectl = shutil.which("kubectl", path=path)
    assert kubectl is not None

    def built(folder: str) -> Objects:
        done = subprocess.run(
            [kubectl, "kustomize", repository / "manifests" / folder],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [each for each in yaml.safe_load_all(done.stdout) if each]

    return built


def plain(document: Any) -> Any:
    """An object without what only Helm sets; labels of workers are the operator's and stay."""
    if isinstance(document, list):
        return [plain(each) for each in document]
    if not isinstance(document, dict):
        return document
    ours = document.get("app.kubernetes.io/name") == "pretrain-operator"
    gone = RELEASE_ONLY if ours else {"helm.sh/resource-policy"}
    kept = {key: plain(value) for key, value in document.items() if key not in gone}
    return {key: value for key, value in kept.items() if (key, value) != ("annotations", {})}


def identity(each: dict[str, Any]) -> tuple[str, str, str]:
    meta = each["metadata"]
    return each["kind"], meta.get("namespace", ""), meta["name"]


def by_identity(objects: Objects) -> dict[tuple[str, str, str], dict[str, Any]]:
    found = {identity(each): plain(each) for each in objects}
    assert len(found) == len(objects)
    return found


@pytest.mark.parametrize("folder", OVERLAYS)
def test_it_is_what_the_chart_renders(
    build: Callable[[str], Objects], render: Callable[..., Objects], folder: str
) -> None:
    built, rendered = by_identity(build(folder)), by_identity(render(OVERLAYS[folder]))
    namespace = built.pop(("Namespace", "", "pretrain-system"))
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    tests = {key for key in rendered if key[2].endswith("-test")}
    assert built.keys() == rendered.keys() - tests
    for key, expected in rendered.items():
        if key in tests:
            continue
        found = built[key]
        for each in (found, expected):  # labels of the definition are Helm's alone
            if key[0] == "CustomResourceDefinition":
                each["metadata"].pop("labels", None)
        assert found == expected, key


def test_every_overlay_is_compared(repository: Path) -> None:
    folders = {f"overlays/{p.name}" for p in (repository / "manifests" / "overlays").iterdir()}
    assert folders == OVERLAYS.keys() - {"base"}
