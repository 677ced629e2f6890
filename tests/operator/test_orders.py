"""Members that were told to stand still: before a suspension they leave, before a resize they stay.

The order is written ahead and seen through, whatever is wished, dies or stays silent meanwhile.
"""

import pytest

from pretrain_api import names
from pretrain_api.status import JobPhase, JobStatus
from pretrain_api.wire import CheckpointReport, ExitCode, Order, Progress, Result, WorkerStatus
from pretrain_operator import ledger
from pretrain_operator.cluster import Kind
from pretrain_operator.merge import merge_patch
from pretrain_operator.observe import Observation, parse_job, parse_pod
from pretrain_operator.policies import elastic
from pretrain_operator.policies.orders import MARGIN_SECONDS
from pretrain_operator.resources.pods import DEFAULT_GRACE_SECONDS
from pretrain_operator.testing import JOB, Bench, message

PATIENCE = DEFAULT_GRACE_SECONDS + MARGIN_SECONDS
KEPT = CheckpointReport(step=47, time=2.0, path="checkpoint/step-47", bytes=7)
SAVED = Progress(step=47, steps=100, tokens=4700, step_seconds=2.0, checkpoint=KEPT)


def wish(bench: Bench, *, suspended: bool) -> None:
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": suspended}})


def orders(bench: Bench) -> set[Order]:
    words = [bench.told(name) for name in bench.member_pods()]
    return {word.orders for word in words if word}


def observe(bench: Bench) -> Observation:
    """The job as the operator sees it."""
    job = parse_job(bench.cluster.objects[Kind.JOB, "default", JOB])
    pods = tuple(pod for body in bench.cluster.pods() if (pod := parse_pod(body)))
    return Observation(
        meta=job.meta, job=job.job, problems=(), status=job.status, now=bench.cluster.now,
        nonce="fresh", image="trainer", pods=pods, reports=bench.workers.reports,
    )  # fmt: skip


async def write(bench: Bench, status: JobStatus) -> None:
    """A judge's decision, written ahead."""
    difference = merge_patch(bench.status.to_dict(), status.to_dict())
    await bench.cluster.patch_status(Kind.JOB, "default", JOB, {"status": difference})


async def pause(bench: Bench, seconds: float = PATIENCE) -> None:
    seen = observe(bench)
    await write(bench, ledger.with_order(seen, seen.status, Order.PAUSE, seconds))
    await bench.settle()


# --- suspension -----------------------------------------------------------------------------------


async def test_the_status_of_a_suspended_job_says_what_its_leader_saved_last(bench: Bench) -> None:
    await bench.submit()
    await bench.train(SAVED.model_copy(update={"step": 42, "checkpoint": None}))
    wish(bench, suspended=True)
    await bench.obey(SAVED)
    status = bench.status
    assert (status.progress.step, status.checkpoint.step) == (47, 47)
    assert [(a.reason, a.step, a.charged) for a in status.attempts] == [("Suspended", 47, False)]
    assert status.restarts.total == 0
    assert status.assignment.workers == ()
    assert status.assignment.order is Order.NONE


async def test_no_pod_is_deleted_before_all_have_saved(bench: Bench) -> None:
    await bench.submit()
    await bench.train(SAVED)
    wish(bench, suspended=True)
    assert await bench.settle() == 1
    said = message(Result.PREEMPTED, SAVED)
    bench.cluster.finish("llama-0-1", ExitCode.PREEMPTED, said)
    await bench.settle()
    assert [p["metadata"]["name"] for p in bench.cluster.pods()] == ["llama-0-1", "llama-1-1"]
    assert bench.condition(names.SUSPENDED) == ("True", "Suspended")


async def test_a_worker_that_does_not_leave_is_waited_for_as_long_as_it_may_take(
    bench: Bench,
) -> None:
    await bench.submit()
    await bench.train(SAVED)
    wish(bench, suspended=True)
    await bench.settle()
    bench.cluster.advance(PATIENCE - 0.5)
    assert await bench.settle() == 0.5
    assert bench.member_pods()
    bench.cluster.advance(0.5)
    await bench.settle()
    assert bench.member_pods() == []
    assert all("deletionTimestamp" in p["metadata"] for p in bench.cluster.pods())


async def test_a_drain_that_began_is_completed_though_the_job_was_resumed(bench: Bench) -> None:
    await bench.submit()
    await bench.train(SAVED)
    for suspended in (True, False, True, False):
        wish(bench, suspended=suspended)
        await bench.settle()
        assert orders(bench) == {Order.DRAIN}
    assert bench.condition(names.SUSPENDED) == ("True", "Suspended")
    await bench.obey(SAVED)
    await bench.train()
    assert bench.member_pods() == ["llama-0-2", "llama-1-2"]
    assert orders(bench) == {Order.NONE}
    assert bench.condition(names.SUSPENDED) == ("False", "Resumed")
    assert bench.status.restarts.total == 0
    assert [a.reason for a in bench.status.attempts] == ["Suspended"]


