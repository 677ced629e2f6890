"""One operator at a time: a Lease, and a guard that looks at it before every write.

Who holds the Lease renews it every few seconds. The others watch it change and take it once it has
stood still for its whole duration. No clock of one machine is ever compared with that of another:
what counts is for how long *this* process has seen no change, on a clock that goes on while the
process or the machine sleeps. ``renewTime`` only has to differ each time.

Holding it yesterday is not enough to write today: a process may be frozen and thawed at any moment.
So every write asks how old the last successful renewal is, counted from before it was sent. What is
sent within ``SURE_SECONDS`` and a connection's time limit of it comes before anybody else's turn:

    renewal sent ... last write checked ... and connected ... Lease may be taken
    0 s              10 s                    15 s              15 s after the renewal *arrived*

Whatever slips through nevertheless meets the preconditions on resource versions and UIDs.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from typing import Any, cast

from pretrain_operator.cluster import (
    CONNECT_SECONDS,
    Body,
    Cluster,
    ClusterError,
    ConflictError,
    Kind,
    NotFoundError,
)
from pretrain_operator.metrics import Metrics
from pretrain_operator.reconcile import Key

log = logging.getLogger(__name__)

DURATION_SECONDS = 15.0
RENEW_SECONDS = 3.0
SURE_SECONDS = DURATION_SECONDS - CONNECT_SECONDS
STEP_SECONDS = 6.0  # for one step: a renewal that takes longer is tried anew
BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class NotLeadingError(ClusterError):
    """Another operator may lead by now, so nothing is written."""


def boot_time() -> float:
    """Seconds on a clock that goes on in suspension and is never set."""
    return time.clock_gettime(BOOT_CLOCK)


# --- what to do, without doing it ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """The Lease as it is stored."""

    holder: str
    renewed: datetime | None
    duration: float
    transitions: int
    version: str

    @property
    def mark(self) -> tuple[str, datetime | None, int]:
        """What differs after every renewal."""
        return self.holder, self.renewed, self.transitions


@dataclass(frozen=True, slots=True)
class Sight:
    """Since when, on our own clock, the Lease has looked as it does."""

    mark: tuple[str, datetime | None, int]
    since: float


class Move(Enum):
    """What the next step does about the Lease."""

    RENEW = auto()
    TAKE = auto()
    WAIT = auto()


def parse_record(body: Mapping[str, Any]) -> Record:
    """Read a Lease; what somebody else broke in it counts as not there."""
    spec = cast(Mapping[str, Any], body.get("spec") or {})
    return Record(
        holder=spec.get("holderIdentity") or "",
        renewed=_time(spec.get("renewTime")),
        duration=max(float(spec.get("leaseDurationSeconds") or 0), DURATION_SECONDS),
        transitions=int(spec.get("leaseTransitions") or 0),
        version=body["metadata"]["resourceVersion"],
    )


def observe(before: Sight | None, record: Record, now: float) -> Sight:
    """What is known after ``record`` was read at ``now``."""
    if before is not None and before.mark == record.mark:
        return before
    return Sight(record.mark, now)


def decide(identity: str, record: Record, sight: Sight, now: float) -> Move:
    """Whether to renew the Lease, to take it, or to leave it to its holder.

    One's own is renewed even if this process never held it: a container that was restarted within
    its pod goes on where the one before it ended.
    """
    if record.holder == identity:
        return Move.RENEW
    if not record.holder or now - sight.since >= record.duration:
        return Move.TAKE
    return Move.WAIT


def claim(identity: str, record: Record | None, wall: datetime) -> Body:
    """The Lease's spec that says it is ours. ``wall`` is for people, and never goes backwards."""
    if record and record.renewed and record.renewed >= wall:
        wall = record.renewed + timedelta(microseconds=1)
    stamp = wall.isoformat(timespec="microseconds").replace("+00:00", "Z")
    spec: Body = {
        "holderIdentity": identity,
        "leaseDurationSeconds": int(DURATION_SECONDS),
        "renewTime": stamp,
    }
    if record is None or record.holder != identity:
        taken = {"acquireTime": stamp, "leaseTransitions": record.transitions + 1 if record else 0}
        spec |= taken
    return spec


def _time(text: str | None) -> datetime | None:
    with suppress(ValueError):
        return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
    return None


# --- doing it -----------------------------------------------------------------------------------


