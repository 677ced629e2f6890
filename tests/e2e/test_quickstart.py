"""The quickstart, line by line, as a stranger would type it."""

from collections.abc import Iterator

import pytest

from pretrain_api import names
from pretrain_bench.jobs import Jobs
from pretrain_demo.console import Console
from pretrain_demo.install import SYSTEM_NAMESPACE, install
from pretrain_demo.target import Target, repository
from pretrain_docs import commands

from .shell import Shell

pytestmark = pytest.mark.cluster

PAGE = repository() / "docs" / "quickstart.md"
BLOCKS = [text for language, text in commands.FENCE.findall(PAGE.read_text()) if language == "sh"]
OURS = "app.kubernetes.io/managed-by=pretrain-operator"


@pytest.fixture(scope="module", autouse=True)
def release(target: Target) -> Iterator[None]:
    """The page installs the operator its own way; other tests find it as it was."""
    yield
    install(target, Console())


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_command_works(jobs: Jobs, shell: Shell, number: int) -> None:
    try:
        said = shell.run(BLOCKS[number])
    except AssertionError as failure:
        failure.add_note(jobs.kubectl("get", "ptj", "-o", "yaml"))
        raise
    assert "helm test" not in BLOCKS[number] or "Succeeded" in said


def test_it_left_nothing(jobs: Jobs, target: Target) -> None:
    jobs.kubectl("wait", "pods,pvc,configmaps", "-l", OURS, "--for=delete", "--timeout=90s")
    assert jobs.kubectl("get", "ptj,pods,pvc,configmaps", "-o", "name").split() == [
        "configmap/kube-root-ca.crt"
    ]
    tested = f"--namespace={SYSTEM_NAMESPACE}"
    workers = ("pods", f"--selector={names.LABEL_JOB}")
    target.kubectl(tested, "wait", *workers, "--for=delete", "--timeout=90s")
    left = target.kubectl(tested, "get", "ptj,serviceaccounts,roles,pods", "-o", "name")
    assert "-test" not in left


def test_the_page_has_what_is_tested() -> None:
    assert len(BLOCKS) == 6
    assert BLOCKS[0].count("docker") == 4
    assert all("kubectl" in block for block in BLOCKS[2:])
