"""The whole process with kopf in it: watches nudge, rounds write, nothing is left on the job.

A small HTTP server in front of the in-memory cluster plays the API server's discovery, lists and
watches, so that what is tested is the very process that runs in a cluster.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from pretrain_api import names
from pretrain_operator import handlers, lease, testing
from pretrain_operator.__main__ import (
    Chores,
    QueueNudge,
    list_watched,
    operate,
    stuck,
    wait_for_crd,
    watch,
)
from pretrain_operator.audit import Audit
from pretrain_operator.cluster import Body, ClusterError, ConflictError, HttpCluster, Kind
from pretrain_operator.metrics import Metrics
from pretrain_operator.pages import Pages, serve
from pretrain_operator.podwatch import PodCache, PodWatch
from pretrain_operator.queue import WorkQueue
from pretrain_operator.recall import RecallingCluster
from pretrain_operator.reconcile import Key, Reconciler
from pretrain_operator.settings import Settings
from pretrain_operator.testing import JOB, Bench, MemoryCluster, SilentWorkers

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SPACED = "/namespaces/{namespace}"
until = partial(testing.until, seconds=30)


class FakeServer:
    """Discovery, lists, watches and writes over a MemoryCluster."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self.cluster = cluster
        self.app = web.Application()
        groups = [group(names.GROUP, names.VERSION), group("apiextensions.k8s.io", "v1")]
        crd = ("customresourcedefinitions", "CustomResourceDefinition")
        pages = {
            "/version": {"gitVersion": "v1"},
            "/api": {"versions": ["v1"]},
            "/apis": {"groups": groups},
            "/api/v1": resources(("pods", "Pod"), ("namespaces", "Namespace")),
            f"/apis/{names.API_VERSION}": resources((names.PLURAL, names.KIND)),
            "/apis/apiextensions.k8s.io/v1": resources(crd),
        }
        for path, body in pages.items():
            self.app.router.add_get(path, answer(body))
        for kind in Kind:
            prefix, plural = kind.value
            one = f"{prefix}{SPACED}/{plural}/{{name}}"
            self.app.router.add_get(f"{prefix}/{plural}", self._list(kind))
            self.app.router.add_post(f"{prefix}{SPACED}/{plural}", self._write(kind))
            for verb in ("GET", "PATCH", "DELETE"):
                self.app.router.add_route(verb, one, self._write(kind))
            self.app.router.add_patch(f"{one}/status", self._write(kind))

    def _list(self, kind: Kind) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            if "watch" not in request.query:
                body = {"metadata": {"resourceVersion": "1"}, "items": self.cluster.all(kind)}
                return web.json_response(body)
            stream = web.StreamResponse()
            await stream.prepare(request)
            known: dict[str, Body] = {}
            while True:  # what a watch sends is what has changed since it looked last
                now = {body["metadata"]["uid"]: body for body in self.cluster.all(kind)}
                events = [("DELETED", known[uid]) for uid in known.keys() - now.keys()]
                for uid, body in now.items():
                    version = body["metadata"]["resourceVersion"]
                    if uid not in known:
                        events.append(("ADDED", body))
                    elif known[uid]["metadata"]["resourceVersion"] != version:
                        events.append(("MODIFIED", body))
                known = json.loads(json.dumps(now))
                for word, body in events:
                    line = json.dumps({"type": word, "object": body}) + "\n"
                    try:
                        await stream.write(line.encode())
                    except ConnectionError:
                        return stream  # the watch was closed
                await asyncio.sleep(0.01)

        return handle

    def _write(self, kind: Kind) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            space, name = request.match_info["namespace"], request.match_info.get("name", "")
            sent = json.loads(await request.text() or "{}")
            try:
                if request.method == "GET":
                    body = await self.cluster.get(kind, space, name)
                elif request.method == "POST":
                    body = await self.cluster.create(kind, space, sent)
                elif request.method == "DELETE":
                    wanted = sent.get("preconditions", {}).get("uid")
                    grace = sent.get("gracePeriodSeconds")
                    await self.cluster.delete(kind, space, name, wanted, grace)
                    body = {}
                elif request.path.endswith("/status"):
                    body = await self.cluster.patch_status(kind, space, name, sent)
                else:
                    body = await self.cluster.patch(kind, space, name, sent)
            except ClusterError as error:
                return web.json_response({"message": str(error)}, status=error.status)
            return web.json_response(body)

        return handle


