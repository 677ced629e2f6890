"""Which ends are charged to a job, which are free, and what either costs."""

import pytest

from pretrain_api import names
from pretrain_api.status import MAX_ATTEMPTS
from pretrain_api.wire import Result
from pretrain_operator.cluster import Kind
from pretrain_operator.testing import Bench, condition, message


async def test_an_echo_after_the_meeting_is_free(bench: Bench) -> None:
    await bench.submit(recovery={"backoffSeconds": 0})
    await bench.train()
    bench.cluster.finish("llama-1-1", 1, message(Result.FAILED, rank=1))
    await bench.train()
    bench.cluster.finish("llama-0-1", 1, message(Result.FAILED, rank=0))
    await bench.train()
    assert [(a.generation, a.charged) for a in bench.status.attempts] == [(1, True), (2, False)]
    assert bench.member_pods() == ["llama-0-3", "llama-1-2"]


async def test_a_pod_that_was_never_told_of_a_generation_is_no_echo(bench: Bench) -> None:
    await bench.submit(recovery={"backoffSeconds": 0})
    await bench.settle()
    for name in ("llama-1-1", "llama-0-1"):
        bench.cluster.start(name)
        bench.cluster.finish(name, 1, message(Result.FAILED, generation=0))
        await bench.settle()
    assert [attempt.charged for attempt in bench.status.attempts] == [True, True]


async def test_a_free_loss_does_not_cut_the_wait_after_a_failure_short(bench: Bench) -> None:
    await bench.submit(recovery={"backoffSeconds": 60})
    await bench.train()
    await bench.crash()
    bench.cluster.finish("llama-1-2", 1, message(Result.FAILED, generation=2, rank=1))
    assert await bench.settle() == 60
    bench.cluster.advance(1)
    bench.cluster.vanish(Kind.POD, "llama-0-1")
    assert await bench.settle() == 59


async def test_the_first_failure_does_not_wait_and_the_wait_then_doubles(bench: Bench) -> None:
    await bench.submit(recovery={"backoffSeconds": 8, "maxBackoffSeconds": 20})
    await bench.train()
    waits = []
    for generation in range(1, 6):
        said = message(Result.FAILED, generation=generation, rank=1)
        bench.cluster.finish(bench.member_pods()[1], 1, said)
        waits.append(await bench.settle())
        bench.cluster.advance(waits[-1] or 0)
        await bench.train()
    assert waits == [None, 8, 16, 20, 20]


async def test_the_budget_ends_the_job_with_the_last_reason(bench: Bench) -> None:
    await bench.submit(recovery={"maxRestarts": 2, "backoffSeconds": 0})
    await bench.train()
    for _ in range(3):
        assert bench.condition(names.FAILED) is None
        await bench.crash()
    assert bench.condition(names.FAILED) == ("True", "BackoffLimitExceeded")
    assert bench.status.restarts.charged == 2
    assert len(bench.status.attempts) == 3
    assert all(
        "deletionTimestamp" in p["metadata"] or p["status"]["phase"] == "Failed"
        for p in bench.cluster.pods()
    )


async def test_failures_outside_the_window_are_forgotten(bench: Bench) -> None:
    await bench.submit(recovery={"maxRestarts": 1, "backoffSeconds": 0, "windowSeconds": 60})
    await bench.train()
    for _ in range(4):
        await bench.crash()
        bench.cluster.advance(60)
    assert bench.condition(names.FAILED) is None


@pytest.mark.parametrize("reason", ["PreemptionByScheduler", "EvictionByEvictionAPI"])
async def test_disruptions_are_free(bench: Bench, reason: str) -> None:
    await bench.submit(recovery={"maxRestarts": 0})
    await bench.train()
    bench.cluster.finish("llama-1-1", 137)
    disrupted = condition("DisruptionTarget", "True", reason=reason)
    bench.cluster.set_status("llama-1-1", conditions=[disrupted])
    await bench.settle()
    assert bench.status.restarts.by_reason == {reason: 1}
    assert bench.condition(names.FAILED) is None


