"""The work queue: one round per key at a time, nothing lost, failures paced."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from pretrain_operator import queue as queue_module
from pretrain_operator.cluster import ClusterError
from pretrain_operator.metrics import Metrics
from pretrain_operator.queue import WorkQueue
from pretrain_operator.testing import until

Round = Callable[[str], Awaitable[float | None]]


class Expected(Exception):  # noqa: N818 - stands for any error
    pass


@asynccontextmanager
async def running(reconcile: Round, workers: int = 3) -> AsyncIterator[WorkQueue[str]]:
    queue = WorkQueue(reconcile, workers=workers, metrics=Metrics(), quiet=(Expected,))
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_rounds_of_one_key_never_overlap_and_news_in_a_round_cause_one_more() -> None:
    gate, entered, running_now, rounds = asyncio.Event(), asyncio.Event(), Counter(), Counter()

    async def reconcile(key: str) -> None:
        running_now[key] += 1
        assert running_now[key] == 1
        rounds[key] += 1
        entered.set()
        await gate.wait()
        running_now[key] -= 1

    async with running(reconcile) as queue:
        queue.add("a")
        await asyncio.wait_for(entered.wait(), 10)
        for _ in range(5):
            queue.add("a")
        queue.add("b")
        await until(lambda: rounds["b"] == 1)  # another key is not held up
        assert queue.longest_round > 0
        gate.set()
        await until(lambda: rounds["a"] == 2 and not queue.depth)
        assert (rounds["a"], rounds["b"]) == (2, 1)


async def test_keys_that_wait_already_are_not_added_twice() -> None:
    rounds: Counter[str] = Counter()

    async def reconcile(key: str) -> None:
        rounds[key] += 1

    async with running(reconcile) as queue:
        for _ in range(5):
            queue.add("a")
        assert queue.depth == 1
        await until(lambda: rounds["a"] == 1 and not queue.depth)


async def test_the_earliest_wish_wins_and_news_cancel_it() -> None:
    rounds: list[float] = []
    loop = asyncio.get_running_loop()

    async def reconcile(key: str) -> None:
        rounds.append(loop.time())

    async with running(reconcile) as queue:
        began = loop.time()
        queue.add_after("a", 60)
        queue.add_after("a", 0.05)
        queue.add_after("a", 60)
        await until(lambda: len(rounds) == 1)
        assert rounds[0] - began < 30
        queue.add_after("a", 60)
        queue.add("a")
        await until(lambda: len(rounds) == 2)


async def test_a_failing_key_is_retried_with_growing_pauses_and_others_go_on() -> None:
    times: list[float] = []
    others: Counter[str] = Counter()
    loop = asyncio.get_running_loop()

    async def reconcile(key: str) -> None:
        if key != "bad":
            others[key] += 1
            return
        times.append(loop.time())
        if len(times) < 4:
            raise Expected("somebody else wrote") if len(times) % 2 else OSError("cut off")

    async with running(reconcile, workers=1) as queue:
        queue.add("bad")
        queue.add("good")
        await until(lambda: len(times) == 4)
        assert others["good"] == 1
        pauses = [after - before for before, after in pairwise(times)]
        assert pauses[2] > pauses[1] > pauses[0] > 0.1


async def test_a_server_that_asks_for_time_gets_it_even_if_there_is_news() -> None:
    times: list[float] = []
    loop = asyncio.get_running_loop()

    async def reconcile(key: str) -> None:
        times.append(loop.time())
        if len(times) == 1:
            raise ClusterError("too many requests", 429, retry_after=0.5)

    async with running(reconcile) as queue:
        queue.add("a")
        await until(lambda: len(times) == 1)
        while len(times) == 1:
            queue.add("a")  # as fast as events may come
            await asyncio.sleep(0.005)
        assert times[1] - times[0] >= 0.5
        queue.add("a")
        await until(lambda: len(times) == 3)


async def test_a_round_that_was_due_before_the_server_may_be_asked_is_not_lost() -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []

    async def reconcile(key: str) -> None:
        times.append(loop.time())
        if len(times) == 1:
            queue.add_after("a", 0.05)  # an event comes meanwhile
            raise ClusterError("too many requests", 429, retry_after=0.3)

    async with running(reconcile) as queue:
        queue.add("a")
        await until(lambda: len(times) == 2)
        assert times[1] - times[0] >= 0.3


async def test_the_log_tells_of_a_failure_once_and_of_its_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "FIRST_PAUSE_SECONDS", 0.001)
    said = ["down", "down", "down", "denied", ""]
    rounds: Counter[str] = Counter()

    async def reconcile(key: str) -> None:
        rounds[key] += 1
        if message := said[rounds[key] - 1]:
            raise ClusterError(message)

    with caplog.at_level("INFO"):
        async with running(reconcile) as queue:
            queue.add("a")
            await until(lambda: rounds["a"] == len(said) and "made again" in caplog.text)
    lines = [record.getMessage().split(";")[0] for record in caplog.records]
    assert lines == [
        "a: ClusterError: down",
        "a: ClusterError: denied",
        "a: a round was made again, after 4 that failed",
    ]
    assert "Traceback" not in caplog.text


async def test_a_fault_of_our_own_is_told_with_its_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def reconcile(key: str) -> None:
        raise KeyError("no such thing")

    async with running(reconcile) as queue:
        queue.add("a")
        await until(lambda: "Traceback" in caplog.text)


async def test_a_round_that_hangs_is_ended() -> None:
    rounds: Counter[str] = Counter()

    async def reconcile(key: str) -> None:
        rounds[key] += 1
        if rounds[key] == 1:
            await asyncio.Event().wait()

    queue = WorkQueue(reconcile, workers=1, metrics=Metrics(), round_limit=0.05)
    task = asyncio.create_task(queue.run())
    queue.add("a")
    await until(lambda: rounds["a"] == 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_no_round_starts_before_the_gate_opens_and_no_key_is_lost() -> None:
    rounds: Counter[str] = Counter()
    gate = asyncio.Event()

    async def reconcile(key: str) -> None:
        rounds[key] += 1

    async def wait() -> None:
        await gate.wait()

    queue = WorkQueue(reconcile, workers=1, metrics=Metrics(), gate=wait)
    task = asyncio.create_task(queue.run())
    for key in ("a", "b", "a", "b"):
        queue.add(key)
        await asyncio.sleep(0)
    assert not rounds
    gate.set()
    await until(lambda: not queue.depth and rounds.total() == 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert rounds == Counter("ab")


async def test_a_forgotten_key_is_not_looked_at_again() -> None:
    rounds: Counter[str] = Counter()

    async def reconcile(key: str) -> float:
        rounds[key] += 1
        return 0.5 if key == "a" else 0.05

    async with running(reconcile) as queue:
        queue.add("a")
        await until(lambda: rounds["a"] == 2)
        queue.forget("a")
        queue.add("b")
        await until(lambda: rounds["b"] == 40)  # two seconds, or more
        assert rounds["a"] <= 3
