"""What may befall a request, a watch or the operator behind it; each is a fault of the proxy."""

import asyncio
import json
from collections.abc import Callable

from .proxy import Answer, Call, Fault, Forward, LostReplyError


class Kill:
    """The operator dies after its ``number``-th write was applied, before it hears the answer."""

    def __init__(self, number: int, kill: Callable[[], None]) -> None:
        self.done = False
        self._number = number
        self._kill = kill

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        answer = await forward()
        applied = answer.status < 300 and call.is_write
        if not self.done and applied and call.number == self._number:
            self.done = True
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
