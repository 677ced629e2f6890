"""Worlds of another size: by hand, because nodes are missing, and because they are back.

Training is never cut down or enlarged under way: members pause, save and meet again. Nobody pays.
"""

from typing import Any

import pytest

from pretrain_api import names
from pretrain_api.job import JobSpec
from pretrain_api.status import JobPhase
from pretrain_api.wire import ExitCode, Order, Progress, Result
from pretrain_operator.cluster import Kind
from pretrain_operator.policies import elastic
from pretrain_operator.policies.elastic import UNSCHEDULABLE_SECONDS
from pretrain_operator.testing import JOB, Bench, CrashError, message

FORTY = Progress(step=42, steps=100, step_seconds=2.0)
FULL = "0/2 nodes are available: 2 Insufficient cpu."


def workers(replicas: int, **bounds: int) -> dict[str, Any]:
    return {"replicas": replicas, **bounds}


def scale(bench: Bench, replicas: int) -> None:
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"workers": {"replicas": replicas}}})


def orders(bench: Bench) -> set[Order]:
    words = [bench.told(name) for name in bench.member_pods()]
    return {word.orders for word in words if word}


def pods(bench: Bench) -> list[str]:
    """Pods that stay."""
    bodies = [body["metadata"] for body in bench.cluster.pods()]
    return [meta["name"] for meta in bodies if "deletionTimestamp" not in meta]


def leave(bench: Bench) -> None:
    """Pods that are being deleted save and go."""
    for body in bench.cluster.pods():
        if "deletionTimestamp" in body["metadata"]:
            bench.cluster.finish(body["metadata"]["name"], ExitCode.PREEMPTED)


def sizes(bench: Bench) -> list[tuple[int, int]]:
    """Rank and size as every member was told."""
    words = [bench.told(name) for name in bench.member_pods()]
    return [(word.rank, word.size) for word in words if word]


async def lose(bench: Bench, *lost: str, words: str = FULL) -> None:
    """Pods go with their nodes, and there is no room for others."""
    for name in lost:
        bench.cluster.vanish(Kind.POD, name)
    await bench.settle()
    await refuse_all(bench, words)


async def refuse_all(bench: Bench, words: str = FULL) -> None:
    """The scheduler finds no node for any pod that has none."""
    for body in bench.cluster.pods():
        if not body["spec"].get("nodeName"):
            bench.cluster.refuse(body["metadata"]["name"], words)
    await bench.settle()


async def pass_time(bench: Bench, seconds: float) -> None:
    bench.cluster.advance(seconds)
    await bench.settle()


async def shrunk_to_one(bench: Bench, **more: Any) -> None:
    """One of two workers trains, because there is no node for the other."""
    await bench.submit(workers=workers(2, minReplicas=1), **more)
    await bench.train(FORTY)
    await lose(bench, "llama-1-1")
    await pass_time(bench, UNSCHEDULABLE_SECONDS)
    bench.report(FORTY)
    await bench.settle()
    assert bench.member_pods() == ["llama-0-1"]


# --- by hand --------------------------------------------------------------------------------------


async def test_fewer_workers_pause_save_and_go_on(bench: Bench) -> None:
    await bench.submit(workers=workers(4, maxReplicas=4))
    await bench.train(FORTY)
    scale(bench, 2)
    await bench.settle()
    assert orders(bench) == {Order.PAUSE}
    assert pods(bench) == [f"llama-{index}-1" for index in range(4)]
    await bench.obey(FORTY.model_copy(update={"step": 47}))
    assert pods(bench) == bench.member_pods() == ["llama-0-1", "llama-1-1"]
    leave(bench)
    await bench.settle()
    assert sizes(bench) == [(0, 2), (1, 2)]
    status = bench.status
    assert (status.restarts.total, status.restarts.charged) == (1, 0)
    assert status.restarts.by_reason == {"Resized": 1}
    assert [(a.reason, a.step, a.charged) for a in status.attempts] == [("Resized", 47, False)]
    assert status.workers.summary == "2/2"