class Keeper:
    """Takes the Lease ``namespace/name`` when it may, renews it, and knows whether it is held.

    ``again`` is called for every job that metrics have forgotten when it is held again.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        name: str,
        identity: str,
        metrics: Metrics,
        again: Callable[[Key], None] = lambda job: None,
        *,
        clock: Callable[[], float] = boot_time,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._metrics = metrics
        self._again = again
        self._clock = clock
        self._wall = wall
        self._held: Record | None = None  # ours, as we wrote it; None if it must be read
        self._sight: Sight | None = None
        self._renewed = -math.inf
        self._term = 0
        self._taken = asyncio.Event()
        self._said = ""

    @property
    def leading(self) -> bool:
        """Whether the Lease is surely ours."""
        return self._clock() - self._renewed < SURE_SECONDS

    def term(self) -> int:
        """The number of times that the Lease was taken: between two, another one may have led."""
        return self._term

    def check(self) -> None:
        """Raise NotLeadingError unless the Lease is surely ours."""
        if not self.leading:
            raise NotLeadingError(f"the Lease {self._namespace}/{self._name} may not be ours")

    async def wait(self) -> None:
        """Return as soon as the Lease is surely ours."""
        while not self.leading:
            self._taken.clear()
            await self._taken.wait()

    async def run(self) -> None:
        """Take and renew until cancelled."""
        while True:
            try:
                async with asyncio.timeout(STEP_SECONDS):
                    await self.step()
            except (ClusterError, TimeoutError) as error:
                self._say(f"the Lease can't be renewed: {error or 'no answer'}", logging.WARNING)
            for job in self._metrics.lead(self.leading):
                self._again(job)
            await asyncio.sleep(RENEW_SECONDS)

    async def step(self) -> None:
        """Look at the Lease once and do what is due. Raises ClusterError."""
        started = self._clock()
        held, self._held = self._held, None
        try:
            record = held or await self._read()
            if record is None:
                await self._claim(None)
                return
            self._sight = observe(self._sight, record, self._clock())
            # Counted from before the question: the answer was true then, or later.
            if decide(self._identity, record, self._sight, started) is Move.WAIT:
                self._say(f"{record.holder} leads, waiting for its end", logging.INFO)
            else:
                await self._claim(record)
        except ConflictError:
            log.debug("somebody else wrote the Lease")  # read it again, decide again

    async def release(self) -> None:
        """Let somebody else lead at once; if that fails they wait for the Lease's duration.

        Call it when nothing is written any more.
        """
        self._held, self._renewed = None, -math.inf
        self._metrics.lead(False)
        with suppress(ClusterError, TimeoutError):
            async with asyncio.timeout(STEP_SECONDS):
                record = await self._read()
                if record is not None and record.holder == self._identity:
                    await self._patch(record, {"holderIdentity": ""})
                    log.info("released the Lease")

    async def _read(self) -> Record | None:
        with suppress(NotFoundError):
            return parse_record(await self._cluster.get(Kind.LEASE, self._namespace, self._name))
        return None

    async def _claim(self, record: Record | None) -> None:
        started = self._clock()
        spec = claim(self._identity, record, self._wall())
        if record is None:
            body = {"metadata": {"name": self._name}, "spec": spec}
            body |= {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
            written = await self._cluster.create(Kind.LEASE, self._namespace, body)
        else:
            written = await self._patch(record, spec)
        if record is None or record.holder != self._identity:
            self._term += 1
        self._held = parse_record(written)
        self._renewed = started
        self._taken.set()
        self._say("leading", logging.INFO)

    async def _patch(self, record: Record, spec: Body) -> Body:
        patch = {"metadata": {"resourceVersion": record.version}, "spec": spec}
        return await self._cluster.patch(Kind.LEASE, self._namespace, self._name, patch)

    def _say(self, what: str, level: int) -> None:
        if what != self._said:
            log.log(level, "%s", what)
        self._said = what


class GuardedCluster:
    """:class:`Cluster` that writes only while the Lease is surely held."""

    def __init__(self, cluster: Cluster, check: Callable[[], None]) -> None:
        self._cluster = cluster
        self._check = check

    async def get(self, kind: Kind, namespace: str, name: str) -> Body:
        """See Cluster."""
        return await self._cluster.get(kind, namespace, name)

    async def create(self, kind: Kind, namespace: str, body: Body) -> Body:
        """See Cluster. Raises NotLeadingError."""
        self._check()
        return await self._cluster.create(kind, namespace, body)

    async def patch(self, kind: Kind, namespace: str, name: str, patch: Body) -> Body:
        """See Cluster. Raises NotLeadingError."""
        self._check()
        return await self._cluster.patch(kind, namespace, name, patch)

    async def patch_status(self, kind: Kind, namespace: str, name: str, patch: Body) -> Body:
        """See Cluster. Raises NotLeadingError."""
        self._check()
        return await self._cluster.patch_status(kind, namespace, name, patch)

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        """See Cluster. Raises NotLeadingError."""
        self._check()
        await self._cluster.delete(kind, namespace, name, uid, grace_seconds)
