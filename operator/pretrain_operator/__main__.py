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
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from pretrain_api.wire import ExitCode
from pretrain_operator import handlers
from pretrain_operator.cluster import Cluster, ClusterError, ConflictError, HttpCluster
from pretrain_operator.lease import GuardedCluster, Keeper, NotLeadingError
from pretrain_operator.logs import configure_logging
from pretrain_operator.metrics import Metrics
from pretrain_operator.queue import WorkQueue
from pretrain_operator.reconcile import Key, Reconciler
from pretrain_operator.settings import Settings, SettingsError, load
from pretrain_operator.workers import HttpWorkers

log = logging.getLogger(__name__)

STUCK_SECONDS = 300.0
CRD_RETRY_SECONDS = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class QueueNudge:
    """Handlers' news become keys in the queue."""

    def __init__(self, queue: WorkQueue[Key], metrics: Metrics) -> None:
        self._queue = queue
        self._metrics = metrics

    def changed(self, key: Key) -> None:
        """A round for it, soon."""
        self._queue.add(key)

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
            sites = await serve(settings, metrics, queue, ready=lambda: cache.attached)
            try:
                if await before_signal(wait_for_crd(cluster)):
                    chores = Chores(queue, keeper)
                    nudge = QueueNudge(queue, metrics)
                    registry = handlers.build_registry(cache, nudge, chores.end)
                    await watch(registry, settings.namespaces, chores)
            finally:
                await asyncio.gather(*(site.cleanup() for site in sites))
    finally:
        await cluster.close()


def keeper_of(cluster: Cluster, settings: Settings, metrics: Metrics) -> Keeper | None:
    """Who keeps the Lease; nobody if the settings name no namespace for it."""
    if not settings.lease_namespace:
        log.info("no Lease is used: no other operator may serve the same jobs")
        metrics.leader.set(1)
        return None
    identity = settings.lease_identity or f"{socket.gethostname()}_{secrets.token_hex(4)}"
    return Keeper(cluster, settings.lease_namespace, settings.lease_name, identity, metrics)


class Chores:
    """What goes on beside the watches."""

    def __init__(self, queue: WorkQueue[Key], keeper: Keeper | None) -> None:
        self._keeper = keeper
        self.tasks = [asyncio.create_task(queue.run(), name="work queue")]
        if keeper:
            self.tasks.append(asyncio.create_task(keeper.run(), name="lease"))

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


async def serve(
    settings: Settings,
    metrics: Metrics,
    queue: WorkQueue[Key],
    *,
    ready: Callable[[], bool],
    stuck_seconds: float = STUCK_SECONDS,
) -> list[web.AppRunner]:
    """Start /metrics, /healthz and /readyz; the returned runners are to be cleaned up.

    Healthy is who makes rounds or could; ready is who also knows the pods.
    """

    async def show_metrics(_: web.Request) -> web.Response:
        text = generate_latest(metrics.registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def show_health(_: web.Request) -> web.Response:
        stuck = queue.longest_round > stuck_seconds
        text = f"a round has taken {queue.longest_round:.0f} s\n" if stuck else "ok\n"
        return web.Response(text=text, status=503 if stuck else 200)

    async def show_ready(request: web.Request) -> web.Response:
        if not ready():
            return web.Response(text="the watches have not begun\n", status=503)
        return await show_health(request)

    runners: list[web.AppRunner] = []
    sites = (
        (settings.metrics_port, {"/metrics": show_metrics}),
        (settings.health_port, {"/healthz": show_health, "/readyz": show_ready}),
    )
    for port, pages in sites:
        if port:
            app = web.Application()
            app.add_routes([web.get(path, page) for path, page in pages.items()])
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, port=port).start()
            runners.append(runner)
    return runners


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