async def test_more_workers_start_beside_those_that_train_and_join_when_ready(bench: Bench) -> None:
    await bench.submit(workers=workers(2, maxReplicas=4))
    await bench.train(FORTY)
    scale(bench, 4)
    await bench.settle()
    assert bench.candidate_pods() == ["llama-2-2", "llama-3-2"]
    assert pods(bench) == ["llama-0-1", "llama-1-1", "llama-2-2", "llama-3-2"]
    assert bench.status.workers.summary == "2/4"
    bench.cluster.start("llama-2-2")
    await bench.settle()
    assert orders(bench) == {Order.NONE}
    assert bench.status.phase is JobPhase.RUNNING
    bench.cluster.start("llama-3-2")
    await bench.settle()
    assert orders(bench) == {Order.PAUSE}
    assert bench.told("llama-3-2") is None
    await bench.obey(FORTY)
    assert sizes(bench) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert bench.member_pods() == ["llama-0-1", "llama-1-1", "llama-2-2", "llama-3-2"]
    assert bench.status.restarts.by_reason == {"Resized": 1}
    assert bench.status.restarts.charged == 0


async def test_there_and_back_within_a_second_costs_one_restart_at_most(bench: Bench) -> None:
    await bench.submit(workers=workers(4, maxReplicas=4))
    await bench.train(FORTY)
    scale(bench, 2)
    await bench.settle()
    scale(bench, 4)
    await bench.obey(FORTY)
    assert bench.member_pods() == [f"llama-{index}-1" for index in range(4)]
    assert sizes(bench) == [(index, 4) for index in range(4)]
    assert bench.status.restarts.total == 1


async def test_there_and_back_before_anybody_noticed_costs_nothing(bench: Bench) -> None:
    await bench.submit(workers=workers(4, maxReplicas=4))
    await bench.train(FORTY)
    scale(bench, 2)
    scale(bench, 4)
    await bench.settle()
    assert orders(bench) == {Order.NONE}
    assert bench.status.restarts.total == 0


async def test_changing_ones_mind_about_more_only_drops_candidates(bench: Bench) -> None:
    await bench.submit(workers=workers(2, maxReplicas=8))
    await bench.train(FORTY)
    scale(bench, 8)
    await bench.settle()
    bench.cluster.start("llama-4-2")
    await bench.settle()
    assert len(bench.candidate_pods()) == 6
    scale(bench, 4)
    await bench.settle()
    assert bench.candidate_pods() == ["llama-2-2", "llama-3-2"]
    scale(bench, 2)
    await bench.settle()
    assert pods(bench) == ["llama-0-1", "llama-1-1"]
    assert bench.status.restarts.total == 0
    assert bench.status.assignment.generation == 1
    assert bench.status.phase is JobPhase.RUNNING


async def test_a_size_changed_before_workers_met_needs_no_pause(bench: Bench) -> None:
    await bench.submit(workers=workers(4, maxReplicas=4))
    await bench.settle()
    bench.cluster.start("llama-1-1")
    bench.cluster.start("llama-2-1")
    await bench.settle()
    scale(bench, 2)
    await bench.settle()
    # Those that have a node are worth more than those that wait for one.
    assert bench.member_pods() == ["llama-2-1", "llama-1-1"]
    assert sizes(bench) == [(0, 2), (1, 2)]
    scale(bench, 4)
    await bench.train()
    assert bench.status.workers.desired == 4


async def test_a_worker_lost_while_all_pause_does_not_stop_the_resize(bench: Bench) -> None:
    await bench.submit(workers=workers(4, maxReplicas=4))
    await bench.train(FORTY)
    scale(bench, 2)
    await bench.settle()
    bench.cluster.vanish(Kind.POD, "llama-0-1")
    await bench.settle()
    leave(bench)
    await bench.settle()
    assert sizes(bench) == [(0, 2), (1, 2)]
    assert bench.member_pods() == ["llama-2-1", "llama-1-1"]


async def test_a_suspended_job_comes_back_in_the_size_it_was_given_meanwhile(bench: Bench) -> None:
    await bench.submit(workers=workers(2, maxReplicas=4))
    await bench.train(FORTY)
    scale(bench, 4)
    await bench.settle()
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
    await bench.obey(FORTY)
    assert pods(bench) == []
    leave(bench)
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": False}})
    await bench.train()
    assert sizes(bench) == [(index, 4) for index in range(4)]
    assert bench.status.restarts.total == 0