@pytest.mark.parametrize(
    ("reason", "code", "free"),
    [("Unknown", 255, True), ("ContainerStatusUnknown", 137, True), ("Error", 255, False)],
)
async def test_a_container_that_its_node_lost_track_of_is_free(
    bench: Bench, reason: str, code: int, *, free: bool
) -> None:
    await bench.submit()
    await bench.train()
    bench.cluster.finish("llama-1-1", code, reason=reason)
    await bench.settle()
    attempt = bench.status.attempts[-1]
    assert (attempt.reason == "ContainerLost", attempt.charged) == (free, not free)


async def test_an_eviction_without_a_disruption_is_the_pods_own_fault(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    bench.cluster.finish("llama-1-1", 137)
    why = 'Usage of EmptyDir volume "cache" exceeds the limit "1Gi".'
    bench.cluster.set_status("llama-1-1", reason="Evicted", message=why)
    await bench.settle()
    attempt = bench.status.attempts[-1]
    assert (attempt.reason, attempt.charged) == ("Evicted", True)
    assert why in attempt.message


async def test_an_eviction_for_the_nodes_sake_is_free_and_says_why(bench: Bench) -> None:
    await bench.submit(recovery={"maxRestarts": 0})
    await bench.train()
    disrupted = condition("DisruptionTarget", "True", reason="TerminationByKubelet")
    bench.cluster.set_status(
        "llama-1-1", phase="Failed", reason="Evicted", message="low on memory",
        conditions=[disrupted],
    )  # fmt: skip
    await bench.settle()
    attempt = bench.status.attempts[-1]
    assert (attempt.reason, attempt.charged) == ("TerminationByKubelet", False)
    assert "low on memory" in attempt.message


@pytest.mark.parametrize("leaving", [True, False])
async def test_exit_143_without_our_word_is_free_only_of_a_pod_that_leaves(
    bench: Bench, leaving: bool
) -> None:
    await bench.submit()
    await bench.train()
    if leaving:
        bench.cluster.remove(Kind.POD, "llama-1-1")
    bench.cluster.finish("llama-1-1", 143)
    await bench.settle()
    assert bench.status.attempts[-1].charged is not leaving


@pytest.mark.parametrize("reason", ["OutOfcpu", "OutOfnvidia.com/gpu", "UnexpectedAdmissionError"])
async def test_a_kubelet_that_does_not_admit_the_pod_costs_nothing_but_time(
    bench: Bench, reason: str
) -> None:
    await bench.submit(recovery={"maxRestarts": 0, "backoffSeconds": 5})
    waits = []
    for _ in range(3):
        await bench.settle()
        name = bench.member_pods()[1]
        bench.cluster.set_status(name, phase="Failed", reason=reason, message="no room")
        waits.append(await bench.settle())
    assert bench.status.restarts.by_reason == {reason: 3}
    assert waits[-1] == 5


async def test_free_restarts_do_not_push_failures_out_of_the_ledger(bench: Bench) -> None:
    await bench.submit(
        recovery={"maxRestarts": 1, "backoffSeconds": 0, "windowSeconds": 86_400 * 7}
    )
    await bench.train()
    await bench.crash()
    for _ in range(MAX_ATTEMPTS + 2):
        bench.cluster.vanish(Kind.POD, bench.member_pods()[1])
        await bench.train()
    assert len(bench.status.attempts) == MAX_ATTEMPTS
    await bench.crash()
    assert bench.condition(names.FAILED) == ("True", "BackoffLimitExceeded")


async def test_free_restarts_that_come_thick_and_fast_wait(bench: Bench) -> None:
    await bench.submit(recovery={"backoffSeconds": 5})
    await bench.train()
    waits = []
    for _ in range(4):
        bench.cluster.vanish(Kind.POD, bench.member_pods()[1])
        waits.append(await bench.settle())
        bench.cluster.advance(waits[-1] or 0)
        await bench.train()
    assert waits == [None, None, 5, 10]
