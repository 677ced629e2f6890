"""The chart rendered by the real Helm."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain_devcluster import Cluster
from pretrain_devcluster.layout import Layout

Render = Callable[..., list[dict[str, Any]]]
KUBERNETES = "1.34.0"


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
