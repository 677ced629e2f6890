"""The meeting point as a stranger sees it, and as an agent does after an accident."""

import asyncio
import json
import os
import socket
from collections.abc import Callable

import pytest

from pretrain_agent import wires
from pretrain_agent.meeting import FromLeader, Go, Hello, Join, Meeting, Open, Opened
from pretrain_agent.wires import FRAME_BYTES, MeetingClient, MeetingServer, listen

HELLO = Hello(generation=1, rank=0, nonce="secret")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.005)


async def meet() -> tuple[MeetingServer, int]:
    server = MeetingServer()
    sock = listen("127.0.0.1", 0)
    await server.start(sock)
    server.host(Meeting(1, 1), "secret")
    return server, sock.getsockname()[1]


async def exchange(port: int, sent: bytes) -> bytes:
    """Everything the server answers to these bytes before it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    async with asyncio.timeout(20):
        try:
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()


async def works(port: int) -> None:
    """An honest agent gets its round started."""
    heard: list[FromLeader] = []
    client = MeetingClient("127.0.0.1", port, HELLO, heard.append)
    client.say(Join(round=0))
    task = asyncio.create_task(client.run())
    await until(lambda: Open(round=0) in heard)
    client.say(Opened(round=0, port=99))
    await until(lambda: Go(round=0, port=99) in heard)
    task.cancel()


HOSTILE = {
    "noise": os.urandom(4096) + b"\n",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "empty": b"\n",
    "null": b"null\n",
    "deep": b"[" * 15000 + b"\n",
    "endless": b"x" * (4 * FRAME_BYTES),
    "wrong nonce": HELLO.model_copy(update={"nonce": "guess"}).to_json().encode() + b"\n",
    "unicode nonce": HELLO.model_copy(update={"nonce": "geheimnß"}).to_json().encode() + b"\n",
    "no such rank": HELLO.model_copy(update={"rank": 7}).to_json().encode() + b"\n",
    "negative rank": HELLO.model_copy(update={"rank": -1}).to_json().encode() + b"\n",
    "old generation": HELLO.model_copy(update={"generation": 0}).to_json().encode() + b"\n",
    "no hello": Join(round=0).to_json().encode() + b"\n",
    "not utf-8": b'{"kind": "hello", "nonce": "\xff"}\n',
    "huge number": b'{"kind": "hello", "rank": ' + b"9" * 5000 + b"}\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_strangers_are_told_nothing_and_disconnected(name: str) -> None:
    async def scenario() -> None:
        server, port = await meet()
        assert await exchange(port, HOSTILE[name]) == b""
        await works(port)
        await server.close()

    asyncio.run(scenario())


def test_silent_strangers_are_few_and_soon_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wires, "HELLO_SECONDS", 0.3)

    async def scenario() -> None:
        server, port = await meet()
        silent = [
            await asyncio.open_connection("127.0.0.1", port) for _ in range(2 * wires.STRANGERS)
        ]
        await works(port)  # it retries until there is room
        for reader, writer in silent:
            async with asyncio.timeout(20):
                assert await reader.read() == b""
            writer.close()
        await server.close()

    asyncio.run(scenario())


def test_a_member_that_talks_nonsense_is_disconnected_and_may_come_back() -> None:
    async def scenario() -> None:
        server, port = await meet()
        hello = HELLO.to_json().encode() + b"\n"
        assert (
            await exchange(port, hello + json.dumps({"kind": "surprise"}).encode() + b"\n") == b""
        )
        await works(port)
        await server.close()

    asyncio.run(scenario())


def test_a_client_waits_for_its_leader_and_survives_its_restart() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as placeholder:
            port = placeholder.getsockname()[1]
        heard: list[FromLeader] = []
        client = MeetingClient("127.0.0.1", port, HELLO, heard.append)
        client.say(Join(round=0))
        task = asyncio.create_task(client.run())
        for _ in range(2):
            heard.clear()
            server = MeetingServer()
            await server.start(listen("127.0.0.1", port))
            server.host(Meeting(1, 1), "secret")
            await until(lambda: Open(round=0) in heard)  # it repeats itself to a new leader
            await server.close()
        task.cancel()

    asyncio.run(scenario())


def test_a_new_generation_disconnects_the_members_of_the_old() -> None:
    async def scenario() -> None:
        server, port = await meet()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(wires.encode(HELLO) + wires.encode(Join(round=0)))
        async with asyncio.timeout(20):
            assert await reader.readline()
            server.host(None, "")
            assert await reader.read() == b""
        writer.close()
        assert await exchange(port, wires.encode(HELLO)) == b""
        await server.close()

    asyncio.run(scenario())


def test_both_ends_notice_when_the_other_one_vanishes() -> None:
    async def scenario() -> None:
        server, port = await meet()
        client = MeetingClient("127.0.0.1", port, HELLO, lambda message: None)
        task = asyncio.create_task(client.run())
        await until(lambda: server._members and client._writer)
        for writer in (server._members[0], client._writer):
            assert writer is not None
            sock = writer.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle, interval, probes, patience = (
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (
                    socket.TCP_KEEPIDLE,
                    socket.TCP_KEEPINTVL,
                    socket.TCP_KEEPCNT,
                    socket.TCP_USER_TIMEOUT,
                )
            )
            assert idle + interval * probes <= 10
            assert 0 < patience <= 10_000
        task.cancel()
        await server.close()

    asyncio.run(scenario())
