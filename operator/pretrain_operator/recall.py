"""What this operator knows without asking, because it wrote it itself.

A job's status is the operator's memory, so a round must not begin with an old one. But nobody else
writes it: what the API server answered to this operator's own last write, or what the watch has
brought since, holds all of it, for as long as no other operator could have led in between. So only
the first round of a term reads the job, and rounds in which nothing is new ask for nothing.

A new job, as the watch brings it, need not be read at all. While it has no status nobody has done
anything for it, and the first thing that is done is to write one, on the condition that this is
still its version.

What others write (the spec) is as old as the watch is late, as if it had been read just before. A
write that relies on it meets the version as its precondition; after one that failed, for whatever
reason, the job is read again.

Pods are known by their watch, which may come after the next round has begun: what was written to
one is in the cache at once, so that it is not written again.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pretrain_operator.audit import reached
from pretrain_operator.cluster import Body, Cluster, Kind
from pretrain_operator.podwatch import PodCache
from pretrain_operator.reconcile import Key


@dataclass(frozen=True, slots=True)
class _Known:
    body: Body
    term: int


@dataclass(slots=True)
class _Asked:
    """What came about a job while the answer to a request was under way."""

    newest: Body | None = None  # the last version that the watch brought
    forgotten: bool = False


class RecallingCluster:
    """:class:`Cluster` that knows jobs it has read or written in the present term.

    ``term`` differs after any time in which another operator may have led. What is written to pods
    goes into ``pods`` too.
    """

    def __init__(self, cluster: Cluster, pods: PodCache, term: Callable[[], int]) -> None:
        self._cluster = cluster
        self._pods = pods
        self._term = term
        self._jobs: dict[Key, _Known] = {}
        self._asked: dict[Key, _Asked] = {}  # by jobs with a request under way

    def saw(self, body: Body) -> None:
        """The watch brought this version of a job."""
        key = (body["metadata"]["namespace"], body["metadata"]["name"])
        if asked := self._asked.get(key):
            asked.newest = body
        known = self._jobs.get(key)
        if known is None:
            if not body.get("status"):
                self._jobs[key] = _Known(_lean(body), self._term())
            return  # with a status: it says nothing of what was written since
        if reached(_version(body), _version(known.body)):
            self._jobs[key] = _Known(_lean(body), known.term)

    def forget(self, key: Key) -> None:
        """Read this job when it is asked for next."""
        self._jobs.pop(key, None)
        if asked := self._asked.get(key):
            asked.forgotten = True

    async def get(self, kind: Kind, namespace: str, name: str) -> Body:
        """See Cluster."""
        if kind is not Kind.JOB:
            return await self._cluster.get(kind, namespace, name)
        key, term = (namespace, name), self._term()
        known = self._jobs.get(key)
        if known is not None and known.term == term:
            return known.body
        self.forget(key)
        return await self._answer(key, term, self._cluster.get(kind, namespace, name))

    async def create(self, kind: Kind, namespace: str, body: Body) -> Body:
        """See Cluster."""
        written = await self._cluster.create(kind, namespace, body)
        if kind is Kind.POD:
            self._pods.put({**body, "metadata": written["metadata"]})
        return written

    async def patch(self, kind: Kind, namespace: str, name: str, patch: Body) -> Body:
        """See Cluster."""
        written = await self._cluster.patch(kind, namespace, name, patch)
        if kind is Kind.POD:
            self._pods.amend(written["metadata"])
        return written

    async def patch_status(self, kind: Kind, namespace: str, name: str, patch: Body) -> Body:
        """See Cluster."""
        key, term = (namespace, name), self._term()
        # Forgotten first: a write that is cut off may have been done or not.
        before = self._jobs.pop(key, None)
        request = self._cluster.patch_status(kind, namespace, name, patch)
        if before is None or before.term != term:
            return await request
        return await self._answer(key, term, request)

    async def _answer(self, key: Key, term: int, request: Awaitable[Body]) -> Body:
        """Remember what a request brings, or what the watch has brought meanwhile if it is later.

        Somebody may change the spec before the answer to our write is here.
        """
        asked = self._asked[key] = _Asked()
        try:
            body = await request
        finally:
            del self._asked[key]
        if asked.newest is not None and reached(_version(asked.newest), _version(body)):
            body = asked.newest
        if not asked.forgotten:
            self._jobs[key] = _Known(_lean(body), term)
        return body

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        """See Cluster."""
        if kind is Kind.JOB:
            self.forget((namespace, name))
        await self._cluster.delete(kind, namespace, name, uid, grace_seconds)


def _version(body: Body) -> str:
    return body["metadata"]["resourceVersion"]


def _lean(body: Body) -> Body:
    """Without what nobody reads."""
    meta: dict[str, Any] = body["metadata"]
    return {**body, "metadata": {key: meta[key] for key in meta if key != "managedFields"}}
