"""What kopf is asked for: watches, a cache of worker pods, and a nudge when something happens.

Only level-based parts of kopf are used. A handler never decides and never writes: it marks the job
dirty, and the next round reads how things are. So there is nothing kopf would have to remember on
the object: no finalizer (deleting a job works while the operator is away), no annotation.

Of a thousand jobs there are many thousand pods, and several events of each: what is kept of a pod
is what is read of it, and kopf is kept from copying objects to find out what changed in them.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

import kopf

from pretrain_api import names
from pretrain_operator.audit import Item, item_of, reached
from pretrain_operator.cluster import Kind
from pretrain_operator.reconcile import Key, job_of

log = logging.getLogger(__name__)

SELECTOR = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
POD_SPEC = ("nodeName", "terminationGracePeriodSeconds")
Registry = kopf.OperatorRegistry
Index = kopf.Index[Key, Mapping[str, Any]]


class PodCache:
    """Worker pods by job, fed by kopf's watch; complete before the first handler runs.

    What the watch failed to bring can be mended from outside.
    """

    def __init__(self) -> None:
        self._index: Index | None = None
        self._amended: dict[str, Mapping[str, Any]] = {}
        self._gone: set[str] = set()

    def attach(self, index: Index) -> None:
        """Use kopf's index from now on."""
        self._index = index

    @property
    def attached(self) -> bool:
        """Whether kopf has started and feeds it."""
        return self._index is not None

    def __call__(self, key: Key) -> Iterable[Mapping[str, Any]]:
        """The pods of one job; none before the watch has begun."""
        brought = self._index[key] if self._index is not None and key in self._index else ()
        found = {body["metadata"]["uid"]: body for body in brought}
        for uid, body in self._amended.items():
            if job_of(body) == key:
                found[uid] = newer(found.get(uid), body)
        return tuple(body for uid, body in found.items() if uid not in self._gone)

    def amend(self, body: Mapping[str, Any]) -> None:
        """Use this pod until the watch brings it or a newer one."""
        self._amended[body["metadata"]["uid"]] = body

    def drop(self, uid: str) -> None:
        """This pod is gone, whatever the watch brought."""
        self._amended.pop(uid, None)
        self._gone.add(uid)

    def saw(self, item: Item, *, gone: bool) -> None:
        """The watch brought this version of a pod, or its end."""
        amended = self._amended.get(item.uid)
        if amended and (gone or reached(item.version, amended["metadata"]["resourceVersion"])):
            del self._amended[item.uid]
        if gone:
            self._gone.discard(item.uid)


def lean(body: Mapping[str, Any]) -> dict[str, Any]:
    """What is read of a pod; the whole takes ten times the memory."""
    meta = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    spec = {key: body["spec"][key] for key in POD_SPEC if key in body["spec"]}
    return {"metadata": meta, "spec": spec, "status": dict(body.get("status") or {})}


def newer(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> Mapping[str, Any]:
    """The later of two versions of an object."""
    if one is None:
        return other
    versions = (each["metadata"]["resourceVersion"] for each in (one, other))
    return one if reached(*versions) else other


class Nudge(Protocol):
    """How handlers reach the queue."""

    def changed(self, key: Key) -> None:
        """Something about this job changed."""

    def deleted(self, key: Key) -> None:
        """The job is gone."""

    def saw(self, kind: Kind, item: Item, *, gone: bool) -> None:
        """The watch brought this version of an object, or its end."""


def build_registry(
    cache: PodCache, nudge: Nudge, end: Callable[[], Awaitable[None]]
) -> kopf.OperatorRegistry:
    """The handlers of one operator, apart from those of any other in the process.

    ``end`` is called when the watches have ended, before kopf waits for what else may run.
    """
    registry = kopf.OperatorRegistry()
    ours = {names.LABEL_JOB_UID: kopf.PRESENT}

    @kopf.on.startup(registry=registry, id="configure")
    async def _(settings: kopf.OperatorSettings, worker_pods: Index, **_: Any) -> None:
        configure(settings)
        cache.attach(worker_pods)

    @kopf.on.cleanup(registry=registry, id="end")
    async def _(**_: Any) -> None:
        await end()

    @kopf.on.login(registry=registry, id="login")
    def _(**kwargs: Any) -> kopf.ConnectionInfo | None:
        inside = kopf.login_with_service_account(**kwargs)
        return inside or kopf.login_with_kubeconfig(**kwargs)

    @kopf.index("v1", "pods", id="worker_pods", labels=ours, registry=registry)
    async def _(body: kopf.Body, **_: Any) -> dict[Key, Mapping[str, Any]] | None:
        key = job_of(body)
        return {key: lean(body)} if key else None

    @kopf.on.event("v1", "pods", id="pod_changed", registry=registry)
    async def _(event: kopf.RawEvent, body: kopf.Body, **_: Any) -> None:
        item, gone = item_of(Kind.POD, body), event["type"] == "DELETED"
        cache.saw(item, gone=gone)
        nudge.saw(Kind.POD, item, gone=gone)
        if item.job:
            nudge.changed(item.job)

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, id="job_changed", registry=registry)
    async def _(event: kopf.RawEvent, body: kopf.Body, **_: Any) -> None:
        item, gone = item_of(Kind.JOB, body), event["type"] == "DELETED"
        nudge.saw(Kind.JOB, item, gone=gone)
        key = (item.namespace, item.name)
        if gone:
            nudge.deleted(key)
        else:
            nudge.changed(key)

    return registry


class NoDifferences(kopf.DiffBaseStorage):
    """No handler asks what changed, so nothing is copied and compared for it."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> kopf.BodyEssence:
        """Nothing that could differ."""
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        """There was nothing before."""
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Nothing is remembered."""


class NoProgress(kopf.ProgressStorage):
    """No handler is ever repeated by kopf, so nothing is written down about it."""

    def fetch(self, *, key: Any, body: kopf.Body) -> None:
        """Nothing was."""

    def store(self, *, key: Any, record: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        """Nothing is."""

    def purge(self, *, key: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        """There is nothing."""

    def touch(self, *, body: kopf.Body, patch: kopf.Patch, value: str | None) -> None:
        """Nothing is."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        """As it is: it has nothing of ours."""
        return essence


def configure(settings: kopf.OperatorSettings) -> None:
    """Settings of kopf itself."""
    # Without this every pod of the cluster would be sent here, only to be thrown away.
    settings.watching.label_selectors["v1", "pods"] = SELECTOR
    settings.watching.connect_timeout = 5.0
    settings.networking.request_timeout = 30.0
    settings.networking.connect_timeout = 5.0
    # Needs no right to watch CRDs and namespaces.
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.persistence.diffbase_storage = NoDifferences()
    settings.persistence.progress_storage = NoProgress()
    settings.persistence.finalizer = f"{names.GROUP}/operator"
    # A burst of events is one round anyway, so nothing is gained by waiting for its end.
    settings.queueing.idle_timeout = 1.0


async def run(registry: kopf.OperatorRegistry, namespaces: tuple[str, ...]) -> None:
    """Watch until a signal comes."""
    if namespaces:
        await kopf.operator(registry=registry, namespaces=namespaces, standalone=True)
    else:
        await kopf.operator(registry=registry, clusterwide=True, standalone=True)
