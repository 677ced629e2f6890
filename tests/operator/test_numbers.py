"""When numbers are written: soon enough to be believed, seldom enough for a thousand jobs."""

import pytest

from pretrain_api import names
from pretrain_api.status import JobPhase
from pretrain_api.wire import CheckpointReport, ExitCode, Phase, Progress, Result
from pretrain_operator import reconcile
from pretrain_operator.cluster import Kind
from pretrain_operator.progress import pace
from pretrain_operator.testing import JOB, Bench, message

CHECKPOINT = CheckpointReport(step=40, time=1.0, path="checkpoint/step-40", bytes=7)
FORTY = Progress(step=42, steps=100, tokens=4200, loss=3.5, step_seconds=2.0, checkpoint=CHECKPOINT)
DONE = Progress(step=100, steps=100, tokens=10_000, loss=2.0, first_loss=9.0)


async def test_progress_reaches_status_and_is_written_at_most_every_ten_seconds(
    bench: Bench,
) -> None:
    await bench.submit()
    await bench.train()
    bench.report(Progress(), Phase.LOAD)
    await bench.settle()
    assert bench.condition(names.RUNNING) == ("False", "WorldStarting")
    bench.report(FORTY)
    await bench.settle()
    status = bench.status
    assert status.phase is JobPhase.RUNNING
    assert (status.progress.summary, status.progress.loss) == ("42/100", 3.5)
    assert status.progress.eta == "1m56s"
    assert status.checkpoint.step == 40
    bench.report(FORTY.model_copy(update={"step": 43}))
    bench.cluster.advance(5)
    await bench.settle()
    assert bench.status.progress.step == 42
    bench.cluster.advance(5)
    await bench.settle()
    assert bench.status.progress.step == 43


async def test_numbers_in_every_answer_do_not_make_every_round_a_write(bench: Bench) -> None:
    await bench.submit()
    await bench.train(FORTY)
    before = len(bench.cluster.writes)
    for step in range(50, 60):
        report = CHECKPOINT.model_copy(update={"step": step})
        bench.report(Progress(step=step, steps=100, step_seconds=2.0, checkpoint=report))
        assert await bench.round() >= 1
        # Whoever watches metrics sees it at once.
        sample = {"namespace": "default", "job": JOB}
        assert bench.metrics.registry.get_sample_value("pretrain_job_step", sample) == step
    assert len(bench.cluster.writes) == before
    bench.cluster.advance(10)
    await bench.settle()
    assert (bench.status.progress.step, bench.status.checkpoint.step) == (59, 59)


async def test_news_brings_the_numbers_along(bench: Bench) -> None:
    await bench.submit()
    await bench.train(FORTY)
    bench.report(FORTY.model_copy(update={"step": 50}))
    leader = bench.status.assignment.workers[0].pod
    said = bench.workers.reports[leader]
    bench.workers.reports[leader] = said.model_copy(update={"restarts_in_place": 1})
    await bench.settle()
    assert (bench.status.progress.step, bench.status.restarts.in_place) == (50, 1)
    assert bench.events()[-1] == "RestartedInPlace"


async def test_numbers_of_many_jobs_are_written_less_often(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [pace(jobs) for jobs in (1, 100, 1000)] == [10, 10, 100]
    counted: list[int] = []
    monkeypatch.setattr(reconcile, "pace", lambda jobs: counted.append(jobs) or 10.0)
    operator = bench.operator()
    await bench.submit()

    async def count() -> int:
        await bench.rest(operator)
        return counted[-1]

    assert await count() == 1
    bench.cluster.start("llama-0-1")
    bench.cluster.start("llama-1-1")
    assert await count() == 1
    bench.cluster.finish("llama-0-1", 0, message(Result.COMPLETE, DONE))
    await count()
    assert bench.status.phase is JobPhase.COMPLETE
    assert await count() == 0  # it has no numbers any more


async def test_jobs_without_workers_have_no_numbers_to_write(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(reconcile, "pace", lambda jobs: counted.append(jobs) or 10.0)
    operator = bench.operator()
    await bench.submit()
    await bench.rest(operator)
    bench.cluster.start("llama-0-1")
    bench.cluster.start("llama-1-1")
    await bench.rest(operator)
    bench.report(FORTY)
    await bench.rest(operator)
    assert counted[-1] == 1
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
    await bench.rest(operator)
    for name in bench.member_pods():
        bench.cluster.finish(name, ExitCode.PREEMPTED, message(Result.PREEMPTED))
    await bench.rest(operator)
    assert bench.status.phase is JobPhase.SUSPENDED
    await bench.rest(operator)
    assert counted[-1] == 0


async def test_numbers_are_written_by_a_clock_that_was_set_back(bench: Bench) -> None:
    operator = bench.operator()
    await bench.submit()
    await bench.train(FORTY)
    bench.cluster.advance(-3600)
    bench.report(FORTY.model_copy(update={"step": 50}))
    await bench.rest(operator)
    assert bench.status.progress.step == 50


async def test_numbers_of_workers_wait_a_moment_for_other_news(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "pace", lambda _: 100)
    operator = bench.operator()

    async def writes() -> list[str]:
        bench.cluster.writes.clear()
        await bench.rest(operator)
        return [each for each in bench.cluster.writes if each.endswith("/status")]

    await bench.submit()
    await writes()
    bench.cluster.schedule("llama-0-1")
    bench.cluster.schedule("llama-1-1")
    assert await writes() == []  # that they have nodes now makes the phase Starting
    assert (bench.status.phase, bench.status.observed_generation) == (JobPhase.PENDING, 1)
    assert bench.status.workers.active == 0
    bench.cluster.start("llama-0-1")
    assert await writes() == []
    bench.cluster.start("llama-1-1")
    assert await writes() == ["patch pretrainjobs/llama/status"]  # the leader is named
    assert (bench.status.phase, bench.status.workers.active) == (JobPhase.STARTING, 2)
    bench.report(FORTY)
    assert await writes() == ["patch pretrainjobs/llama/status"]
    assert bench.status.phase is JobPhase.RUNNING
    assert bench.status.workers.summary == "2/2"
