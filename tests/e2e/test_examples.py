"""Every example is taken by the API server, and those that a laptop can train are trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain_api import names
from pretrain_bench.jobs import Jobs, merged
from pretrain_demo.job import Snapshot
from pretrain_demo.target import repository

pytestmark = pytest.mark.cluster

FOLDER = repository() / "manifests" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
LAPTOP = {"requests": {"cpu": "200m", "memory": "512Mi"}}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_api_server_takes_it(jobs: Jobs, path: Path) -> None:
    said = jobs.kubectl("apply", "--dry-run=server", "-f", str(path))
    assert "created" in said


def run(jobs: Jobs, stem: str, **change: Any) -> Snapshot:
    """Apply an example, with a change where it needs one here, and wait for its end."""
    document = yaml.safe_load((FOLDER / f"{stem}.yaml").read_text())
    document["spec"] = merged(document["spec"], change)
    jobs.kubectl("apply", "-f", "-", text=json.dumps(document))
    return jobs.complete(document["metadata"]["name"])


def test_one_worker_and_a_job_that_goes_on_from_its_weights(jobs: Jobs) -> None:
    first = run(jobs, "01-one-worker")
    assert first.step == 100
    second = run(jobs, "07-adopt-checkpoint", training={"steps": 10})
    told = second.status.progress
    assert told.first_loss < first.status.progress.first_loss - 0.5  # it didn't start anew
    assert jobs.saved("adopted") == [10]


def test_a_job_born_suspended_waits_for_its_queue(jobs: Jobs) -> None:
    jobs.kubectl("apply", "-f", str(FOLDER / "05-queued.yaml"))
    jobs.wait("queued", lambda job: job.holds(names.SUSPENDED), what="its suspension")
    assert jobs.pods("queued") == []
    jobs.patch("queued", {"suspend": False})
    jobs.complete("queued")
    labels = jobs.pods("queued")[0]["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "training"


def test_an_image_and_data_of_ones_own(jobs: Jobs) -> None:
    text = (repository() / "README.md").read_text()
    jobs.kubectl("create", "configmap", "my-text", f"--from-literal=text.txt={text}")
    # The one that the operator would have used, by its full name, stands for an image of one's own.
    deployment = jobs.target.kubectl(
        "--namespace=pretrain-system", "get", "deployment", "pretrain-operator", "-o", "json"
    )
    [container] = json.loads(deployment)["spec"]["template"]["spec"]["containers"]
    [image] = [e["value"] for e in container["env"] if e["name"].endswith("TRAINER_IMAGE")]
    job = run(jobs, "06-own-image", workers={"image": image, "resources": LAPTOP})
    assert job.step == 20
    assert jobs.pods("own-image")[0]["spec"]["containers"][0]["image"] == image
