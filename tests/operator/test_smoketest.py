"""What `helm test` runs: a tiny job that is created, seen through and deleted, whatever its end."""

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from pretrain_api.job import PretrainJob
from pretrain_api.status import JobPhase
from pretrain_api.wire import Progress, Result
from pretrain_operator import smoketest
from pretrain_operator.cluster import Body, HttpCluster, Kind
from pretrain_operator.smoketest import SmokeError, build_job, train
from pretrain_operator.testing import JOB, Bench, MemoryCluster, message, until

DONE = message(Result.COMPLETE, Progress(step=3, steps=3, loss=2.0))


@pytest.fixture(autouse=True)
def no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoketest, "POLL_SECONDS", 0)


def test_the_job_is_valid_and_needs_no_volume() -> None:
    job = PretrainJob.model_validate(build_job("smoke", "team"))
    assert job.spec.world_size == 1
    assert job.spec.volumes.checkpoint is None


def test_the_job_passes_a_quota_and_runs_where_the_chart_says() -> None:
    workers = PretrainJob.model_validate(build_job("smoke", "team")).spec.workers
    assert workers.resources.requests.keys() >= {"cpu", "memory"}
    template: Body = {
        "imagePullSecrets": [{"name": "mirror"}],
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "control", "operator": "Exists", "effect": "NoSchedule"}],
    }
    body = build_job("smoke", "team", template)
    placed = PretrainJob.model_validate(body).spec.workers.pod_template
    assert body["spec"]["workers"]["podTemplate"] == template
    assert [each.name for each in placed.image_pull_secrets] == ["mirror"]
    assert [each.key for each in placed.tolerations] == ["control"]


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


async def test_a_job_that_somebody_deletes_is_missed(bench: Bench) -> None:
    testing = asyncio.create_task(train(bench.cluster, build_job(JOB, "default"), 60))
    await asyncio.sleep(0)
    await bench.train()
    bench.cluster.remove(Kind.JOB, JOB)
    with pytest.raises(SmokeError, match=rf"deleted default/{JOB}; its last word: phase Starting"):
        await testing


class SlowToGo(MemoryCluster):
    """A deleted job stays for some more looks at it, as one with finalizers does."""

    looks = 3

    async def delete(self, *arguments: Any, **named: Any) -> None:
        """See Cluster."""
        self.looks -= 1
        if self.looks < 0:
            await super().delete(*arguments, **named)


async def test_a_job_that_a_killed_test_has_left_makes_room() -> None:
    cluster = SlowToGo()
    await cluster.create(Kind.JOB, "default", build_job(JOB, "default"))
    testing = asyncio.create_task(train(cluster, build_job(JOB, "default"), 60))
    wanted = [f"{verb} pretrainjobs/{JOB}" for verb in ("create", "delete", "create")]
    await until(lambda: cluster.writes == wanted)
    assert len(cluster.all(Kind.JOB)) == 1
    testing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await testing


async def test_one_that_does_not_go_is_waited_for_in_vain() -> None:
    cluster = SlowToGo()
    cluster.looks = 10**9
    await cluster.create(Kind.JOB, "default", build_job(JOB, "default"))
    with pytest.raises(SmokeError, match=f"default/{JOB} of an earlier test .* does not go"):
        await train(cluster, build_job(JOB, "default"), 0)


async def test_a_job_of_somebody_else_stays(bench: Bench) -> None:
    await bench.submit()
    with pytest.raises(SmokeError, match=f"default/{JOB} is there already"):
        await train(bench.cluster, build_job(JOB, "default"), 60)
    assert len(bench.cluster.all(Kind.JOB)) == 1


class Connected(MemoryCluster):
    """What a process gets that connects."""

    async def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connected]:
    """The cluster that :func:`smoketest.run` finds. A signal that it doesn't handle is an error."""

    async def connect() -> Connected:
        return cluster

    def unhandled(number: int, _: object) -> None:
        raise AssertionError(f"signal {number} is not handled")

    cluster = Connected()
    monkeypatch.setattr(HttpCluster, "connect", connect)
    before = signal.signal(signal.SIGTERM, unhandled)
    yield cluster
    signal.signal(signal.SIGTERM, before)


async def test_a_test_that_is_told_to_end_deletes_its_job(connected: Connected) -> None:
    testing = asyncio.create_task(smoketest.run(JOB, "default", 60, {}))
    await until(lambda: bool(connected.all(Kind.JOB)))
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        await testing
    assert connected.all(Kind.JOB) == []


def test_the_exit_code_and_a_sentence_say_how_it_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Body] = []
    ends: list[BaseException | None] = [None, SmokeError("phase Failed"), asyncio.CancelledError()]

    async def run(name: str, namespace: str, seconds: float, pod_template: Body) -> None:
        seen.append(pod_template)
        if (end := ends.pop(0)) is not None:
            raise end

    monkeypatch.setattr(smoketest, "run", run)
    assert smoketest.main(["--namespace=team", '--pod-template={"nodeSelector": {"a": "b"}}']) == 0
    assert smoketest.main(["--namespace=team"]) == 1
    assert "error: phase Failed" in capsys.readouterr().err
    assert smoketest.main(["--namespace=team"]) == 1
    assert "told to end" in capsys.readouterr().err
    assert seen == [{"nodeSelector": {"a": "b"}}, {}, {}]


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_template_that_is_no_object_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        smoketest.main(["--namespace=team", f"--pod-template={text}"])
    assert "--pod-template: must be a JSON object" in capsys.readouterr().err