async def test_a_loss_after_many_resizes_does_not_wait(bench: Bench) -> None:
    await bench.submit(workers=workers(4, maxReplicas=4))
    await bench.train(FORTY)
    for size in (2, 4, 2, 4, 2):
        scale(bench, size)
        await bench.train(FORTY)
        await bench.obey(FORTY)
        leave(bench)
        await bench.train(FORTY)
        assert sizes(bench) == [(rank, size) for rank in range(size)]
    bench.cluster.vanish(Kind.POD, bench.member_pods()[1])
    await bench.settle()
    assert bench.status.assignment.not_before is None
    assert bench.member_pods()[1] in pods(bench)


# --- nodes are missing ----------------------------------------------------------------------------


async def test_a_lost_worker_is_sought_for_ten_seconds_then_the_others_go_on(bench: Bench) -> None:
    await bench.submit(workers=workers(2, minReplicas=1))
    await bench.train(FORTY)
    await lose(bench, "llama-1-1")
    assert bench.member_pods() == ["llama-0-1", "llama-1-2"]
    await pass_time(bench, UNSCHEDULABLE_SECONDS - 1)
    assert bench.member_pods() == ["llama-0-1", "llama-1-2"]
    await pass_time(bench, 1)
    assert bench.member_pods() == pods(bench) == ["llama-0-1"]
    assert sizes(bench) == [(0, 1)]
    status = bench.status
    assert status.restarts.by_reason == {"PodDeleted": 1, "Shrunk": 1}
    assert status.restarts.charged == 0
    assert FULL in status.attempts[-1].message
    assert "Shrunk" in bench.events()
    bench.report(FORTY)
    await bench.settle()
    assert bench.status.workers.summary == "1/2"
    running = next(c for c in bench.status.conditions if c.type == names.RUNNING)
    assert running.status == "True"
    assert f"with 1 of 2 workers: 1 of 2 workers find no node: {FULL}" in running.message


async def test_only_legal_sizes_are_used(bench: Bench) -> None:
    await bench.submit(workers=workers(4, minReplicas=1))
    await bench.train(FORTY)
    await lose(bench, "llama-0-1")
    await pass_time(bench, UNSCHEDULABLE_SECONDS)
    assert bench.member_pods() == ["llama-2-1", "llama-1-1"]
    assert pods(bench) == ["llama-1-1", "llama-2-1"]
    leave(bench)
    await bench.settle()
    assert sizes(bench) == [(0, 2), (1, 2)]


@pytest.mark.parametrize("bounds", [{}, {"minReplicas": 2, "maxReplicas": 4}])
async def test_nobody_shrinks_below_what_was_asked_for(
    bench: Bench, bounds: dict[str, int]
) -> None:
    await bench.submit(workers=workers(2, **bounds))
    await bench.train(FORTY)
    await lose(bench, "llama-1-1")
    await pass_time(bench, 10 * UNSCHEDULABLE_SECONDS)
    assert len(bench.member_pods()) == 2
    assert bench.condition(names.RUNNING) == ("False", "Unschedulable")


async def test_a_job_starts_smaller_if_there_is_no_room_for_all(bench: Bench) -> None:
    await bench.submit(workers=workers(4, minReplicas=2))
    await bench.settle()
    for name in ("llama-1-1", "llama-3-1"):
        bench.cluster.start(name)
    await refuse_all(bench)
    await pass_time(bench, UNSCHEDULABLE_SECONDS)
    assert bench.member_pods() == ["llama-3-1", "llama-1-1"]
    assert pods(bench) == ["llama-1-1", "llama-3-1"]
    assert sizes(bench) == [(0, 2), (1, 2)]


async def test_a_pod_that_leaves_may_be_all_that_holds_the_node(bench: Bench) -> None:
    await bench.submit(workers=workers(2, minReplicas=1))
    await bench.train(FORTY)
    bench.cluster.remove(Kind.POD, "llama-1-1")
    await bench.settle()
    await refuse_all(bench)
    await pass_time(bench, 3 * UNSCHEDULABLE_SECONDS)
    assert bench.member_pods() == ["llama-0-1", "llama-1-2"]
    leave(bench)
    bench.cluster.start("llama-1-2")
    await bench.settle()
    assert sizes(bench) == [(0, 2), (1, 2)]


