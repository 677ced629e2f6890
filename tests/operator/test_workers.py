"""Asking workers: what they say, and that nothing they do is an error."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import aiohttp
import pytest
from aiohttp import web

from pretrain_api.wire import Phase, WorkerStatus
from pretrain_operator import workers
from pretrain_operator.observe import SILENT_SECONDS, Pod
from pretrain_operator.workers import Answers, HttpWorkers, Silence, is_silence

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def pod(name: str = "a-0-1", ip: str | None = "127.0.0.1", phase: str = "Running") -> Pod:
    return Pod(name, f"uid-{name}", 0, 1, datetime.now(UTC), phase=phase, ip=ip)


@asynccontextmanager
async def worker(handler: Handler) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_get("/status", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield site._server.sockets[0].getsockname()[1]
    finally:
        await runner.cleanup()


async def test_a_worker_is_understood_and_silent_ones_are_left_out() -> None:
    status = WorkerStatus(generation=3, phase=Phase.SAVE, step=7)

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=status.to_json())

    async with worker(answer) as port, HttpWorkers(port) as asker:
        over, nowhere = pod("over", phase="Failed"), pod("nowhere", ip=None)
        assert await asker.ask([pod(), over, nowhere]) == Answers({"a-0-1": status}, {})


@pytest.mark.parametrize("text", ["", "no JSON", '{"phase": "dancing"}', "x" * 10**6])
async def test_nonsense_is_no_report_and_no_silence(text: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=text)

    async with worker(answer) as port, HttpWorkers(port) as asker:
        assert await asker.ask([pod()]) == Answers()


async def test_errors_and_refused_connections_are_no_report_and_no_silence() -> None:
    async def answer(_: web.Request) -> web.Response:
        raise web.HTTPServiceUnavailable

    async with worker(answer) as port, HttpWorkers(port) as asker:
        assert await asker.ask([pod()]) == Answers()
    async with HttpWorkers(port) as asker:
        assert await asker.ask([pod()]) == Answers()


async def test_a_worker_that_hangs_costs_no_more_than_the_limit_and_is_silent_until_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 0.5)
    thawed, now = asyncio.Event(), 100.0

    async def answer(_: web.Request) -> web.Response:
        await thawed.wait()
        return web.Response(text=WorkerStatus().to_json())

    async with (
        worker(answer) as port,
        HttpWorkers(port, clock=lambda: now) as asker,
        asyncio.timeout(10),
    ):
        assert await asker.ask([pod(), pod("b")]) == Answers({}, {"a-0-1": 0.0, "b": 0.0})
        now += 3
        assert await asker.ask([pod()]) == Answers({}, {"a-0-1": 3.0})
        thawed.set()
        assert await asker.ask([pod()]) == Answers({"a-0-1": WorkerStatus()}, {})
        thawed.clear()
        assert (await asker.ask([pod()])).silent == {"a-0-1": 0.0}


async def test_a_worker_that_waits_for_its_turn_is_not_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(workers, "AT_ONCE", 1)
    seen = 0

    async def answer(_: web.Request) -> web.Response:
        nonlocal seen
        seen += 1
        if seen <= 2:
            await asyncio.sleep(30)  # no turn for others until the time limit
        return web.Response(text=WorkerStatus().to_json())

    async with worker(answer) as port, HttpWorkers(port) as asker, asyncio.timeout(10):
        answers = await asker.ask([pod("a"), pod("b"), pod("c")])
    assert answers == Answers({"c": WorkerStatus()}, {"a": 0.0, "b": 0.0})


@pytest.mark.parametrize(
    ("error", "silence"),
    [
        (TimeoutError(), True),
        (aiohttp.ServerTimeoutError(), True),
        (OSError(errno.EHOSTUNREACH, "no route to host"), True),
        (aiohttp.ClientOSError(errno.ENETUNREACH, "network is unreachable"), True),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), False),
        (ConnectionResetError(errno.ECONNRESET, "reset"), False),
        (aiohttp.ServerDisconnectedError(), False),
        (aiohttp.ClientPayloadError(), False),
    ],
)
def test_only_what_nobody_sent_is_silence(error: Exception, silence: bool) -> None:
    assert is_silence(error) is silence


def test_silence_is_counted_by_pod_and_only_while_it_is_asked_about() -> None:
    now = 0.0
    silence = Silence(lambda: now)
    assert silence.missed("a") == 0
    for now in (3.0, 6.0, 9.0, 12.0):
        assert silence.missed("a") == now
    assert silence.missed("b") == 0
    now += workers.FORGET_SECONDS + 1  # nobody asked: what was in between is not known
    assert silence.missed("a") == 0
    silence.forget_old()
    assert len(silence) == 1  # b is gone
    silence.heard("a")
    assert len(silence) == 0


def test_two_questions_far_apart_are_no_proof_of_silence() -> None:
    """In between others moved, so nobody asked this one."""
    now = 0.0
    silence = Silence(lambda: now)
    silence.missed("a")
    now = 45.0
    assert silence.missed("a") < SILENT_SECONDS
    now += 3.0
    silence.missed("a")
    now += 3.0
    assert silence.missed("a") >= SILENT_SECONDS  # asked again and again: it is


def test_later_answers_win_over_earlier_ones() -> None:
    first = Answers({"a": WorkerStatus(step=1)}, {"b": 3.0, "c": 1.0})
    later = Answers({"b": WorkerStatus(step=2)}, {"c": 2.0})
    assert first | later == Answers(
        {"a": WorkerStatus(step=1), "b": WorkerStatus(step=2)}, {"c": 2.0}
    )


async def test_an_answer_in_pieces_is_read_to_its_end() -> None:
    status = WorkerStatus(generation=3, phase=Phase.SAVE, step=7)
    text = status.to_json().encode()
    first_read = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(text[:10])
        await first_read.wait()
        await response.write(text[10:])
        return response

    async with worker(answer) as port, HttpWorkers(port) as asker:
        asked = asyncio.create_task(asker.ask([pod()]))
        asyncio.get_running_loop().call_later(0.1, first_read.set)
        assert await asked == Answers({"a-0-1": status}, {})


async def test_a_redirect_is_not_followed() -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path_qs)
        if not request.query_string:
            raise web.HTTPFound("/status?elsewhere")
        return web.Response(text=WorkerStatus().to_json())

    async with worker(answer) as port, HttpWorkers(port) as asker:
        assert await asker.ask([pod()]) == Answers()
    assert asked == ["/status"]