def answer(body: Body) -> Handler:
    async def handle(_: web.Request) -> web.Response:
        return web.json_response(body)

    return handle


def group(name: str, version: str) -> Body:
    found = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [found], "preferredVersion": found}


def resources(*kinds: tuple[str, str]) -> Body:
    verbs = ["get", "list", "watch", "create", "patch", "delete"]
    found = [
        {"name": plural, "kind": kind, "singularName": kind.lower(), "namespaced": True}
        for plural, kind in kinds
    ]
    return {"resources": [resource | {"verbs": verbs} for resource in found]}


@pytest.fixture
async def kubeconfig(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Path]:
    runner = web.AppRunner(FakeServer(bench.cluster).app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    body = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "t",
        "clusters": [{"name": "t", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "t", "user": {"token": "x"}}],
        "contexts": [{"name": "t", "context": {"cluster": "t", "user": "t"}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(body))
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield path
    await runner.cleanup()


async def nothing(*_: object) -> None:
    pass


async def test_events_become_rounds(bench: Bench, kubeconfig: Path) -> None:
    metrics, pods = Metrics(), PodCache()
    cluster = await HttpCluster.connect(str(kubeconfig))
    jobs = RecallingCluster(cluster, pods, lambda: 0)
    reconciler = Reconciler(jobs, SilentWorkers(), pods, Settings(), metrics)
    queue: WorkQueue[Key] = WorkQueue(
        reconciler.reconcile, workers=2, metrics=metrics, quiet=(ConflictError,)
    )
    await wait_for_crd(cluster)
    rounds = asyncio.create_task(queue.run())
    audit = Audit(partial(list_watched, cluster), cluster.get, pods, queue.add, metrics)
    nudge = QueueNudge(queue, metrics, audit, jobs)
    following = asyncio.create_task(PodWatch(cluster, pods, nudge).run())
    await asyncio.sleep(0)
    registry = handlers.build_registry(nudge, jobs.saw, nothing)
    watching = asyncio.create_task(handlers.run(registry, ()))
    try:
        await bench.submit()
        await until(lambda: len(bench.cluster.pods()) == 2)
        bench.cluster.start("llama-0-1")
        bench.cluster.start("llama-1-1")
        told = names.ANNOTATION_ASSIGNMENT
        await until(
            lambda: all(told in pod["metadata"]["annotations"] for pod in bench.cluster.pods())
        )
        bench.cluster.vanish(Kind.POD, "llama-1-1")
        await until(lambda: bench.member_pods() == ["llama-0-1", "llama-1-2"])
        meta = bench.cluster.all(Kind.JOB)[0]["metadata"]
        assert "finalizers" not in meta
        assert not any("kopf" in key for key in meta.get("annotations", {}))
        await audit.look(Kind.POD)
        await audit.look(Kind.JOB)
        assert audit.trouble() is None
        bench.cluster.vanish(Kind.JOB, JOB)
        shown = metrics.registry.get_sample_value
        labels = {"namespace": "default", "job": JOB}
        await until(lambda: shown("pretrain_job_workers_ready", labels) is None)
        assert shown("pretrain_operator_reconciles_total", {"result": "error"}) is None
    finally:
        tasks = (watching, rounds, following)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await cluster.close()


async def test_health_and_metrics_pages(unused_tcp_port_factory: Callable[[], int]) -> None:
    async def hang(_: Key) -> None:
        await asyncio.Event().wait()

    metrics_port, health_port = unused_tcp_port_factory(), unused_tcp_port_factory()
    queue: WorkQueue[Key] = WorkQueue(hang, workers=1, metrics=Metrics())
    rounds = asyncio.create_task(queue.run())
    settings = Settings(metrics_port=metrics_port, health_port=health_port)
    ready = asyncio.Event()
    trouble = partial(stuck, queue, 0.05)
    runners = await serve(settings, Pages(Metrics(), ready.is_set, [trouble]))
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{metrics_port}/metrics") as response:
            assert "pretrain_operator_queue_depth" in await response.text()
        health = f"http://127.0.0.1:{health_port}/healthz"
        async with session.get(health) as response:
            assert response.status == 200
        readiness = f"http://127.0.0.1:{health_port}/readyz"
        async with session.get(readiness) as response:
            assert response.status == 503
        ready.set()
        async with session.get(readiness) as response:
            assert response.status == 200
        queue.add(("a", "b"))
        await until(lambda: queue.longest_round > 0.05)
        async with session.get(health) as response:
            assert response.status == 503
            assert "a round has taken" in await response.text()
    rounds.cancel()
    await asyncio.gather(rounds, *(runner.cleanup() for runner in runners), return_exceptions=True)


async def always_connect(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads where its configuration lies only once, when it is imported."""
    cluster = await HttpCluster.connect(str(kubeconfig))

    async def connect() -> HttpCluster:
        return cluster

    monkeypatch.setattr(HttpCluster, "connect", connect)


async def test_a_signal_ends_the_wait_for_the_definition(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    asked = asyncio.Event()

    async def not_yet(_: HttpCluster) -> bool:
        asked.set()
        return False

    await always_connect(kubeconfig, monkeypatch)
    monkeypatch.setattr(HttpCluster, "serves_jobs", not_yet)
    settings = Settings(metrics_port=0, health_port=unused_tcp_port)
    process = asyncio.create_task(operate(settings))
    async with asyncio.timeout(10), aiohttp.ClientSession() as session:
        await asked.wait()
        for page, status in (("healthz", 200), ("readyz", 503)):
            async with session.get(f"http://127.0.0.1:{unused_tcp_port}/{page}") as response:
                assert response.status == status
        os.kill(os.getpid(), signal.SIGTERM)
        await process
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_a_standby_watches_leads_when_it_may_and_hands_over_in_the_end(
    bench: Bench, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    await always_connect(kubeconfig, monkeypatch)
    other = lease.Keeper(bench.cluster, "control", "lease", "other", Metrics())
    await other.step()
    settings = Settings(
        metrics_port=0,
        health_port=unused_tcp_port,
        lease_namespace="control",
        lease_name="lease",
        lease_identity="me",
    )
    await bench.submit()
    process = asyncio.create_task(operate(settings))
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{unused_tcp_port}/readyz"

        async def ready() -> bool:
            try:
                async with session.get(url) as response:
                    return response.status == 200
            except aiohttp.ClientError:
                return False

        async with asyncio.timeout(30):
            while not await ready():  # noqa: ASYNC110 - asked over HTTP
                await asyncio.sleep(0.01)
    assert bench.cluster.writes == ["create leases/lease", "create pretrainjobs/llama"]

    def holder() -> str:
        return bench.cluster.objects[Kind.LEASE, "control", "lease"]["spec"]["holderIdentity"]

    await other.release()
    await until(lambda: len(bench.cluster.pods()) == 2)
    assert holder() == "me"
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(process, 30)
    assert holder() == ""


async def test_the_process_ends_with_whatever_it_is_made_of(
    bench: Bench, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = partial(list_watched, bench.cluster)
    audit = Audit(fetch, bench.cluster.get, PodCache(), lambda _: None, Metrics())
    queue: WorkQueue[Key] = WorkQueue(nothing, workers=1, metrics=Metrics())
    jobs = RecallingCluster(bench.cluster, PodCache(), lambda: 0)
    nudge = QueueNudge(queue, Metrics(), audit, jobs)

    async def fail() -> None:
        raise RuntimeError("a fault in the program")

    chores = Chores([fail(), queue.run()])
    registry = handlers.build_registry(nudge, jobs.saw, chores.end)
    with pytest.raises(RuntimeError, match="a fault in the program"):
        await asyncio.wait_for(watch(registry, (), chores), 30)

    async def run(*_: object) -> None:
        raise RuntimeError("the watches have ended")

    monkeypatch.setattr(handlers, "run", run)
    chores = Chores([queue.run()])
    with pytest.raises(RuntimeError, match="the watches have ended"):
        await asyncio.wait_for(watch(registry, (), chores), 30)
    assert all(task.cancelled() for task in chores.tasks)
