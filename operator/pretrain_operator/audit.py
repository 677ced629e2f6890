"""Do the watches bring what there is? A stream can fall silent without an error.

Every half minute a list, only names and versions of it, is compared with what the watches brought.
What a watch still lacks a minute after a list first showed it makes the process unhealthy, and the
kubelet starts it anew. Meanwhile the jobs concerned get their rounds, with pods that were read one
by one. A deletion that nobody watched (kopf forgets it when a stream has to start over) is mended
for good in the same way.

Only what two lists show counts: while there is no answer from the API server nothing is judged.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pretrain_operator.cluster import Body, ClusterError, Kind, NotFoundError
from pretrain_operator.metrics import Metrics
from pretrain_operator.reconcile import Key, job_of

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 30.0
SETTLE_SECONDS = 2.0  # for events that are on their way while the list is made
STALE_SECONDS = 60.0
MENDED_AT_ONCE = 200  # objects read one by one in a round
KINDS = (Kind.JOB, Kind.POD)


@dataclass(frozen=True, slots=True)
class Item:
    """One version of an object."""

    uid: str
    namespace: str
    name: str
    version: str
    job: Key | None  # whose round it concerns


@dataclass(frozen=True, slots=True)
class Lack:
    """What a watch owes."""

    item: Item
    since: float
    gone: bool  # it should have told of the end of the object, otherwise of a newer version
    brought: str | None  # what it had brought until then


def reached(version: str, wanted: str) -> bool:
    """Whether ``version`` is ``wanted`` or a later one; resource versions are growing numbers."""
    if version.isdecimal() and wanted.isdecimal():
        return int(version) >= int(wanted)
    return version == wanted


class Ledger:
    """What the watch of one kind brought, and what it owes."""

    def __init__(self) -> None:
        self._brought: dict[str, Item] = {}
        self._lacks: dict[str, Lack] = {}
        self._compared: float | None = None

    def saw(self, item: Item, *, gone: bool) -> None:
        """Note what the watch brought."""
        if gone:
            self._brought.pop(item.uid, None)
        else:
            self._brought[item.uid] = item
        lack = self._lacks.get(item.uid)
        if lack and (gone or (not lack.gone and reached(item.version, lack.item.version))):
            del self._lacks[item.uid]

    def compare(self, listed: Iterable[Item], now: float) -> None:
        """Compare with a list that was made at ``now``, seconds on a monotonic clock."""
        found = {item.uid: item for item in listed}
        if self._compared is None or now - self._compared > 2.5 * INTERVAL_SECONDS:
            self._lacks = {}  # nobody looked: what was owed then says nothing now
        self._compared = now
        owed = [self._lack(item, now, gone=False) for item in found.values() if self._behind(item)]
        ended = (item for uid, item in self._brought.items() if uid not in found)
        owed += [self._lack(item, now, gone=True) for item in ended]
        self._lacks = {lack.item.uid: lack for lack in owed}

    def _behind(self, item: Item) -> bool:
        brought = self._brought.get(item.uid)
        return brought is None or not reached(brought.version, item.version)

    def _lack(self, item: Item, now: float, *, gone: bool) -> Lack:
        brought = self._brought.get(item.uid)
        version = brought.version if brought else None
        before = self._lacks.get(item.uid)
        # A stream that brought something about this object meanwhile is alive, if late.
        if before and before.gone is gone and before.brought == version:
            return Lack(item, before.since, gone, version)
        return Lack(item, now, gone, version)

    @property
    def late(self) -> float:
        """Seconds for which lists have shown what is owed; 0 if nothing is."""
        if self._compared is None:
            return 0.0
        return max((self._compared - lack.since for lack in self._lacks.values()), default=0.0)

    @property
    def lacks(self) -> tuple[Lack, ...]:
        """All that is owed, the oldest first."""
        return tuple(sorted(self._lacks.values(), key=lambda lack: lack.since))


class Pods(Protocol):
    """The cache of pods, as far as the audit mends it."""

    def put(self, body: Body) -> bool:
        """This is how a pod is, unless something newer is known. Returns whether that is new."""
        ...

    def drop(self, uid: str) -> None:
        """This pod is gone."""
        ...


class Audit:
    """Compares watches with lists, nudges jobs whose news were missed, and says how late they are.

    ``fetch`` lists all there is (kind, namespace), ``get`` reads one object.
    """

    def __init__(
        self,
        fetch: Callable[[Kind, str], Awaitable[list[Item]]],
        get: Callable[[Kind, str, str], Awaitable[Body]],
        pods: Pods,
        nudge: Callable[[Key], None],
        metrics: Metrics,
        *,
        namespaces: tuple[str, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._get = get
        self._pods = pods
        self._nudge = nudge
        self._metrics = metrics
        self._namespaces = namespaces or ("",)
        self._clock = clock
        self._ledgers = {kind: Ledger() for kind in KINDS}

    def saw(self, kind: Kind, item: Item, *, gone: bool) -> None:
        """Note what a watch brought."""
        self._ledgers[kind].saw(item, gone=gone)

    def trouble(self) -> str | None:
        """The sentence that says which watch is stale; None if none is."""
        for kind, ledger in self._ledgers.items():
            if ledger.late >= STALE_SECONDS:
                item = ledger.lacks[0].item
                what = f"{item.namespace}/{item.name}"
                return f"the watch of {kind.plural} has lacked {what} for {ledger.late:.0f} s"
        return None

    async def run(self) -> None:
        """Look now and then until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            for kind in KINDS:
                try:
                    await self.look(kind)
                except ClusterError as error:
                    log.debug("%s not compared: %s", kind.plural, error)

    async def look(self, kind: Kind) -> None:
        """Compare once, and mend what is owed. Raises ClusterError."""
        ledger, now = self._ledgers[kind], self._clock()
        listed: list[Item] = []
        for namespace in self._namespaces:
            listed += await self._fetch(kind, namespace)
        ledger.compare(listed, now)
        if ledger.lacks:
            await asyncio.sleep(SETTLE_SECONDS)
        for lack in ledger.lacks[:MENDED_AT_ONCE]:
            await self._mend(kind, lack)
        self._metrics.watch_lag.labels(kind.plural).set(ledger.late)

    async def _mend(self, kind: Kind, lack: Lack) -> None:
        """Have the job's round see the object as it is, and forget one that is gone."""
        item = lack.item
        try:
            body: Body | None = await self._get(kind, item.namespace, item.name)
        except NotFoundError:
            body = None
        if body is None or body["metadata"]["uid"] != item.uid:
            log.info("%s %s/%s: its end was missed", kind.plural, item.namespace, item.name)
            if kind is Kind.POD:
                self._pods.drop(item.uid)
            self.saw(kind, item, gone=True)
        elif kind is Kind.POD:
            self._pods.put(body)
        if item.job is not None:
            self._nudge(item.job)


def item_of(kind: Kind, body: Mapping[str, Any]) -> Item:
    """The version of an object that ``body`` is, from its metadata alone."""
    meta = body["metadata"]
    key = (meta["namespace"], meta["name"])
    return Item(
        uid=meta["uid"],
        namespace=meta["namespace"],
        name=meta["name"],
        version=meta["resourceVersion"],
        job=key if kind is Kind.JOB else job_of(body),
    )