async def test_pods_that_a_queue_holds_back_are_not_without_nodes(bench: Bench) -> None:
    await bench.submit(workers=workers(2, minReplicas=1), schedulingTimeoutSeconds=60)
    await bench.settle()
    bench.cluster.start("llama-0-1")
    bench.cluster.refuse("llama-1-1", "Scheduling is blocked", reason="SchedulingGated")
    await bench.settle()
    await pass_time(bench, 1000)
    assert bench.member_pods() == ["llama-0-1", "llama-1-1"]
    # The gate is gone, and with it the excuse; the condition's time says nothing of that.
    bench.cluster.refuse("llama-1-1", FULL)
    await bench.settle()
    assert len(bench.member_pods()) == 2
    await pass_time(bench, UNSCHEDULABLE_SECONDS)
    assert bench.member_pods() == ["llama-0-1"]


# --- nodes are back -------------------------------------------------------------------------------


async def test_a_world_that_shrank_grows_when_there_is_room_again(bench: Bench) -> None:
    await shrunk_to_one(bench)
    await pass_time(bench, 59)
    assert bench.candidate_pods() == []
    await pass_time(bench, 1)
    (candidate,) = bench.candidate_pods()
    await refuse_all(bench)
    await pass_time(bench, 3600)
    assert bench.candidate_pods() == [candidate]
    assert orders(bench) == {Order.NONE}
    assert bench.status.phase is JobPhase.RUNNING
    bench.cluster.start(candidate)
    await bench.settle()
    assert orders(bench) == {Order.PAUSE}
    await bench.obey(FORTY)
    assert sizes(bench) == [(0, 2), (1, 2)]
    assert bench.member_pods() == ["llama-0-1", candidate]
    assert bench.status.restarts.by_reason == {"PodDeleted": 1, "Shrunk": 1, "Grown": 1}
    assert bench.status.restarts.charged == 0
    bench.report(FORTY)
    await bench.settle()
    assert bench.status.workers.summary == "2/2"
    running = next(c for c in bench.status.conditions if c.type == names.RUNNING)
    assert "of 2 workers" not in running.message


@pytest.mark.parametrize("seconds", [0, 5, 600])
async def test_the_snooze_is_as_long_as_it_says(bench: Bench, seconds: int) -> None:
    await bench.submit(workers=workers(2, minReplicas=1), recovery={"growSnoozeSeconds": seconds})
    await bench.train(FORTY)
    await lose(bench, "llama-1-1")
    await pass_time(bench, UNSCHEDULABLE_SECONDS)
    bench.report(FORTY)
    if seconds:
        await pass_time(bench, seconds - 1)
        assert bench.candidate_pods() == []
        await pass_time(bench, 1)
    await bench.settle()
    assert len(bench.candidate_pods()) == 1


async def test_a_candidate_that_fails_disturbs_nobody_and_is_tried_ever_more_rarely(
    bench: Bench,
) -> None:
    await shrunk_to_one(bench, recovery={"maxRestarts": 0, "growSnoozeSeconds": 60})
    seen = set[str]()
    for snooze in (60, 120, 240, 480):
        await pass_time(bench, snooze - 1)
        assert bench.candidate_pods() == []
        await pass_time(bench, 1)
        (candidate,) = bench.candidate_pods()
        assert candidate not in seen
        seen.add(candidate)
        bench.cluster.start(candidate)
        bench.cluster.finish(candidate, 1, message(Result.FAILED))
        await bench.settle()
    assert bench.member_pods() == ["llama-0-1"]
    assert orders(bench) == {Order.NONE}
    assert bench.status.phase is JobPhase.RUNNING
    assert bench.status.restarts.charged == 0
    assert bench.events().count("GrowFailed") == 4


def test_the_snooze_has_a_limit() -> None:
    spec = JobSpec.model_validate({"training": {"dataset": "c4"}})
    assert [elastic.snooze(spec, n).total_seconds() for n in (0, 1, 6, 100)] == [
        60, 120, 3600, 3600,
    ]  # fmt: skip


async def test_candidates_beyond_a_quota_do_not_disturb_training(bench: Bench) -> None:
    await bench.submit(workers=workers(2, maxReplicas=4))
    await bench.train(FORTY)
    bench.cluster.admit = lambda kind, _: "exceeded quota" if kind is Kind.POD else None
    scale(bench, 4)
    await bench.settle()
    assert bench.candidate_pods() == []
    assert bench.status.phase is JobPhase.RUNNING
    assert bench.condition(names.RUNNING) == ("True", "Training")
    assert bench.events().count("GrowFailed") == 1
    bench.cluster.admit = lambda kind, _: None
    await pass_time(bench, 120)
    assert pods(bench) == [*bench.member_pods(), *bench.candidate_pods()]
    assert len(pods(bench)) == 4