async def test_a_failure_during_a_drain_costs_nothing_and_stops_nothing(bench: Bench) -> None:
    await bench.submit()
    await bench.train(SAVED)
    wish(bench, suspended=True)
    await bench.settle()
    bench.cluster.finish("llama-1-1", 1, message(Result.FAILED, rank=1))
    await bench.obey(SAVED)
    assert bench.status.phase is JobPhase.SUSPENDED
    assert bench.status.restarts.charged == 0
    assert [(a.reason, a.charged) for a in bench.status.attempts] == [("Suspended", False)]


async def test_members_that_were_told_nothing_are_not_waited_for(bench: Bench) -> None:
    await bench.submit()
    await bench.settle()
    bench.cluster.start("llama-0-1")
    await bench.settle()
    wish(bench, suspended=True)
    await bench.settle()
    assert bench.member_pods() == []
    assert all("deletionTimestamp" in p["metadata"] for p in bench.cluster.pods())


async def test_a_leader_that_completes_while_it_drains_completes_the_job(bench: Bench) -> None:
    await bench.submit()
    await bench.train(SAVED)
    wish(bench, suspended=True)
    await bench.settle()
    done = SAVED.model_copy(update={"step": 100})
    bench.cluster.finish("llama-0-1", 0, message(Result.COMPLETE, done))
    await bench.settle()
    assert bench.condition(names.COMPLETE) == ("True", "Completed")
    assert bench.condition(names.SUSPENDED) == ("False", "Completed")


async def test_no_deadline_runs_while_a_job_is_being_suspended(bench: Bench) -> None:
    await bench.submit(activeDeadlineSeconds=60)
    await bench.train(SAVED)
    wish(bench, suspended=True)
    bench.cluster.advance(60)
    await bench.obey(SAVED)
    assert bench.status.phase is JobPhase.SUSPENDED


