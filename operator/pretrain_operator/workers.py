"""Ask workers how they are: ``GET /status``, bounded in time and size, never an error.

A worker that doesn't answer says nothing, neither good nor bad: it may be loading, cut off, or
gone. For how long is remembered here, by the pod's UID and on a monotonic clock: it is the one
thing about a job that no object of the cluster holds, and losing it with the operator costs a few
seconds. Silence is judged elsewhere, together with what the others say.

The connection is made anew each time, because there is one question every few seconds per job and a
pod's address may be another pod's tomorrow.
"""

import asyncio
import errno
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self

import aiohttp

from pretrain_api import names
from pretrain_api.wire import WorkerStatus
from pretrain_operator.border import read_status
from pretrain_operator.observe import Pod

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 2.0
SIZE_LIMIT = 64 * 1024
# Two misses further apart are no silence in between: nobody asked. More than any pause between
# rounds, also when hundreds of jobs are silent at once and each holds a round up for its two
# seconds, so that one lost packet now and one an hour later never add up.
FORGET_SECONDS = 60.0
# Of the time between two misses, what counts as silence: a little more than doubtful rounds are
# apart. A worker may well have been fine in between, and never have been asked.
COUNTED_SECONDS = 5.0
AT_ONCE = 128  # questions; a worker's time must not run while it waits for its turn
UNREACHABLE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT})


@dataclass(frozen=True, slots=True)
class Answers:
    """What came back when some pods were asked, by pod name."""

    reports: Mapping[str, WorkerStatus] = field(default_factory=dict[str, WorkerStatus])
    """What those who answered said."""
    silent: Mapping[str, float] = field(default_factory=dict[str, float])
    """Seconds of silence since the first question without an answer; 0 if this was it.

    A worker in neither of the two wasn't asked, or answered what makes no sense.
    """

    def __or__(self, more: "Answers") -> "Answers":
        """These answers and those to another question, which win where both have one."""
        reports = {**self.reports, **more.reports}
        silent = {**self.silent, **more.silent}
        return Answers(reports, {name: silent[name] for name in silent if name not in reports})


class Workers(Protocol):
    """Whoever can ask workers."""

    async def ask(self, pods: Iterable[Pod]) -> Answers:
        """Ask those of ``pods`` that have an address and are not over; never raises."""
        ...


class Silence:
    """Since when pods have not answered."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._misses: dict[str, tuple[float, float]] = {}  # by UID: seconds so far, the newest one

    def missed(self, uid: str) -> float:
        """Note that a pod didn't answer. Returns the seconds of its silence so far."""
        now = self._clock()
        seconds, newest = self._misses.get(uid, (0.0, now))
        pause = now - newest
        seconds = 0.0 if pause > FORGET_SECONDS else seconds + min(pause, COUNTED_SECONDS)
        self._misses[uid] = (seconds, now)
        return seconds

    def heard(self, uid: str) -> None:
        """Note that a pod answered."""
        self._misses.pop(uid, None)

    def forget_old(self) -> None:
        """Drop pods that were not asked for long, those that are gone among them."""
        limit = self._clock() - FORGET_SECONDS
        self._misses = {uid: times for uid, times in self._misses.items() if times[1] >= limit}

    def __len__(self) -> int:
        return len(self._misses)


class HttpWorkers:
    """:class:`Workers` over HTTP; an async context manager."""

    def __init__(
        self, port: int = names.HTTP_PORT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._port = port
        self._silence = Silence(clock)
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        # No proxy from the environment: pods are reached directly or not at all.
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, pods: Iterable[Pod]) -> Answers:
        """See Workers."""
        asked = [pod for pod in pods if pod.ip and not pod.over]
        replies = await asyncio.gather(*(self._ask(pod.ip or "") for pod in asked))
        self._silence.forget_old()
        reports: dict[str, WorkerStatus] = {}
        silent: dict[str, float] = {}
        for pod, reply in zip(asked, replies, strict=True):
            if reply is None:
                silent[pod.name] = self._silence.missed(pod.uid)
                continue
            self._silence.heard(pod.uid)
            if status := read_status(reply):
                reports[pod.name] = status
        return Answers(reports, silent)

    async def _ask(self, address: str) -> bytes | None:
        """What came back, empty if it is of no use; None if nothing did."""
        if self._session is None:
            raise RuntimeError("HttpWorkers must be entered with 'async with' first")
        host = f"[{address}]" if ":" in address else address
        try:
            url = f"http://{host}:{self._port}/status"
            # A worker must not send the operator elsewhere: it sees more of the network.
            async with self._turns, self._session.get(url, allow_redirects=False) as response:
                return await _read(response.content) if response.status == 200 else b""
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            log.debug("worker at %s did not answer: %r", host, error)
            return None if is_silence(error) else b""


def is_silence(error: Exception) -> bool:
    """Whether nobody was there.

    A refused or broken connection is an answer: the node lives, and its kubelet tells the rest. A
    worker whose image is being pulled refuses for minutes.
    """
    if isinstance(error, TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in UNREACHABLE


async def _read(stream: aiohttp.StreamReader) -> bytes:
    """The body to its end, or as much as the limit allows: then it is cut and makes no sense."""
    data = b""
    while len(data) < SIZE_LIMIT and (more := await stream.read(SIZE_LIMIT - len(data))):
        data += more
    return data
