"""The chart rendered by the real Helm."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain_devcluster import Cluster
from pretrain_devcluster.layout import Layout

Render = Callable[..., list[dict[str, Any]]]
KUBERNETES = "1.34.0"
APT = {"DEBIAN_FRONTEND": "noninteractive"}


@pytest.fixture(scope="session")
def helm() -> str:
    """The helm program: the one on PATH, or else the one that belongs to the cluster's tools."""
    tools = Layout.default().path
    path = os.pathsep.join([os.environ.get("PATH", ""), str(tools)])
    if not shutil.which("helm", path=path):
        Cluster.up()
    program = shutil.which("helm", path=path)
    assert program is not None, f"no helm on PATH and none in {tools}"
    return program


@pytest.fixture(scope="session")
def chart(repository: Path) -> Path:
    return repository / "charts" / "pretrain-operator"


@pytest.fixture(scope="session")
def template(helm: str, chart: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`helm template` with the given values; returns the finished process."""

    def run(values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [helm, "template", "pretrain-operator", str(chart), "--namespace=pretrain-system",
             f"--kube-version={KUBERNETES}", "--values=-"],
            input=yaml.safe_dump(values or {}), capture_output=True, text=True,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def render(template: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    """The objects the chart makes of the given values."""

    def objects(values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        outcome = template(values)
        assert outcome.returncode == 0, outcome.stderr
        return [document for document in yaml.safe_load_all(outcome.stdout) if document]

    return objects


@pytest.fixture(scope="session")
def promtool() -> str:
    """Prometheus' own checker: the one on PATH, or else that of Debian's package, unpacked only.

    Installing the package would start a Prometheus on some machines.
    """
    if found := shutil.which("promtool"):
        return found
    folder = Layout.default().root / "prometheus"
    program = folder / "usr" / "bin" / "promtool"
    if not program.exists():
        with tempfile.TemporaryDirectory() as download:
            words = ["apt-get", "download", "--quiet", "prometheus"]
            subprocess.run(words, cwd=download, check=True, env=os.environ | APT)
            [package] = Path(download).glob("prometheus_*.deb")
            fresh = Path(download) / "unpacked"
            subprocess.run(["dpkg-deb", "--extract", package, fresh], check=True)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.move(fresh, folder)
    return str(program)
