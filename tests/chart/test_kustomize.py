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
COMPONENTS: dict[str, dict[str, Any]] = {
    "monitoring": {"podMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}},
    "standby": {"replicas": 2},
    "namespaced": {"watchNamespaces": ["training"]},
}
FOLDERS = {"base": {}} | {f"overlays/{name}": values for name, values in COMPONENTS.items()}
COMBINED = [("monitoring", "standby"), ("standby", "namespaced"), tuple(COMPONENTS)]
RELEASE_ONLY = {  # labels by which Helm knows its own
    "app.kubernetes.io/instance",
    "app.kubernetes.io/version",
    "app.kubernetes.io/managed-by",
    "helm.sh/chart",
}


@pytest.fixture(scope="module")
def build(helm: str, repository: Path) -> Callable[[str], Objects]:
    """`kubectl kustomize` of a folder, seen from manifests/."""
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


def assert_same(of_kustomize: Objects, of_the_chart: Objects) -> None:
    built, rendered = by_identity(of_kustomize), by_identity(of_the_chart)
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


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_is_what_the_chart_renders(
    build: Callable[[str], Objects], render: Callable[..., Objects], folder: str
) -> None:
    assert_same(build(folder), render(FOLDERS[folder]))


@pytest.mark.parametrize("parts", COMBINED, ids="+".join)
def test_components_combine(
    build: Callable[[str], Objects],
    render: Callable[..., Objects],
    repository: Path,
    tmp_path: Path,
    parts: tuple[str, ...],
) -> None:
    # Kustomize takes no absolute path.
    manifests = Path(os.path.relpath((repository / "manifests").resolve(), tmp_path.resolve()))
    overlay = {
        "resources": [str(manifests / "base")],
        "components": [str(manifests / "components" / part) for part in parts],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    values = {key: value for part in parts for key, value in COMPONENTS[part].items()}
    assert_same(build(str(tmp_path)), render(values))


@pytest.mark.parametrize("kind", ["overlays", "components"])
def test_every_folder_is_compared(repository: Path, kind: str) -> None:
    folders = {path.name for path in (repository / "manifests" / kind).iterdir()}
    assert folders == COMPONENTS.keys()
