"""Ask workers how they are: ``GET /status``, bounded in time and size, never an error.

A worker that doesn't answer says nothing, neither good nor bad: it may be loading, cut off, or
gone, and the pod tells which. The connection is made anew each time, because there is one question
every few seconds per job and a pod's address may be another pod's tomorrow.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Protocol, Self

import aiohttp

from pretrain_api import names
from pretrain_api.wire import WorkerStatus
from pretrain_operator.border import read_status
from pretrain_operator.observe import Pod

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 2.0
SIZE_LIMIT = 64 * 1024


class Workers(Protocol):
    """Whoever can ask workers."""

    async def ask(self, pods: Iterable[Pod]) -> Mapping[str, WorkerStatus]:
        """Status by pod name; pods that don't answer are missing."""
        ...


class HttpWorkers:
    """:class:`Workers` over HTTP; an async context manager."""

    def __init__(self, port: int = names.HTTP_PORT) -> None:
        self._port = port
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        connector = aiohttp.TCPConnector(limit=64, force_close=True)
        # No proxy from the environment: pods are reached directly or not at all.
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, pods: Iterable[Pod]) -> Mapping[str, WorkerStatus]:
        """See Workers."""
        asked = [pod for pod in pods if pod.ip and not pod.over]
        answers = await asyncio.gather(*(self._ask(pod.ip or "") for pod in asked))
        return {pod.name: said for pod, said in zip(asked, answers, strict=True) if said}

    async def _ask(self, address: str) -> WorkerStatus | None:
        if self._session is None:
            raise RuntimeError("HttpWorkers must be entered with 'async with' first")
        host = f"[{address}]" if ":" in address else address
        try:
            url = f"http://{host}:{self._port}/status"
            # A worker must not send the operator elsewhere: it sees more of the network.
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status != 200:
                    return None
                return read_status(await _read(response.content))
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            log.debug("worker at %s did not answer: %r", host, error)
            return None


async def _read(stream: aiohttp.StreamReader) -> bytes:
    """The body to its end, or as much as the limit allows: then it is cut and makes no sense."""
    data = b""
    while len(data) < SIZE_LIMIT and (more := await stream.read(SIZE_LIMIT - len(data))):
        data += more
    return data
