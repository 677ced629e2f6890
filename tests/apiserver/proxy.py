"""A reverse proxy between one operator and the API server, which breaks what it is told to.

The operator speaks plain HTTP to it and is passed on as its own service account, so that the rights
of the manifests apply. Writes go through one at a time: then "after the k-th write" is one moment.
A fault is a function around a request, as a middleware is: it may refuse, delay, lose the answer,
or kill the operator before it hears it. Watches pass event by event, and any may be dropped.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web

from pretrain_devcluster.controlplane import ControlPlane

from .api import Body

SERVICE_ACCOUNT = "system:serviceaccount:pretrain-system:pretrain-operator"
GROUPS = ("system:serviceaccounts", "system:authenticated")
PASSED_ON = ("Accept", "Content-Type")
LEASES = "/leases"


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One request of the operator."""

    method: str
    path: str
    query: str
    body: bytes
    accept: str = ""
    number: int = 0  # of a write: how many there were before it, and itself

    @property
    def is_watch(self) -> bool:
        return "watch=true" in self.query or "watch=1" in self.query

    @property
    def is_lease(self) -> bool:
        return LEASES in self.path

    @property
    def is_write(self) -> bool:
        """Whether it changes the cluster; the lease is renewed by time and doesn't count."""
        return self.method != "GET" and not self.is_lease

    def __str__(self) -> str:
        name = ""
        if self.method == "POST":
            name = "/" + json.loads(self.body)["metadata"].get("name", "")
        words = self.path.partition("/namespaces/")[2].partition("/")[2] or self.path
        return f"{self.method} {words}{name}"


class LostReplyError(Exception):
    """The connection to the operator is to be cut instead of an answer."""


Forward = Callable[[], Awaitable[Answer]]
Fault = Callable[[Call, Forward], Awaitable[Answer]]
Screen = Callable[[Call, Body], bool]  # whether an event of a watch is let through


class Proxy:
    """One operator's way to the API server; an async context manager.

    ``faults`` and ``screen`` may be changed at any time. ``writes`` are those that were applied.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self.faults: list[Fault] = []
        self.screen: Screen = lambda call, event: True
        self.writes: list[str] = []
        self.calls: list[Call] = []
        self.port = 0
        self._plane = plane
        self._life = 0  # number of the operator's process, so that a dead one writes no more
        self._turn = asyncio.Lock()
        self._watches: set[asyncio.Task[object]] = set()
        self._session: aiohttp.ClientSession | None = None
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            self._plane.url,
            connector=aiohttp.TCPConnector(ssl=self._plane.tls(), limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=10),
            read_bufsize=2**22,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        self.cut_watches()
        await self._runner.cleanup()
        await self._session.close()

    @property
    def url(self) -> str:
        """For a kubeconfig."""
        return f"http://127.0.0.1:{self.port}"

    def new_life(self) -> None:
        """The operator's process died: what it still has under way is not passed on."""
        self._life += 1

    def cut_watches(self) -> None:
        """End every watch that is open."""
        for watch in self._watches:
            watch.cancel()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        accept = request.headers.get("Accept", "")
        call = Call(
            request.method, request.path, request.query_string, await request.read(), accept
        )
        self.calls.append(call)
        try:
            if call.is_watch:
                return await self._watch(request, call)
            answer = await self._in_turn(call, request.headers.get("Content-Type", ""))
        except LostReplyError:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=500)
        return web.Response(
            status=answer.status,
            body=answer.body,
            headers={"Content-Type": "application/json", **answer.headers},
        )

    async def _in_turn(self, call: Call, content: str) -> Answer:
        if not call.is_write:
            return await self._through(call, lambda: self._forward(call, content))
        life = self._life
        async with self._turn:
            if life != self._life:
                raise LostReplyError
            numbered = Call(
                call.method, call.path, call.query, call.body, call.accept, len(self.writes) + 1
            )

            async def forward() -> Answer:
                answer = await self._forward(numbered, content)
                if answer.status < 300:
                    self.writes.append(str(numbered))
                return answer

            return await self._through(numbered, forward)

    async def _through(self, call: Call, forward: Forward) -> Answer:
        """Past all faults, the first one outermost."""
        for fault in reversed(self.faults):
            forward = _around(fault, call, forward)
        return await forward()

    async def _forward(self, call: Call, content: str) -> Answer:
        assert self._session is not None
        async with self._session.request(
            call.method, _target(call), data=call.body or None, headers=self._headers(call, content)
        ) as answer:
            kept = {key: answer.headers[key] for key in ("Retry-After",) if key in answer.headers}
            return Answer(answer.status, await answer.read(), kept)

    def _headers(self, call: Call, content: str) -> list[tuple[str, str]]:
        given = [("Accept", call.accept), ("Content-Type", content)]
        return [
            *((key, text) for key, text in given if text),
            ("Authorization", f"Bearer {self._plane.token}"),
            ("Impersonate-User", SERVICE_ACCOUNT),
            *(("Impersonate-Group", group) for group in GROUPS),
        ]

    async def _watch(self, request: web.Request, call: Call) -> web.StreamResponse:
        """Pass a stream on, line by line, until one of the three ends it."""

        async def nothing() -> Answer:
            return Answer(200, b"")

        refused = await self._through(call, nothing)
        if refused.status != 200:
            return web.Response(
                status=refused.status, body=refused.body, content_type="application/json"
            )
        stream = web.StreamResponse(headers={"Content-Type": "application/json"})
        task = asyncio.ensure_future(self._pour(request, stream, call))
        self._watches.add(task)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            self._watches.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, OSError | aiohttp.ClientError):
            raise error
        if not stream.prepared:
            raise LostReplyError
        return stream

    async def _pour(self, request: web.Request, stream: web.StreamResponse, call: Call) -> None:
        assert self._session is not None
        async with self._session.get(_target(call), headers=self._headers(call, "")) as answer:
            stream.set_status(answer.status)
            await stream.prepare(request)
            async for line in answer.content:
                if answer.status != 200 or self.screen(call, json.loads(line)):
                    await stream.write(line)


def _around(fault: Fault, call: Call, forward: Forward) -> Forward:
    return lambda: fault(call, forward)


def _target(call: Call) -> str:
    return f"{call.path}?{call.query}" if call.query else call.path
