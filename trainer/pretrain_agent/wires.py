"""Sockets under the meeting: a server at the leader, a client at every agent.

Plain sockets with JSON lines, bounded in size and time, rather than a TCPStore: a call into a store
blocks in C++ beyond the reach of signals and deadlines when its host is frozen. The port is open to
whoever can reach the pod, so a stranger must not be able to do more than be disconnected: the first
line has to carry the generation's nonce within a few seconds, and few strangers are heard at once.
"""

import asyncio
import contextlib
import errno
import hmac
import logging
import socket
from collections.abc import Callable, Mapping
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from pretrain_agent.hang import Pulse
from pretrain_agent.meeting import (
    FROM_AGENT,
    FROM_LEADER,
    Done,
    FromLeader,
    Hello,
    Join,
    Letter,
    Meeting,
    Opened,
    Paused,
    Waiting,
)
from pretrain_api.wire import Phase, Wire

log = logging.getLogger(__name__)

Message = TypeVar("Message")

FRAME_BYTES = 16 * 1024  # longest line accepted; a report with a failure is under 3 KiB
HELLO_SECONDS = 3.0  # within which a stranger must have introduced itself
STRANGERS = 64  # connections without a valid hello at a time
BACKLOG = 1024  # all agents of a large world connect within the same moment
CONNECT_SECONDS = 1.0
RETRY_SECONDS = 0.1
# A node that loses power closes no connection. Silence is probed, and both a probe and a message
# that nobody acknowledges within about ten seconds end the connection; then the client tries anew.
LIVENESS = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 4,  # seconds of silence before the first probe
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 2,  # seconds between probes
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,  # probes
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 10_000,  # milliseconds
}


class PortTakenError(OSError):
    """Another process listens on a port of ours; the message says on which."""


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    On a loopback ``host`` it serves that address alone; otherwise all addresses, so that a port
    forward, which connects to the pod's own loopback, works too.

    Raises:
        PortTakenError: another process listens there.
    """
    try:
        return _listen(host, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise PortTakenError(
            f"port {port} is taken: another process listens there, so this worker can't"
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    if host in ("127.0.0.1", "localhost"):
        return socket.create_server((host, port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def notice_death(writer: asyncio.StreamWriter) -> None:
    """Have the kernel end this connection when its other end has vanished; see LIVENESS."""
    for (level, option), value in LIVENESS.items():
        writer.get_extra_info("socket").setsockopt(level, option, value)


def encode(message: Wire) -> bytes:
    """One message as a line."""
    return message.to_json().encode() + b"\n"


async def receive(reader: asyncio.StreamReader, schema: TypeAdapter[Message]) -> Message | None:
    """The next message, or None when the connection ended or what came is not a message."""
    try:
        line = await reader.readuntil(b"\n")
        return schema.validate_json(line)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
        return None
    except ValidationError as error:
        log.warning("dropped a malformed message: %s", error.errors()[0]["msg"])
        return None


class MeetingServer:
    """The meeting point. It listens from the start and serves while this agent is the leader."""

    def __init__(self) -> None:
        self._meeting: Meeting | None = None
        self._nonce = ""
        self._members: dict[int, asyncio.StreamWriter] = {}
        self._strangers = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, sock: socket.socket) -> None:
        """Accept connections on a listening socket."""
        self._server = await asyncio.start_server(
            self._accept, sock=sock, limit=FRAME_BYTES, backlog=BACKLOG
        )

    def host(self, meeting: Meeting | None, nonce: str) -> None:
        """Serve this meeting from now on, or none; members of another one are disconnected."""
        for writer in self._members.values():
            writer.close()
        self._members.clear()
        self._meeting, self._nonce = meeting, nonce

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        notice_death(writer)
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank = None
        try:
            rank = await self._admit(reader, writer)
            if rank is not None:
                await self._attend(rank, reader, writer)
        finally:
            if rank is not None and self._members.get(rank) is writer:
                del self._members[rank]
            writer.close()

    async def _admit(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> int | None:
        """Hear a stranger's hello; returns its rank when it belongs to the current meeting."""
        if self._strangers >= STRANGERS:
            return None
        self._strangers += 1
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await receive(reader, FROM_AGENT)
        except TimeoutError:
            return None
        finally:
            self._strangers -= 1
        meeting = self._meeting
        if meeting is None or not isinstance(hello, Hello):
            return None
        known = hmac.compare_digest(hello.nonce.encode(), self._nonce.encode())
        if hello.generation != meeting.generation or not 0 <= hello.rank < meeting.size:
            return None
        if not known:
            log.warning("refused an agent with a wrong nonce as rank %d", hello.rank)
            return None
        if (before := self._members.pop(hello.rank, None)) is not None:
            before.close()
        self._members[hello.rank] = writer
        self._deliver(meeting.receive(hello.rank, hello))
        return hello.rank

    async def _attend(
        self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Let a member speak until it leaves, talks nonsense or is replaced."""
        while (message := await receive(reader, FROM_AGENT)) is not None:
            if self._meeting is None or self._members.get(rank) is not writer:
                return
            self._deliver(self._meeting.receive(rank, message))

    def _deliver(self, letters: list[Letter]) -> None:
        for letter in letters:
            if (writer := self._members.get(letter.rank)) is not None:
                writer.write(encode(letter.message))

    def judge(self, granted: Mapping[Phase, float]) -> None:
        """Have the meeting, if there is one here, look for ranks that hang."""
        if self._meeting is not None:
            self._deliver(self._meeting.judge(granted))

    def waiting(self) -> Waiting:
        """Who is missing at the meeting; nobody where there is none."""
        return Waiting() if self._meeting is None else self._meeting.waiting()

    def start_over(self) -> None:
        """This process could not run for a while."""
        if self._meeting is not None:
            self._meeting.start_over()

    async def close(self) -> None:
        """Send what is left to send, and stop."""
        if self._server is not None:
            self._server.close()
        for writer in self._members.values():
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CONNECT_SECONDS):
                    await writer.drain()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


class MeetingClient:
    """This agent's line to the leader of one generation; it reconnects for as long as it runs."""

    def __init__(
        self, host: str, port: int, hello: Hello, hear: Callable[[FromLeader], None]
    ) -> None:
        self._address = (host, port)
        self._hello = hello
        self._hear = hear
        self._standing: Join | Paused | Done | None = None  # said again on every new connection
        self._writer: asyncio.StreamWriter | None = None

    def say(self, message: Join | Paused | Opened | Done | Pulse) -> None:
        """Tell the leader, now if connected and otherwise as soon as that is so.

        An Opened that gets lost is asked for again, and the next Pulse is never far.
        """
        if not isinstance(message, Opened | Pulse):
            self._standing = message
        if self._writer is not None:
            self._writer.write(encode(message))

    async def run(self) -> None:
        """Keep a connection to the leader until cancelled."""
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CONNECT_SECONDS):
                    reader, writer = await asyncio.open_connection(
                        *self._address, limit=FRAME_BYTES
                    )
                notice_death(writer)
                await self._converse(reader, writer)
            await asyncio.sleep(RETRY_SECONDS)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        try:
            writer.write(encode(self._hello))
            if self._standing is not None:
                writer.write(encode(self._standing))
            while (message := await receive(reader, FROM_LEADER)) is not None:
                self._hear(message)
        finally:
            self._writer = None
            writer.close()