# --- pause ----------------------------------------------------------------------------------------


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The size that follows a pause."""
    wanted = {"size": 2}
    monkeypatch.setattr(elastic, "target_size", lambda seen: wanted["size"])
    return wanted


async def test_paused_members_keep_their_pods_in_the_next_generation(
    bench: Bench, sized: dict[str, int]
) -> None:
    await bench.submit(workers={"replicas": 3})
    await bench.train(SAVED)
    sized["size"] = 2
    await pause(bench)
    assert orders(bench) == {Order.PAUSE}
    uids = [bench.cluster.pod(name)["metadata"]["uid"] for name in bench.member_pods()]
    await bench.obey(SAVED)
    assert bench.member_pods() == ["llama-0-1", "llama-1-1"]
    assert "deletionTimestamp" in bench.cluster.pod("llama-2-1")["metadata"]
    bench.cluster.finish("llama-2-1", ExitCode.PREEMPTED)
    await bench.settle()
    words = [bench.told(name) for name in bench.member_pods()]
    assert [(w.generation, w.rank, w.size, w.orders) for w in words] == [
        (2, 0, 2, Order.NONE),
        (2, 1, 2, Order.NONE),
    ]
    assert [member.uid for member in bench.status.assignment.workers] == uids[:2]
    status = bench.status
    assert (status.restarts.total, status.restarts.charged) == (1, 0)
    assert [(a.reason, a.charged, a.step) for a in status.attempts] == [("Resized", False, 47)]


async def test_a_pause_waits_for_every_member_of_this_generation(
    bench: Bench, sized: dict[str, int]
) -> None:
    await bench.submit()
    await bench.train(SAVED)
    await pause(bench)
    bench.workers.reports["llama-0-1"] = WorkerStatus(generation=1, rank=0, paused=True)
    bench.workers.reports["llama-1-1"] = WorkerStatus(generation=0, rank=1, paused=True)
    assert await bench.settle() == 1
    assert bench.status.assignment.generation == 1
    bench.workers.reports["llama-1-1"] = WorkerStatus(generation=1, rank=1, paused=True)
    await bench.settle()
    assert bench.status.assignment.generation == 2


async def test_a_member_that_never_pauses_is_not_waited_for_for_ever(
    bench: Bench, sized: dict[str, int]
) -> None:
    await bench.submit()
    await bench.train(SAVED)
    await pause(bench, seconds=20)
    bench.cluster.advance(20)
    await bench.settle()
    assert bench.status.assignment.generation == 2
    assert bench.member_pods() == ["llama-0-1", "llama-1-1"]


async def test_a_failure_during_a_pause_is_charged_and_one_that_left_is_not(bench: Bench) -> None:
    for code, result, charged in ((1, Result.FAILED, True), (143, Result.PREEMPTED, False)):
        bench = Bench()
        await bench.submit()
        await bench.train(SAVED)
        await pause(bench)
        bench.cluster.finish("llama-1-1", code, message(result, rank=1))
        await bench.settle()
        assert [a.charged for a in bench.status.attempts] == [charged]
        assert bench.member_pods() == ["llama-0-1", "llama-1-2"]
        assert bench.status.assignment.order is Order.NONE


async def test_a_suspension_takes_over_from_a_pause(bench: Bench) -> None:
    await bench.submit()
    await bench.train(SAVED)
    await pause(bench)
    wish(bench, suspended=True)
    await bench.settle()
    assert orders(bench) == {Order.DRAIN}
    await bench.obey(SAVED)
    assert bench.status.phase is JobPhase.SUSPENDED
    assert bench.cluster.pods() == []


# --- places ---------------------------------------------------------------------------------------


async def test_who_has_no_place_any_more_moves_to_the_lowest_that_is_free(bench: Bench) -> None:
    await bench.submit(workers={"replicas": 4})
    await bench.train(SAVED)
    seen = observe(bench)
    kept = (seen.members[1], seen.members[3])
    status = ledger.with_generation(seen, seen.status, size=2, kept=kept)
    places = [(member.index, member.pod, member.uid) for member in status.assignment.workers]
    assert places == [
        (0, "llama-3-1", seen.members[3].uid),
        (1, "llama-1-1", seen.members[1].uid),
    ]


async def test_a_worker_that_moved_leads_under_its_old_name(bench: Bench) -> None:
    await bench.submit()
    await bench.train(SAVED)
    seen = observe(bench)
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"workers": {"replicas": 1}}})
    await write(bench, ledger.with_generation(seen, seen.status, size=1, kept=seen.members[1:]))
    await bench.settle()
    bench.cluster.finish("llama-0-1", ExitCode.PREEMPTED)
    await bench.settle()
    word = bench.told("llama-1-1")
    assert (word.generation, word.rank, word.size) == (2, 0, 1)
    assert word.leader.startswith(bench.cluster.pod("llama-1-1")["status"]["podIP"])
    done = SAVED.model_copy(update={"step": 100})
    bench.cluster.finish("llama-1-1", 0, message(Result.COMPLETE, done, generation=2, rank=0))
    await bench.settle()
    assert bench.condition(names.COMPLETE) == ("True", "Completed")


@pytest.mark.parametrize("seen", [False, True], ids=["no pod yet", "pod gone before the meeting"])
async def test_who_moves_is_replaced_under_a_name_of_its_place(bench: Bench, *, seen: bool) -> None:
    await bench.submit(workers={"replicas": 2, "maxReplicas": 2})
    await bench.settle()
    if not seen:
        bench.cluster.vanish(Kind.POD, "llama-1-1")
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"workers": {"replicas": 1}}})
    bench.cluster.finish("llama-0-1", 0)
    await bench.settle()
    if seen:
        assert bench.member_pods() == ["llama-1-1"]
        bench.cluster.vanish(Kind.POD, "llama-1-1")
    await bench.train()
    assert bench.member_pods() == [f"llama-0-{3 if seen else 2}"]
    assert bench.told(bench.member_pods()[0]).rank == 0


async def test_restarts_in_place_are_counted_once_when_another_worker_leads(bench: Bench) -> None:
    await bench.submit()
    await bench.train(SAVED)
    bench.cluster.vanish(Kind.POD, "llama-1-1")
    await bench.train()

    def count(pod: str, restarts: int) -> None:
        assignment = bench.status.assignment
        bench.workers.reports[pod] = WorkerStatus(
            generation=assignment.generation, progress=SAVED, restarts_in_place=restarts
        )

    count("llama-0-1", 5)
    count("llama-1-2", 2)  # it came when three had been
    bench.cluster.advance(11)
    await bench.settle()
    assert bench.status.restarts.in_place == 5
    seen = observe(bench)
    await write(bench, ledger.with_generation(seen, seen.status, size=1, kept=seen.members[1:]))
    await bench.settle()
    bench.cluster.finish("llama-0-1", ExitCode.PREEMPTED)
    await bench.settle()
    count("llama-1-2", 3)
    bench.cluster.advance(11)
    await bench.settle()
    assert bench.status.restarts.in_place == 6
