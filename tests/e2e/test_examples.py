"""Every example with the commands above it, as somebody who copies them would use it.

Those that a laptop can train are trained to their end. The others are taken by the API server, and
wait for nodes that this cluster doesn't have.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pretrain_bench.jobs import Jobs
from pretrain_demo.target import repository
from pretrain_docs import commands

from .shell import Shell

pytestmark = pytest.mark.cluster

EXAMPLES = sorted((repository() / "manifests" / "examples").glob("*.yaml"))
PLACEHOLDER = "registry.example/me"
# What a `--watch` is to show before the next command is typed; for others, that the job is there.
SHOWN = {
    "01-one-worker": "Complete",
    "02-two-workers": "Running",
    "04-elastic": "Running",
    "05-queued": "Complete",
    "06-own-image": "Complete",
    "07-adopt-checkpoint": "Complete",
}


@pytest.fixture(scope="module")
def terminal(shell: Shell, registry: str, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """In a copy of what the examples need, with the registry of one's own filled in.

    The images are there by now, as one of the examples builds on them.
    """
    for text in commands.quickstart():
        if text.startswith("docker "):
            shell.run(text)
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(repository() / "README.md", folder)
    copies = folder / "manifests" / "examples"
    copies.mkdir(parents=True)
    for path in EXAMPLES:
        (copies / path.name).write_text(path.read_text().replace(PLACEHOLDER, registry))
    return Shell(folder, shell.environment)


@pytest.fixture(scope="module")
def created() -> set[str]:
    """What examples asked to be created, beside themselves; another one may need the same."""
    return set()


def first(jobs: Jobs) -> None:
    assert jobs.read("hello").step == 100
    assert jobs.saved("hello")[-1] == 100


def queued(jobs: Jobs) -> None:
    events = jobs.kubectl("get", "events", "-o", "jsonpath={.items[*].reason}")
    assert "Suspended" in events
    labels = jobs.pods("queued")[0]["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "training"


def own_image(jobs: Jobs) -> None:
    assert jobs.read("own-image").step == 20
    assert jobs.pods("own-image")[0]["spec"]["containers"][0]["image"].endswith("/trainer:1")


def adopted(jobs: Jobs) -> None:
    told = jobs.read("adopted").status.progress
    assert told is not None
    assert told.first_loss is not None
    assert told.first_loss < 6.5  # one that starts anew begins above 7
    assert jobs.saved("adopted")[-1] == 50


CHECKS: dict[str, Callable[[Jobs], None]] = {
    "01-one-worker": first,
    "05-queued": queued,
    "06-own-image": own_image,
    "07-adopt-checkpoint": adopted,
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_commands_above_it(jobs: Jobs, terminal: Shell, created: set[str], path: Path) -> None:
    name = yaml.safe_load(path.read_text())["metadata"]["name"]
    typed = [text for _, text in commands.in_manifest(path.read_text())]
    *story, delete = [text for text in typed if not text.startswith("pretrain ")]
    try:
        for text in story:
            if text.startswith("kubectl create "):
                if text in created:
                    continue
                created.add(text)
            if text.endswith(" --watch"):
                terminal.watch(text, rf"^{name} .*{SHOWN.get(path.stem, '')}")
            else:
                terminal.run(text)
        CHECKS.get(path.stem, lambda _: None)(jobs)
    except AssertionError as failure:
        failure.add_note(jobs.story(name))
        raise
    assert delete.startswith("kubectl delete -f ")
    terminal.run(delete)
