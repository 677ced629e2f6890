"""Fewer workers and more again: other machines, the same samples and the same learning."""

from collections.abc import Callable

import pytest

from pretrain_bench import faults
from pretrain_bench.faults import Scene
from pretrain_bench.jobs import Jobs
from pretrain_bench.trial import passed, training
from pretrain_demo.job import Snapshot

pytestmark = pytest.mark.cluster

ENDLESS = 1_000_000  # steps: it must not be complete before it has grown
RESIZE_SECONDS = 120.0
SAME_LOSS = 1e-3  # relative; sums of floats depend on how many add them up


@pytest.fixture(scope="module")
def elastic(jobs: Jobs, scene: Callable[[str], Scene]) -> Scene:
    """A job of one or two workers, which starts with two."""
    jobs.apply(
        "elastic",
        training={"steps": ENDLESS},
        workers={"replicas": 2, "minReplicas": 1, "maxReplicas": 2},
        recovery={"growSnoozeSeconds": 5},
    )
    made = scene("elastic")
    training(made)
    return made


def resized(scene: Scene, size: int, generation: int) -> Snapshot:
    """The job when a newer generation of that many workers has trained."""
    return scene.jobs.wait_heard(
        scene.job,
        lambda job: job.generation > generation and scene.size() == size and faults.trains(job),
        RESIZE_SECONDS,
        f"training with {size} workers",
    )


def test_scaled_by_hand(elastic: Scene) -> None:
    for size in (1, 2):
        before = passed(elastic, elastic.jobs.hear(elastic.job).step)
        faults.scale(elastic, size)
        after = resized(elastic, size, before.generation)
        assert after.resumed_from >= before.step  # it was saved for the change
        assert after.status.restarts.charged == 0


def test_lost_capacity_is_done_without_until_it_is_back(elastic: Scene) -> None:
    jobs, nodes = elastic.jobs, [node.name for node in elastic.cluster.nodes]
    before = passed(elastic, jobs.hear(elastic.job).step)
    elastic.cluster.kubectl("cordon", *nodes)
    try:
        faults.delete(elastic, elastic.worker(1))
        after = resized(elastic, 1, before.generation)
        assert after.status.restarts.charged == 0
    finally:
        elastic.cluster.kubectl("uncordon", *nodes)
    grown = resized(elastic, 2, after.generation)
    assert grown.status.restarts.charged == 0


def test_the_samples_are_the_same_and_the_learning_too(elastic: Scene) -> None:
    jobs = elastic.jobs
    faults.suspend(elastic)
    end = jobs.read(elastic.job)
    assert jobs.saved(elastic.job)[-1] == end.step
    jobs.apply("undisturbed", training={"steps": end.step})
    undisturbed = jobs.complete("undisturbed")
    assert undisturbed.step == end.step
    assert end.status.progress.ledger == undisturbed.status.progress.ledger
    assert jobs.digests(elastic.job)["ledger"] == jobs.digests("undisturbed")["ledger"]
    assert end.loss == pytest.approx(undisturbed.loss, rel=SAME_LOSS)