async def test_part_of_the_candidates_join_if_there_is_no_room_for_all(bench: Bench) -> None:
    await bench.submit(workers=workers(2, maxReplicas=8))
    await bench.train(FORTY)
    scale(bench, 8)
    await bench.settle()
    for name in ("llama-3-2", "llama-5-2", "llama-6-2"):
        bench.cluster.start(name)
    await refuse_all(bench)
    assert orders(bench) == {Order.NONE}
    await pass_time(bench, UNSCHEDULABLE_SECONDS)
    assert orders(bench) == {Order.PAUSE}
    await bench.obey(FORTY)
    leave(bench)
    await bench.settle()
    # Five could train; four is the legal size below.
    assert sizes(bench) == [(index, 4) for index in range(4)]
    assert bench.status.workers.desired == 8


async def test_one_that_is_about_to_be_ready_is_worth_waiting_for(bench: Bench) -> None:
    await bench.submit(workers=workers(2, maxReplicas=8))
    await bench.train(FORTY)
    scale(bench, 8)
    await bench.settle()
    for index in (2, 3, 4, 5, 6):
        bench.cluster.start(f"llama-{index}-2")
    bench.cluster.schedule("llama-7-2")
    await bench.settle()
    await pass_time(bench, 1000)
    assert orders(bench) == {Order.NONE}


async def test_a_lost_member_is_replaced_by_a_candidate(bench: Bench) -> None:
    await shrunk_to_one(bench)
    await pass_time(bench, 60)
    (candidate,) = bench.candidate_pods()
    bench.cluster.vanish(Kind.POD, "llama-0-1")
    await bench.settle()
    assert candidate in bench.member_pods()
    assert len(bench.member_pods()) == 2


async def test_a_job_that_completes_smaller_leaves_nothing_behind(bench: Bench) -> None:
    await shrunk_to_one(bench)
    await pass_time(bench, 60)
    (candidate,) = bench.candidate_pods()
    bench.cluster.start(candidate)
    said = message(Result.COMPLETE, Progress(step=100, steps=100), generation=3)
    bench.cluster.finish("llama-0-1", 0, said)
    await bench.settle()
    assert bench.condition(names.COMPLETE) == ("True", "Completed")
    await pass_time(bench, 31)
    assert candidate not in pods(bench)


# --- pods that can't all be placed ----------------------------------------------------------------


async def test_pods_that_can_not_all_be_placed_are_released_and_tried_again(bench: Bench) -> None:
    await bench.submit(schedulingTimeoutSeconds=120)
    waits: list[float] = []
    for generation in range(1, 9):
        await bench.settle()
        assert bench.member_pods() == [f"llama-0-{generation}", f"llama-1-{generation}"]
        bench.cluster.start(f"llama-0-{generation}")
        assert not await refused_at(bench, 120)
        assert bench.condition(names.RUNNING) == ("False", "Unschedulable")
        assert bench.status.phase is JobPhase.PENDING
        await pass_time(bench, 120)
        assert pods(bench) == bench.member_pods() == []
        assert bench.condition(names.RUNNING) == ("False", "SchedulingTimeout")
        leave(bench)
        wait = await bench.settle()
        assert wait is not None
        waits.append(wait)
        await pass_time(bench, wait - 0.5)
        assert pods(bench) == []
        await pass_time(bench, 0.5)
    assert all(30 <= wait <= 600 for wait in waits)
    assert waits[0] <= 60
    assert waits[-1] >= 300
    assert bench.condition(names.FAILED) is None
    assert bench.status.restarts.total == 0
    assert bench.events().count("SchedulingTimeout") == 8


async def refused_at(bench: Bench, seconds: float) -> bool:
    """Whether pods without a node are gone a second before they should be."""
    before = bench.member_pods()
    await refuse_all(bench)
    await pass_time(bench, seconds - 1)
    gone = bench.member_pods() != before
    bench.cluster.advance(-(seconds - 1))
    return gone


async def test_a_job_that_met_starts_counting_releases_anew(bench: Bench) -> None:
    await bench.submit(schedulingTimeoutSeconds=120)
    for _ in range(3):
        await bench.settle()
        await refuse_all(bench)
        await pass_time(bench, 120)
        await pass_time(bench, 600)
    await bench.train(FORTY)
    await lose(bench, bench.member_pods()[1])
    await pass_time(bench, 120)
    assert bench.status.assignment.releases == 1


