"""Worker pods, as a watch of our own has them.

Of a thousand jobs there are many thousand pods with several events each. A framework that handles
them one by one, each with its own queue, takes more time and memory for it than all rounds: this is
one list, one stream per namespace, and of each pod what decisions need.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from pretrain_api import names
from pretrain_operator.audit import Item, item_of, reached
from pretrain_operator.cluster import Body, ClusterError, GoneError, Kind
from pretrain_operator.observe import Pod, parse_pod, with_metadata
from pretrain_operator.reconcile import Key, job_of

log = logging.getLogger(__name__)

SELECTOR = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 30.0
REMEMBER_SECONDS = 60.0  # that a pod is gone: longer than an answer about it can be under way


class Nudge(Protocol):
    """How watches reach the queue."""

    def changed(self, key: Key) -> None:
        """Something about this job changed."""

    def deleted(self, key: Key) -> None:
        """The job is gone."""

    def saw(self, kind: Kind, item: Item, *, gone: bool) -> None:
        """The watch brought this version of an object, or its end."""


class PodSource(Protocol):
    """What a watch of pods asks of a cluster; see :class:`.cluster.HttpCluster`."""

    def pages(self, kind: Kind, namespace: str, selector: str) -> AsyncIterator[Body]:
        """All objects of one moment."""
        ...

    def watch(
        self, kind: Kind, namespace: str, selector: str, version: str
    ) -> AsyncIterator[tuple[str, Body]]:
        """What changes after it."""
        ...


class PodCache:
    """Worker pods by job: from the watch, and from whoever has just written or read one."""

    def __init__(self) -> None:
        self._pods: dict[Key, dict[str, Pod]] = {}  # by UID
        self._jobs: dict[str, Key] = {}  # by UID of a pod
        self._gone: dict[str, float] = {}  # by UID: when, the oldest first
        self.complete = asyncio.Event()  # whether all there were at the beginning are in here

    def __call__(self, key: Key) -> tuple[Pod, ...]:
        """The pods of one job."""
        return tuple(self._pods.get(key, {}).values())

    def put(self, body: Body) -> bool:
        """This is how a pod is, unless something newer is known.

        Returns whether any of what decisions need is new.
        """
        key, pod = job_of(body), parse_pod(body)
        if key is None or pod is None:
            return False  # not of our making, whatever its labels say
        if pod.uid in self._gone:
            return False  # the answer to a write may come after the end of what was written
        before, known = self._jobs.get(pod.uid), self._known(pod.uid)
        if known is not None and not reached(pod.version, known.version):
            return False
        self._remove(pod.uid)  # somebody may have changed the label that says whose it is
        self._pods.setdefault(key, {})[pod.uid] = pod
        self._jobs[pod.uid] = key
        return before != key or known is None or replace(known, version=pod.version) != pod

    def items(self, namespace: str) -> dict[str, Item]:
        """Pods of a namespace, of all if it is empty, by UID."""
        return {
            uid: Item(uid, key[0], pod.name, pod.version, key)
            for uid, key in self._jobs.items()
            if namespace in ("", key[0]) and (pod := self._known(uid))
        }

    def amend(self, meta: Mapping[str, Any]) -> None:
        """This is the metadata of a pod, after a write of ours, unless something newer is known.

        What somebody else has done to it is left to the watch, so that it causes a round.
        """
        known = self._known(meta["uid"])
        if known is None or not reached(meta["resourceVersion"], known.version):
            return
        now = with_metadata(known, meta)
        ours = replace(known, version=now.version, assignment=now.assignment, reminded=now.reminded)
        if now == ours:
            self._pods[self._jobs[known.uid]][known.uid] = now

    def drop(self, uid: str) -> None:
        """This pod is gone."""
        now = time.monotonic()
        self._gone[uid] = now
        while now - next(iter(self._gone.values())) > REMEMBER_SECONDS:
            del self._gone[next(iter(self._gone))]
        self._remove(uid)

    def _known(self, uid: str) -> Pod | None:
        key = self._jobs.get(uid)
        return self._pods[key][uid] if key else None

    def _remove(self, uid: str) -> None:
        key = self._jobs.pop(uid, None)
        if key is None:
            return
        self._pods[key].pop(uid)
        if not self._pods[key]:
            del self._pods[key]


class PodWatch:
    """Keeps the cache as the cluster is, and tells whose pods have changed."""

    def __init__(
        self,
        source: PodSource,
        cache: PodCache,
        nudge: Nudge,
        namespaces: tuple[str, ...] = (),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._source = source
        self._cache = cache
        self._nudge = nudge
        self._namespaces = namespaces or ("",)
        self._sleep = sleep
        self._listed: set[str] = set()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as group:
            for namespace in self._namespaces:
                group.create_task(self._follow(namespace), name=f"pods of {namespace or 'all'}")

    async def _follow(self, namespace: str) -> None:
        version: str | None = None
        pause = FIRST_PAUSE_SECONDS
        while True:
            started, brought, asked = math.inf, False, 0.0
            try:
                version = version or await self._list(namespace)
                started = time.monotonic()
                events = self._source.watch(Kind.POD, namespace, SELECTOR, version)
                async for word, body in events:
                    version, brought = body["metadata"]["resourceVersion"], True
                    if word != "BOOKMARK":
                        self._note(body, gone=word == "DELETED")
            except GoneError as error:
                log.info("pods are listed again: %s", error)
                version = None
            except ClusterError as error:
                asked = error.retry_after
                log.warning("%s; again in %.1f s", error, max(pause, asked))
            # The API server ends a stream whose reader doesn't keep up. Who is behind must go on at
            # once, or would be further behind every time.
            if brought or time.monotonic() - started > pause:
                pause = FIRST_PAUSE_SECONDS
            # Also after an end without an error: a proxy may end every stream at once.
            await self._sleep(max(pause, asked))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _list(self, namespace: str) -> str:
        """Take over all there is. Returns the version of the list."""
        before = self._cache.items(namespace)  # what is made meanwhile may be later than the list
        found: set[str] = set()
        version = ""
        async for page in self._source.pages(Kind.POD, namespace, SELECTOR):
            version = page["metadata"]["resourceVersion"]
            for body in page.get("items") or ():
                found.add(body["metadata"]["uid"])
                self._note(body, gone=False)
        for uid in before.keys() - found:  # their end came while nobody watched
            self._ended(before[uid])
        self._listed.add(namespace)
        if self._listed.issuperset(self._namespaces):
            self._cache.complete.set()
        return version

    def _note(self, body: Body, *, gone: bool) -> None:
        item = item_of(Kind.POD, body)
        if gone:
            self._ended(item)
            return
        news = False
        try:
            news = self._cache.put(body)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            # Whatever somebody has written into one object, all others are watched on.
            log.warning("pod %s/%s can't be read: %r", item.namespace, item.name, error)
        self._nudge.saw(Kind.POD, item, gone=False)
        # What this operator wrote itself comes back as well, and is known already.
        if news and item.job:
            self._nudge.changed(item.job)

    def _ended(self, item: Item) -> None:
        self._cache.drop(item.uid)
        self._nudge.saw(Kind.POD, item, gone=True)
        if item.job:
            self._nudge.changed(item.job)
