"""``python -m pretrain_operator``: the whole operator in one process.

Settings come from the environment (:mod:`settings`). Exits 0 on SIGTERM or SIGINT, 78 if a setting
is wrong, 1 if the cluster can't be reached; in every case the cluster may start it again.

Several may run: all watch, the one that holds the Lease makes the rounds.
"""

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Coroutine, Iterable
from functools import partial
from typing import Any

from pretrain_api.wire import ExitCode
from pretrain_operator import handlers
from pretrain_operator.audit import Audit
from pretrain_operator.cluster import (
    Body,
    Cluster,
    ClusterError,
    ConflictError,
    HttpCluster,
    Kind,
)
from pretrain_operator.lease import GuardedCluster, Keeper, NotLeadingError
from pretrain_operator.logs import configure_logging
from pretrain_operator.metrics import Metrics
from pretrain_operator.pages import Pages, serve
from pretrain_operator.queue import WorkQueue
from pretrain_operator.reconcile import Key, Reconciler
from pretrain_operator.settings import Settings, SettingsError, load
from pretrain_operator.workers import HttpWorkers

log = logging.getLogger(__name__)

GATHER_SECONDS = 0.05
STUCK_SECONDS = 300.0
CRD_RETRY_SECONDS = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class QueueNudge:
    """Handlers' news become keys in the queue, and entries in the audit."""

    def __init__(self, queue: WorkQueue[Key], metrics: Metrics, audit: Audit) -> None:
        self._queue = queue
        self._metrics = metrics
        self.saw = audit.saw

    def changed(self, key: Key) -> None:
        """A round for it, soon: pods come in groups, and a round is for all of them."""
        self._queue.add_after(key, GATHER_SECONDS)

    def deleted(self, key: Key) -> None:
        """Nothing about it is kept."""
        self._queue.forget(key)
        self._metrics.forget(*key)


async def operate(settings: Settings) -> None:
    """Run until a signal comes. Raises ClusterError if there is no way to reach a cluster."""
    metrics = Metrics()
    cache = handlers.PodCache()
    cluster = await HttpCluster.connect()
    keeper = keeper_of(cluster, settings, metrics)
    try:
        async with HttpWorkers() as workers:
            guarded = GuardedCluster(cluster, keeper.check) if keeper else cluster
            reconciler = Reconciler(guarded, workers, cache, settings, metrics)
            queue = WorkQueue(
                reconciler.reconcile,
                workers=settings.reconcilers,
                metrics=metrics,
                quiet=(ConflictError, NotLeadingError),
                gate=keeper.wait if keeper else None,
            )
            audit = Audit(
                partial(list_watched, cluster),
                cluster.get,
                cache,
                queue.add,
                metrics,
                namespaces=settings.namespaces,
            )
            pages = Pages(metrics, lambda: cache.attached, [partial(stuck, queue), audit.trouble])
            sites = await serve(settings, pages)
            try:
                if await before_signal(wait_for_crd(cluster)):
                    chores = Chores([queue.run(), audit.run()], keeper)
                    nudge = QueueNudge(queue, metrics, audit)
                    registry = handlers.build_registry(cache, nudge, chores.end)
                    await watch(registry, settings.namespaces, chores)
            finally:
                await asyncio.gather(*(site.cleanup() for site in sites))
    finally:
        await cluster.close()


async def list_watched(cluster: HttpCluster, kind: Kind, namespace: str) -> list[Body]:
    """The metadata of what the watch of that kind should bring."""
    selector = handlers.SELECTOR if kind is Kind.POD else ""
    return await cluster.list_metadata(kind, namespace, selector)


def stuck(queue: WorkQueue[Key], limit: float = STUCK_SECONDS) -> str | None:
    """The sentence that says a round hangs; None if none does."""
    seconds = queue.longest_round
    return f"a round has taken {seconds:.0f} s" if seconds > limit else None


def keeper_of(cluster: Cluster, settings: Settings, metrics: Metrics) -> Keeper | None:
    """Who keeps the Lease; nobody if the settings name no namespace for it."""
    if not settings.lease_namespace:
        log.info("no Lease is used: no other operator may serve the same jobs")
        metrics.lead(True)
        return None
    identity = settings.lease_identity or f"{socket.gethostname()}_{secrets.token_hex(4)}"
    return Keeper(cluster, settings.lease_namespace, settings.lease_name, identity, metrics)


class Chores:
    """What goes on beside the watches."""

    def __init__(
        self, work: Iterable[Coroutine[Any, Any, None]], keeper: Keeper | None = None
    ) -> None:
        self._keeper = keeper
        keeping = [keeper.run()] if keeper else []
        self.tasks = [asyncio.create_task(each) for each in (*work, *keeping)]

    async def end(self) -> None:
        """End the rounds, then let another operator lead. May be called again."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self._keeper is not None:
            keeper, self._keeper = self._keeper, None
            await keeper.release()


async def watch(registry: handlers.Registry, namespaces: tuple[str, ...], chores: Chores) -> None:
    """Watch until a signal comes. Raises what ended the watches or a chore before."""
    # In the end kopf waits for every task that is younger than itself.
    await asyncio.sleep(0)
    watching = asyncio.create_task(handlers.run(registry, namespaces), name="watches")
    try:
        await asyncio.wait((watching, *chores.tasks), return_when=asyncio.FIRST_COMPLETED)
        for task in chores.tasks:
            if task.done() and not task.cancelled():
                task.result()
        await watching  # it is over, or has ended the chores and is about to
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await chores.end()


async def before_signal(work: Coroutine[Any, Any, None]) -> bool:
    """Do ``work`` unless SIGTERM or SIGINT comes first. Returns whether it was done.

    Until kopf runs nobody else listens, and the first process of a container ignores SIGTERM.
    """
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    for number in SIGNALS:
        loop.add_signal_handler(number, task.cancel)
    try:
        await asyncio.wait([task])
    finally:
        task.cancel()
        for number in SIGNALS:
            loop.remove_signal_handler(number)
    if task.cancelled():
        return False
    task.result()
    return True


async def wait_for_crd(cluster: HttpCluster) -> None:
    """Return once the API server serves PretrainJobs: kopf looks for them only at its start."""
    said = False
    while not await cluster.serves_jobs():
        if not said:
            log.info("waiting for the CustomResourceDefinition of PretrainJob")
        said = True
        await asyncio.sleep(CRD_RETRY_SECONDS)


def main() -> int:
    """Entry point; returns the exit code."""
    try:
        settings = load(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return ExitCode.CONFIG
    configure_logging(settings.log_format, settings.log_level)
    try:
        asyncio.run(operate(settings))
    except ClusterError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
