"""Commands that pages mention in passing: what to look at, what to ask, what to try.

They are about a job called NAME, and run on one. Which command is on which page, and that none is
left out, is the business of `pretrain_docs.commands`.
"""

import pytest

from pretrain_bench.jobs import Jobs
from pretrain_demo.target import repository
from pretrain_docs import commands
from pretrain_docs.commands import Command

from .shell import Shell

pytestmark = pytest.mark.cluster

COMMANDS = commands.of(commands.PAGES)
JOB = "looked-at"
ASKED_ONLY = ("kubectl delete crd",)  # would take the jobs of all other tests along


@pytest.fixture(scope="module")
def job(jobs: Jobs) -> str:
    """A job that trains, and may have one worker less."""
    jobs.apply(JOB, training={"steps": 1_000_000}, workers={"minReplicas": 1, "maxReplicas": 2})
    jobs.wait_for_step(JOB, 1)
    return JOB


def is_last(command: Command) -> bool:
    """Whether the others would find less after it."""
    return any(word in command.text for word in ("scale", "delete"))


@pytest.mark.parametrize("command", sorted(COMMANDS, key=is_last), ids=lambda each: each.text)
def test_it_works(jobs: Jobs, shell: Shell, job: str, command: Command) -> None:
    text = command.text
    if command.is_mention:
        text += " --help"
    elif text.startswith(ASKED_ONLY):
        text += " --dry-run=server"
    elif text.startswith("kubectl delete pod"):
        text = text.replace("NAME", jobs.pod(job, 0))
    text = text.replace("NAME", job).replace("replicas=N", "replicas=1")
    text = text.replace("job.yaml", str(repository() / "manifests/examples/01-one-worker.yaml"))
    shell.run(text)
