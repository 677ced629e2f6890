"""What may befall a request, a watch or the operator behind it; each is a fault of the proxy."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from .proxy import Answer, Call, Fault, Forward, LostReplyError, Proxy


class Kill:
    """The operator dies after its ``number``-th write was applied, before it hears the answer."""

    def __init__(self, number: int, kill: Callable[[], None]) -> None:
        self.done = False
        self.after = "not killed"
        self._number = number
        self._kill = kill

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        answer = await forward()
        applied = answer.status < 300 and call.is_write
        if not self.done and applied and call.number == self._number:
            self.done, self.after = True, f"killed after {call}"
            self._kill()
            raise LostReplyError
        return answer


class EverySecond:
    """Every other write meets a fault: each is hit, and gets through when it comes again."""

    def __init__(self, fault: Fault) -> None:
        self.hits = 0
        self._fault = fault
        self._spared = False

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        if not call.is_write:
            return await forward()
        self._spared = not self._spared
        if not self._spared:
            return await forward()
        self.hits += 1
        return await self._fault(call, forward)


def refuse(status: int, reason: str, retry_after: int | None = None) -> Fault:
    """The API server says no and does nothing."""

    async def fault(call: Call, forward: Forward) -> Answer:
        body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": reason,
            "message": f"{reason}, says the test",
            "code": status,
        }
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return Answer(status, json.dumps(body).encode(), headers)

    return fault


async def lose_reply(call: Call, forward: Forward) -> Answer:
    """The write is applied, but nobody is told."""
    await forward()
    raise LostReplyError


async def lose_request(call: Call, forward: Forward) -> Answer:
    """The connection breaks before anything is done."""
    raise LostReplyError


def slow(seconds: float) -> Fault:
    """Every answer takes its time."""

    async def fault(call: Call, forward: Forward) -> Answer:
        if not call.is_watch:
            await asyncio.sleep(seconds)
        return await forward()

    return fault


class Gone:
    """Nobody answers, and no watch lives, until the API server is back."""

    def __init__(self, proxy: Proxy) -> None:
        self.refused = 0
        self.back = asyncio.Event()
        self._proxy = proxy
        proxy.cut_watches()
        proxy.faults.insert(0, self)

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        if self.back.is_set():
            return await forward()
        self.refused += 1
        raise LostReplyError


class Hang:
    """A request that matches is applied, but answered only when it is let go; others pass."""

    def __init__(self, matches: Callable[[Call], bool]) -> None:
        self.caught = asyncio.Event()
        self.free = asyncio.Event()
        self._matches = matches

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        answer = await forward()
        if not self.free.is_set() and self._matches(call):
            self.caught.set()
            await self.free.wait()
        return answer


class StaleList:
    """The first lists of objects that were seen are kept, and shown once more on demand."""

    def __init__(self, plural: str) -> None:
        self.shown = 0
        self.replay = False
        self._plural = plural
        self._kept: Answer | None = None

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        is_list = call.method == "GET" and call.path.endswith(f"/{self._plural}")
        if not is_list or call.is_watch or "PartialObject" in call.accept:
            return await forward()
        if self.replay and self._kept is not None and not self.shown:
            self.shown += 1
            return self._kept
        answer = await forward()
        self._kept = self._kept or answer
        return answer


@asynccontextmanager
async def cut_watches_every(proxy: Proxy, seconds: float) -> AsyncIterator[None]:
    """No watch lives longer than this."""

    async def cut() -> None:
        while True:
            await asyncio.sleep(seconds)
            proxy.cut_watches()

    task = asyncio.create_task(cut())
    try:
        yield
    finally:
        task.cancel()


class Expired:
    """Each watch is told once that it can't go on from where it was, and has to list again."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        plural = call.path.rpartition("/")[2]
        if not call.is_watch or plural in self.told:
            return await forward()
        self.told.add(plural)
        return await refuse(410, "Expired")(call, forward)
