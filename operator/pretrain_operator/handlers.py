"""What kopf is asked for: the watch of PretrainJobs, and a nudge when one changes.

Only level-based parts of kopf are used. A handler never decides and never writes: it marks the job
dirty, and the next round looks how things are. So there is nothing kopf would have to remember on
the object: no finalizer (deleting a job works while the operator is away), no annotation.

Worker pods, of which there are many more, have a watch of their own (:mod:`podwatch`).
"""

from collections.abc import Awaitable, Callable
from typing import Any

import kopf

from pretrain_api import names
from pretrain_operator.audit import item_of
from pretrain_operator.cluster import Body, Kind
from pretrain_operator.podwatch import Nudge

Registry = kopf.OperatorRegistry


def build_registry(
    nudge: Nudge, saw: Callable[[Body], None], end: Callable[[], Awaitable[None]]
) -> kopf.OperatorRegistry:
    """The handlers of one operator, apart from those of any other in the process.

    ``saw`` gets every version of a job that the watch brings. ``end`` is called when the watches
    have ended, before kopf waits for what else may run.
    """
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry, id="configure")
    async def _(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)

    @kopf.on.cleanup(registry=registry, id="end")
    async def _(**_: Any) -> None:
        await end()

    @kopf.on.login(registry=registry, id="login")
    def _(**kwargs: Any) -> kopf.ConnectionInfo | None:
        inside = kopf.login_with_service_account(**kwargs)
        return inside or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, id="job_changed", registry=registry)
    async def _(event: kopf.RawEvent, **_: Any) -> None:
        body: Body = dict(event["object"])
        item, gone = item_of(Kind.JOB, body), event["type"] == "DELETED"
        nudge.saw(Kind.JOB, item, gone=gone)
        key = (item.namespace, item.name)
        if gone:
            nudge.deleted(key)
        else:
            saw(body)
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
    settings.watching.connect_timeout = 5.0
    settings.networking.request_timeout = 30.0
    settings.networking.connect_timeout = 5.0
    # Needs no right to watch CRDs and namespaces.
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.persistence.diffbase_storage = NoDifferences()
    settings.persistence.progress_storage = NoProgress()
    settings.persistence.finalizer = f"{names.GROUP}/operator"
    # Of a job that nothing happens to, kopf need not keep a queue.
    settings.queueing.idle_timeout = 1.0


async def run(registry: kopf.OperatorRegistry, namespaces: tuple[str, ...]) -> None:
    """Watch until a signal comes."""
    if namespaces:
        await kopf.operator(registry=registry, namespaces=namespaces, standalone=True)
    else:
        await kopf.operator(registry=registry, clusterwide=True, standalone=True)
