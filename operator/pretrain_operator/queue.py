"""A work queue by key: many jobs at a time, one round per job at a time.

Adding a key that waits already changes nothing; adding one whose round is under way makes it run
once more afterwards. So no news is lost, and a burst of events costs one or two rounds. A round may
ask for another after some time; one that fails is repeated with growing pauses, and not before the
API server wants to be asked again.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from pretrain_operator.cluster import ClusterError
from pretrain_operator.metrics import Metrics

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 30.0
ROUND_LIMIT_SECONDS = 120.0  # a round is a few requests; one that takes longer hangs


class WorkQueue(Generic[K]):
    """Runs ``reconcile(key)`` for keys that were added; it returns seconds until the next look.

    ``quiet`` errors are expected now and then (two writers met): repeated soon, without a warning.
    Every round waits for ``gate``; keys that come meanwhile are kept.
    """

    def __init__(
        self,
        reconcile: Callable[[K], Awaitable[float | None]],
        *,
        workers: int,
        metrics: Metrics,
        quiet: tuple[type[Exception], ...] = (),
        gate: Callable[[], Awaitable[None]] | None = None,
        round_limit: float = ROUND_LIMIT_SECONDS,
    ) -> None:
        self._reconcile = reconcile
        self._workers = workers
        self._metrics = metrics
        self._quiet = quiet
        self._gate = gate
        self._round_limit = round_limit
        self._waiting: asyncio.Queue[K] = asyncio.Queue()
        self._queued: set[K] = set()
        self._busy: dict[K, float] = {}
        self._again: set[K] = set()
        self._failures: dict[K, int] = {}
        self._complaints: dict[K, str] = {}  # what the log says already
        self._holds: dict[K, float] = {}  # the loop's time before which no round may begin
        self._timers: dict[K, asyncio.TimerHandle] = {}

    def add(self, key: K) -> None:
        """Have a round for ``key`` soon. Call from the event loop's own thread."""
        hold = self._holds.get(key, 0.0) - asyncio.get_running_loop().time()
        if hold > 0:
            self.add_after(key, hold)
            return
        self._cancel_timer(key)
        if key in self._busy:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._waiting.put_nowait(key)
            self._metrics.queue_depth.set(self.depth)

    def add_after(self, key: K, seconds: float) -> None:
        """Have a round after some time, if nothing else causes one before."""
        if seconds <= 0:
            self.add(key)
            return
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= loop.time() + seconds:
            return
        self._cancel_timer(key)
        self._timers[key] = loop.call_later(seconds, self._due, key)

    def _due(self, key: K) -> None:
        del self._timers[key]  # or it would stand for the one that a hold asks for
        self.add(key)

    def forget(self, key: K) -> None:
        """Drop what is remembered about a key that is gone."""
        self._cancel_timer(key)
        self._recovered(key)

    @property
    def depth(self) -> int:
        """Keys that wait for a round."""
        return self._waiting.qsize()

    @property
    def longest_round(self) -> float:
        """Seconds that the oldest round under way has taken so far; 0 if there is none."""
        return time.monotonic() - min(self._busy.values()) if self._busy else 0.0

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._workers):
                    group.create_task(self._work(), name=f"reconciler {number}")
        finally:
            for key in list(self._timers):
                self._cancel_timer(key)

    async def _work(self) -> None:
        while True:
            key = await self._waiting.get()
            if self._gate is not None:
                await self._gate()
            self._queued.discard(key)
            self._busy[key] = time.monotonic()
            self._metrics.queue_depth.set(self.depth)
            try:
                await self._round(key)
            finally:
                started = self._busy.pop(key)
                self._metrics.reconcile_seconds.observe(time.monotonic() - started)
            if key in self._again:
                self._again.discard(key)
                self.add(key)

    async def _round(self, key: K) -> None:
        try:
            async with asyncio.timeout(self._round_limit):
                wake = await self._reconcile(key)
        except Exception as error:  # whatever it is, the other jobs go on and this one is retried
            self._failed(key, error)
        else:
            if failures := self._recovered(key):
                log.info("%s: a round was made again, after %d that failed", key, failures)
            self._metrics.reconciles.labels("ok").inc()
            if wake is not None:
                self.add_after(key, wake)

    def _recovered(self, key: K) -> int:
        """Forget failures. Returns how many of them the log speaks of."""
        self._holds.pop(key, None)
        failures = self._failures.pop(key, 0)
        return failures if self._complaints.pop(key, None) else 0

    def _failed(self, key: K, error: Exception) -> None:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 20), LONGEST_PAUSE_SECONDS)
        if isinstance(error, ClusterError) and error.retry_after > 0:
            pause = max(pause, error.retry_after)
            self._holds[key] = asyncio.get_running_loop().time() + error.retry_after
        if isinstance(error, self._quiet):
            self._metrics.reconciles.labels("conflict").inc()
            log.debug("%s: %s; again in %.1f s", key, error, pause)
        else:
            self._metrics.reconciles.labels("error").inc()
            self._complain(key, error, pause)
        self.add_after(key, pause)

    def _complain(self, key: K, error: Exception, pause: float) -> None:
        """Warn once of each failure of a key, with a traceback if the fault may be ours."""
        complaint = f"{type(error).__name__}: {error}"
        known = self._complaints.get(key) == complaint
        self._complaints[key] = complaint
        level = logging.DEBUG if known else logging.WARNING
        expected = isinstance(error, ClusterError | TimeoutError)
        trace = None if known or expected else error
        log.log(level, "%s: %s; again in %.1f s", key, complaint, pause, exc_info=trace)

    def _cancel_timer(self, key: K) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
