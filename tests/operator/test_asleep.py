"""The operator slept through it: what it decides when it wakes, from the pods alone."""

from collections.abc import Callable

import pytest

from pretrain_api import names
from pretrain_api.status import JobPhase
from pretrain_api.wire import CheckpointReport, ExitCode, Failure, Order, Progress, Result
from pretrain_operator.cluster import Kind
from pretrain_operator.testing import JOB, Bench, condition, message

KEPT = CheckpointReport(step=40, time=1.0, path="checkpoint/step-40", bytes=7)
FORTY = Progress(step=42, steps=100, step_seconds=2.0, checkpoint=KEPT)
DONE = Progress(step=100, steps=100, step_seconds=2.0, checkpoint=KEPT)
SLEEP = 3600.0


async def train(bench: Bench) -> None:
    """Two workers train, each on a node of its own."""
    await bench.submit(workers={"replicas": 2, "maxReplicas": 2})
    await bench.settle()
    for index, name in enumerate(bench.member_pods()):
        bench.cluster.start(name, node=f"node-{index}")
    await bench.settle()
    bench.report(FORTY)
    await bench.settle()
    assert bench.status.phase is JobPhase.RUNNING


async def order_drain(bench: Bench) -> None:
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
    await bench.settle()


async def order_pause(bench: Bench) -> None:
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"workers": {"replicas": 1}}})
    await bench.settle()


async def no_order(bench: Bench) -> None:
    await bench.settle()


def sleep(bench: Bench) -> None:
    """Nobody answers what was asked before, and all deadlines are over."""
    bench.workers.reports.clear()
    bench.cluster.advance(SLEEP)


ORDERS = pytest.mark.parametrize("order", [no_order, order_drain, order_pause])


@ORDERS
async def test_a_job_that_completed_is_complete(bench: Bench, order: Callable[..., None]) -> None:
    await train(bench)
    await order(bench)
    bench.cluster.finish("llama-0-1", 0, message(Result.COMPLETE, DONE))
    bench.cluster.finish("llama-1-1", 1, message(Result.FAILED, rank=1))  # it lost its peer
    sleep(bench)
    await bench.settle()
    assert bench.condition(names.COMPLETE) == ("True", "Completed")
    assert bench.status.progress.step == 100
    assert bench.status.attempts == ()


@pytest.mark.parametrize("order", [no_order, order_pause])
async def test_a_job_that_failed_for_good_has_failed(
    bench: Bench, order: Callable[..., None]
) -> None:
    await train(bench)
    await order(bench)
    why = Failure(rank=1, exit_code=78, reason="Config", message="no such file")
    bench.cluster.finish("llama-0-1", 1, message(Result.FAILED, FORTY))
    bench.cluster.advance(1)
    bench.cluster.finish("llama-1-1", ExitCode.CONFIG, message(Result.CONFIG, rank=1, failure=why))
    sleep(bench)
    await bench.settle()
    assert bench.condition(names.FAILED) == ("True", "InvalidConfiguration")
    assert [(a.rank, a.exit_code) for a in bench.status.attempts] == [(1, 78)]


@pytest.mark.parametrize("order", [no_order, order_pause])
async def test_a_failure_of_all_is_one_charge(bench: Bench, order: Callable[..., None]) -> None:
    await train(bench)
    await order(bench)
    for rank, name in enumerate(("llama-0-1", "llama-1-1")):
        bench.cluster.finish(name, 1, message(Result.FAILED, FORTY, rank=rank))
    sleep(bench)
    await bench.settle()
    assert (bench.status.restarts.total, bench.status.restarts.charged) == (1, 1)
    assert bench.status.checkpoint.step == 40


async def test_a_suspension_that_was_seen_through_meanwhile_is_one(bench: Bench) -> None:
    await train(bench)
    await order_drain(bench)
    for rank, name in enumerate(("llama-0-1", "llama-1-1")):
        said = message(Result.PREEMPTED, DONE if rank == 0 else None, rank=rank)
        bench.cluster.finish(name, ExitCode.PREEMPTED, said)
    sleep(bench)
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": False}})
    await bench.train()
    assert bench.status.progress.step == 100
    assert bench.status.restarts.total == 0
    assert [attempt.reason for attempt in bench.status.attempts] == ["Suspended"]
    assert bench.member_pods() == ["llama-0-2", "llama-1-2"]


async def test_members_that_paused_long_ago_go_on_in_the_size_that_is_wanted(bench: Bench) -> None:
    await train(bench)
    await order_pause(bench)
    sleep(bench)
    await bench.settle()
    assert bench.member_pods() == ["llama-0-1"]
    assert bench.status.assignment.order is Order.NONE


@pytest.mark.parametrize("left", ["leaving", "nothing"])
async def test_a_node_lost_meanwhile_is_replaced_for_free(bench: Bench, left: str) -> None:
    await train(bench)
    node = bench.cluster.objects[Kind.NODE, "", "node-1"]
    node["status"]["conditions"] = [condition("Ready", "Unknown")]
    bench.cluster.remove(Kind.POD, "llama-1-1")  # by the node controller
    if left == "nothing":
        bench.cluster.vanish(Kind.POD, "llama-1-1")  # with the node's object
    sleep(bench)
    await bench.settle()
    expected = "NodeLost" if left == "leaving" else "PodDeleted"
    assert bench.status.restarts.by_reason == {expected: 1}
    bench.cluster.start("llama-1-2", node="node-9")
    await bench.settle()
    assert bench.told("llama-1-2").generation == 2


async def test_a_node_that_was_started_anew_meanwhile_costs_nothing(bench: Bench) -> None:
    await train(bench)
    bench.cluster.finish("llama-1-1", 255, reason="Unknown")
    sleep(bench)
    await bench.settle()
    assert bench.status.restarts.by_reason == {"ContainerLost": 1}
    assert bench.status.restarts.charged == 0
