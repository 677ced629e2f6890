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
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any

from pretrain_api.wire import ExitCode
from pretrain_operator import handlers
from pretrain_operator.audit import Audit, Item, item_of
from pretrain_operator.cluster import (
    METADATA_OF_ALL,
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
from pretrain_operator.podwatch import SELECTOR, PodCache, PodWatch
from pretrain_operator.queue import WorkQueue
from pretrain_operator.recall import RecallingCluster
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

    def __init__(
        self, queue: WorkQueue[Key], metrics: Metrics, audit: Audit, jobs: RecallingCluster
    ) -> None:
        self._queue = queue
        self._metrics = metrics
        self._jobs = jobs
        self.saw = audit.saw

    def changed(self, key: Key) -> None:
        """A round for it, soon: pods come in groups, and a round is for all of them."""
        self._queue.add_after(key, GATHER_SECONDS)

    def deleted(self, key: Key) -> None:
        """Nothing about it is kept; a last round, which finds it gone, forgets what others know."""
        self._jobs.forget(key)
        self._queue.forget(key)
        self._metrics.forget(*key)
        self._queue.add(key)


async def operate(settings: Settings) -> None:
    """Run until a signal comes. Raises ClusterError if there is no way to reach a cluster."""

    def again(job: Key) -> None:
        queue.add(job)

    metrics = Metrics()
    pods = PodCache()
    cluster = await HttpCluster.connect()
    leases = await HttpCluster.connect()  # its own, so that renewals wait behind nothing
    keeper = keeper_of(leases, settings, metrics, again)
    try:
        async with HttpWorkers() as workers:
            guarded = GuardedCluster(cluster, keeper.check) if keeper else cluster
            jobs = RecallingCluster(guarded, pods, keeper.term if keeper else lambda: 0)
            reconciler = Reconciler(jobs, workers, pods, settings, metrics)
            queue = WorkQueue(
                reconciler.reconcile,
                workers=settings.reconcilers,
                metrics=metrics,
                quiet=(ConflictError, NotLeadingError),
                gate=partial(may_begin, pods, keeper),
            )
            audit = Audit(
                partial(list_watched, cluster),
                cluster.get,
                pods,
                partial(look_again, jobs, queue),
                metrics,
                namespaces=settings.namespaces,
            )
            complete = pods.complete.is_set
            pages = Pages(metrics, complete, [partial(stuck, queue), audit.trouble])
            sites = await serve(settings, pages)
            try:
                if await before_signal(wait_for_crd(cluster)):
                    nudge = QueueNudge(queue, metrics, audit, jobs)
                    watching = PodWatch(cluster, pods, nudge, settings.namespaces)
                    chores = Chores([queue.run(), audit.run(), watching.run()], keeper)
                    registry = handlers.build_registry(nudge, jobs.saw, chores.end)
                    await watch(registry, settings.namespaces, chores)
            finally:
                await asyncio.gather(*(site.cleanup() for site in sites))
    finally:
        await leases.close()
        await cluster.close()


def look_again(jobs: RecallingCluster, queue: WorkQueue[Key], key: Key) -> None:
    """Have a round for a job of which a watch has not told all."""
    jobs.forget(key)
    queue.add(key)


async def may_begin(pods: PodCache, keeper: Keeper | None) -> None:
    """Return when a round may be made: all pods are known, and no other operator leads."""
    await pods.complete.wait()
    if keeper is not None:
        await keeper.wait()


async def list_watched(cluster: HttpCluster, kind: Kind, namespace: str) -> list[Item]:
    """What the watch of that kind should bring, from metadata page by page: never all at once."""
    selector = SELECTOR if kind is Kind.POD else ""
    found: list[Item] = []
    async for page in cluster.pages(kind, namespace, selector, METADATA_OF_ALL):
        # Where there is nothing to list, the API server may say null.
        found += [item_of(kind, body) for body in page.get("items") or ()]
    return found


def stuck(queue: WorkQueue[Key], limit: float = STUCK_SECONDS) -> str | None:
    """The sentence that says a round hangs; None if none does."""
    seconds = queue.longest_round
    return f"a round has taken {seconds:.0f} s" if seconds > limit else None


def keeper_of(
    cluster: Cluster, settings: Settings, metrics: Metrics, again: Callable[[Key], None]
) -> Keeper | None:
    """Who keeps the Lease; nobody if the settings name no namespace for it."""
    if not settings.lease_namespace:
        log.info("no Lease is used: no other operator may serve the same jobs")
        metrics.lead(True)
        return None
    identity = settings.lease_identity or f"{socket.gethostname()}_{secrets.token_hex(4)}"
    return Keeper(cluster, settings.lease_namespace, settings.lease_name, identity, metrics, again)


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
