"""What `helm test` runs: a tiny job that is created, seen through and deleted, whatever its end."""

import asyncio

import pytest

from pretrain_api.job import PretrainJob
from pretrain_api.status import JobPhase
from pretrain_api.wire import Progress, Result
from pretrain_operator import smoketest
from pretrain_operator.cluster import Kind
from pretrain_operator.smoketest import SmokeError, build_job, train
from pretrain_operator.testing import JOB, Bench, message

DONE = message(Result.COMPLETE, Progress(step=3, steps=3, loss=2.0))


@pytest.fixture(autouse=True)
def no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoketest, "POLL_SECONDS", 0)


def test_the_job_is_valid_and_needs_no_volume() -> None:
    job = PretrainJob.model_validate(build_job("smoke", "team"))
    assert job.spec.world_size == 1
    assert job.spec.volumes.checkpoint is None


async def test_it_is_seen_through_and_deleted(bench: Bench) -> None:
    testing = asyncio.create_task(train(bench.cluster, build_job(JOB, "default"), 60))
    await asyncio.sleep(0)
    await bench.train()
    assert not testing.done()
    bench.cluster.finish(f"{JOB}-0-1", 0, DONE)
    await bench.settle()
    status = await testing
    assert status.phase is JobPhase.COMPLETE
    assert bench.cluster.all(Kind.JOB) == []


async def test_a_failure_is_told_and_the_job_deleted_too(bench: Bench) -> None:
    testing = asyncio.create_task(train(bench.cluster, build_job(JOB, "default"), 60))
    await asyncio.sleep(0)
    await bench.train()
    bench.cluster.finish(f"{JOB}-0-1", 78, "")
    await bench.settle()
    with pytest.raises(SmokeError, match=r"phase Failed.*exited with 78"):
        await testing
    assert bench.cluster.all(Kind.JOB) == []


async def test_that_nobody_serves_the_namespace_is_said(bench: Bench) -> None:
    with pytest.raises(SmokeError, match="no operator has looked at it"):
        await train(bench.cluster, build_job(JOB, "default"), 0)
    assert bench.cluster.all(Kind.JOB) == []