async def test_a_job_that_may_be_smaller_is_not_released(bench: Bench) -> None:
    await bench.submit(workers=workers(2, minReplicas=1), schedulingTimeoutSeconds=5)
    await bench.settle()
    bench.cluster.start("llama-0-1")
    await refuse_all(bench)
    for _ in range(UNSCHEDULABLE_SECONDS):
        assert len(bench.member_pods()) == 2
        await pass_time(bench, 1)
    assert bench.member_pods() == ["llama-0-1"]


async def test_candidates_that_hold_nodes_for_nothing_are_released(bench: Bench) -> None:
    await bench.submit(workers=workers(4, maxReplicas=8), schedulingTimeoutSeconds=120)
    await bench.train(FORTY)
    scale(bench, 8)
    await bench.settle()
    bench.cluster.start("llama-4-2")
    await refuse_all(bench)
    await pass_time(bench, 120)
    assert bench.candidate_pods() == []
    assert bench.status.phase is JobPhase.RUNNING
    assert bench.status.restarts.total == 0


async def test_a_suspended_job_that_is_resumed_does_not_wait_for_its_turn(bench: Bench) -> None:
    await bench.submit(schedulingTimeoutSeconds=120)
    await bench.settle()
    await refuse_all(bench)
    await pass_time(bench, 120)
    assert bench.member_pods() == []
    for suspend in (True, False):
        bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": suspend}})
        await bench.settle()
    assert len(bench.member_pods()) == 2


def test_two_jobs_that_blocked_each_other_do_not_meet_again() -> None:
    pairs = [
        (elastic.release_seconds("uid-a", n), elastic.release_seconds("uid-b", n))
        for n in range(12)
    ]
    assert all(30 <= wait <= 600 for pair in pairs for wait in pair)
    assert all(abs(one - other) > 1 for one, other in pairs)


# --- crashes --------------------------------------------------------------------------------------


async def grow_by_hand(bench: Bench) -> None:
    scale(bench, 4)


async def shrink_by_hand(bench: Bench) -> None:
    scale(bench, 1)


async def lose_a_node(bench: Bench) -> None:
    bench.cluster.vanish(Kind.POD, "llama-1-1")


RESIZES = [(grow_by_hand, 4), (shrink_by_hand, 1), (lose_a_node, 1)]


async def play(bench: Bench) -> None:
    """The cluster does its part: no node for a second lost worker, room for candidates."""
    lost = "llama-1-1" not in [body["metadata"]["name"] for body in bench.cluster.pods()]
    for body in bench.cluster.pods():
        name = body["metadata"]["name"]
        if "deletionTimestamp" in body["metadata"]:
            bench.cluster.finish(name, ExitCode.PREEMPTED)
        elif not body["spec"].get("nodeName"):
            bench.cluster.refuse(name, FULL) if lost else bench.cluster.start(name)
    bench.cluster.advance(UNSCHEDULABLE_SECONDS)
    if bench.status.assignment and bench.status.assignment.leader:
        bench.report(FORTY)


@pytest.mark.parametrize(("change", "size"), RESIZES)
async def test_a_crash_after_any_write_of_a_resize_changes_nothing(change: Any, size: int) -> None:
    crash_in, ends = 0, list[Any]()
    while True:
        bench = Bench()
        await bench.submit(
            workers=workers(2, minReplicas=1, maxReplicas=4), recovery={"growSnoozeSeconds": 3600}
        )
        await bench.train(FORTY)
        await change(bench)
        bench.cluster.crash_in = crash_in or None
        crashed = False
        for _ in range(6):
            for work in (bench.settle, bench.obey):
                try:
                    await work()
                except CrashError:
                    crashed = True
            await play(bench)
        bench.cluster.crash_in = None
        await bench.settle()
        assert len(bench.member_pods()) == size
        assert sorted(pods(bench)) == sorted(bench.member_pods())
        assert sizes(bench) == [(rank, size) for rank in range(size)]
        status = bench.status
        ends.append((status.restarts.by_reason, status.assignment.generation, bench.member_pods()))
        assert ends[-1] == ends[0]
        if crash_in and not crashed:
            break
        crash_in += 1
    assert crash_in > 4
