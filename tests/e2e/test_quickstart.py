"""The quickstart, line by line, as a stranger would type it."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from pretrain_bench.jobs import Jobs
from pretrain_demo.target import repository
from pretrain_devcluster import Cluster

pytestmark = pytest.mark.cluster

PAGE = repository() / "docs" / "quickstart.md"
MARKED = re.compile(r"<!-- run by tests/e2e/test_quickstart.py -->\n```\n(.*?)```", re.S)
OURS = "app.kubernetes.io/managed-by=pretrain-operator"
BLOCKS = MARKED.findall(PAGE.read_text())


@pytest.fixture(scope="module")
def environment(jobs: Jobs, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kubeconfig whose namespace is the module's."""
    document = json.loads(cluster.kubeconfig.read_text())
    document["contexts"][0]["context"]["namespace"] = jobs.namespace
    path = tmp_path_factory.mktemp("kube") / "config"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_command_works(jobs: Jobs, environment: Path, number: int) -> None:
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", BLOCKS[number]],
        cwd=repository(), capture_output=True, text=True, timeout=900,
        env={**os.environ, **jobs.target.environment, "KUBECONFIG": str(environment)},
    )  # fmt: skip
    assert done.returncode == 0, (
        done.stdout + done.stderr + jobs.kubectl("get", "ptj", "-o", "yaml")
    )


def test_it_left_nothing(jobs: Jobs) -> None:
    jobs.kubectl("wait", "pods,pvc,configmaps", "-l", OURS, "--for=delete", "--timeout=90s")
    assert jobs.kubectl("get", "ptj,pods,pvc,configmaps", "-o", "name").split() == [
        "configmap/kube-root-ca.crt"
    ]


def test_the_page_has_what_is_tested() -> None:
    assert len(BLOCKS) == 4
    assert all("kubectl" in block for block in BLOCKS)
