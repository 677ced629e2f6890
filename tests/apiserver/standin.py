"""Plays kubelet, agents and training for the worker pods of one namespace.

Pods are bound to nodes that exist on paper only, get an address of the loopback network each, and
answer ``GET /status`` there as a supervisor would. Ranks of one generation make steps together once
all of them have heard of it, obey orders, and end with the codes and termination messages of the
wire contract; :mod:`world` says who they are and what befalls them.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from pretrain_api import names
from pretrain_api.wire import (
    Assignment,
    ExitCode,
    Order,
    Phase,
    TerminationMessage,
    WorkerStatus,
)

from .api import Api, ApiError, Body
from .world import TICK_SECONDS, Fail, Lose, Run, Wait, Worker, last_words

KUBELET = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
NODES = 2


class StandIn:
    """See the module. Use :func:`stand_in`."""

    def __init__(self, api: Api, namespace: str, run: Run) -> None:
        self.run = run
        self.pods_seen: dict[str, str] = {}  # name by UID, of all that were ever created
        self.workers: dict[str, Worker] = {}
        self._api = api
        self._namespace = namespace
        self._runner = web.AppRunner(_pages(self._answer), access_log=None, shutdown_timeout=0.1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._closing = asyncio.Event()

    # --- kubelet ---------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Nodes, and a server for all addresses."""
        await self._runner.setup()
        for number in range(NODES):
            name = self._node(number)
            await self._api.create("/api/v1/nodes", {"metadata": {"name": name}})
            await self._set_node(number, "True")
        self._spawn(self._follow())
        self._spawn(self._train())

    def check(self) -> None:
        """Raise what went wrong in the stand-in itself, or is wrong with how it was used."""
        if self.run.complaints:
            raise AssertionError("; ".join(self.run.complaints))
        if self._error is not None:
            raise self._error

    def _node(self, number: int) -> str:
        return f"{self._namespace}-{number % NODES}"

    async def _set_node(self, number: int, ready: str) -> None:
        condition = {"type": "Ready", "status": ready, "reason": "StandIn"}
        path = f"/api/v1/nodes/{self._node(number)}/status"
        await self._api.patch(path, {"status": {"conditions": [condition]}})

    async def close(self) -> None:
        """No address answers any more."""
        self._closing.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._runner.cleanup()

    async def _follow(self) -> None:
        """Watch the pods, until cancelled."""
        path = f"/api/v1/namespaces/{self._namespace}/pods"
        async for kind, pod in self._api.watch(path, labelSelector=KUBELET):
            uid = pod["metadata"]["uid"]
            if kind == "DELETED":
                if worker := self.workers.pop(uid, None):
                    await self._shut(worker)
                continue
            worker = self.workers.get(uid)
            if worker is None:
                index = int(pod["metadata"]["labels"][names.LABEL_WORKER])
                worker = self.workers[uid] = Worker(pod, index)
                self.pods_seen[uid] = worker.name
                self._spawn(self._start(worker))
            worker.pod = pod
            if not worker.silent:
                self._hear(worker)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._error = self._error or error

    async def _start(self, worker: Worker) -> None:
        """Place the pod, and say that it runs and is ready, at its own address."""
        worker.site = web.TCPSite(self._runner, worker.address, names.HTTP_PORT)
        await worker.site.start()
        path = self._path(worker)
        node = {"kind": "Node", "name": self._node(worker.index)}
        with contextlib.suppress(ApiError):  # it is gone already
            meta = {"name": worker.name, "uid": worker.uid}
            await self._api.create(f"{path}/binding", {"metadata": meta, "target": node})
            conditions = [
                {"type": kind, "status": "True"}
                for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
            ]
            running = {
                "phase": "Running",
                "podIP": worker.address,
                "podIPs": [{"ip": worker.address}],
                "conditions": conditions,
                "containerStatuses": [_container(running={"startedAt": _now()})],
            }
            await self._set_status(worker, running)

    async def _set_status(self, worker: Worker, status: Body) -> None:
        patch = {"metadata": {"uid": worker.uid}, "status": status}
        await self._api.patch(f"{self._path(worker)}/status", patch)

    async def _shut(self, worker: Worker) -> None:
        site, worker.site, worker.over = worker.site, None, True
        if site is not None:
            await site.stop()

    def _path(self, worker: Worker) -> str:
        return f"/api/v1/namespaces/{self._namespace}/pods/{worker.name}"

    def end(self, worker: Worker, code: int, message: TerminationMessage) -> None:
        """The container ends; a pod that was being deleted is gone then."""
        worker.ending = True
        self._spawn(self._end(worker, code, message))

    async def _end(self, worker: Worker, code: int, message: TerminationMessage) -> None:
        await self._shut(worker)
        ended = {
            "exitCode": code,
            "reason": "Completed" if code == 0 else "Error",
            "finishedAt": _now(),
            "message": message.to_bytes().decode(),
        }
        status = {
            "phase": "Succeeded" if code == 0 else "Failed",
            "conditions": [{"type": "Ready", "status": "False"}],
            "containerStatuses": [_container(terminated=ended)],
        }
        with contextlib.suppress(ApiError):  # it was deleted by force
            await self._set_status(worker, status)
        if worker.leaving:
            await self._remove(worker)

    async def _remove(self, worker: Worker) -> None:
        """A kubelet's last word about a pod that was deleted."""
        await self._api.delete(self._path(worker), worker.uid, grace=0)

    # --- agents and ranks ------------------------------------------------------------------------

    def _hear(self, worker: Worker) -> None:
        """Take the assignment from the annotation; an older one than known is ignored."""
        annotations = worker.pod["metadata"].get("annotations", {})
        text = annotations.get(names.ANNOTATION_ASSIGNMENT)
        if text:
            told = Assignment.model_validate_json(text)
            if told.generation >= worker.generation:
                worker.paused = worker.paused and told.generation == worker.generation
                worker.assignment = told
        if worker.leaving and worker.over:
            self._spawn(self._remove(worker))

    async def _train(self) -> None:
        """Go on, until cancelled."""
        while True:
            self._tick()
            await asyncio.sleep(TICK_SECONDS)

    def _tick(self) -> None:
        for world in list(self._worlds()):
            self._begin(world)
            self._advance(world)
            self._obey(world)
        for worker in list(self._living()):
            if worker.leaving or self._ordered(worker) is Order.DRAIN:
                self._leave(worker)
            elif self._ordered(worker) is Order.PAUSE:
                worker.paused = True

    def _living(self) -> Iterator[Worker]:
        alive = self.workers.values()
        return (w for w in alive if not (w.over or w.ending or w.silent))

    def _worlds(self) -> Iterator[list[Worker]]:
        """Workers by rank of every generation of which all members are there and have heard."""
        heard = [w for w in self._living() if w.assignment and not w.paused]
        for generation in {worker.generation for worker in heard}:
            members = {
                w.assignment.rank: w for w in heard if w.assignment and w.generation == generation
            }
            size = next(
                w.assignment.size for w in heard if w.assignment and w.generation == generation
            )
            if set(members) == set(range(size)):
                yield [members[rank] for rank in range(size)]

    def _begin(self, world: list[Worker]) -> None:
        generation = world[0].generation
        if all(worker.started == generation for worker in world):
            return
        rivals = [
            w.name
            for w in self._living()
            if 0 < w.started < generation and not w.paused and w not in world
        ]
        if rivals:
            self.run.complaints.append(f"generation {generation} began beside {rivals}")
        self.run.fence = max(self.run.fence, generation)
        for worker in world:
            worker.started, worker.step = generation, self.run.checkpoint
            worker.resumed = self.run.checkpoint or None
            worker.beat = time.monotonic()

    def _advance(self, world: list[Worker]) -> None:
        """One step, or what the script has in store at this one."""
        step = world[0].step
        match self.run.script.get(step):
            case Wait():
                self.run.standing.set()
                return
            case Fail(index, code):
                del self.run.script[step]
                worker = next(each for each in world if each.index == index)
                self.end(worker, code, last_words(worker, self.run.progress(worker), code))
                return
            case Lose(index):
                del self.run.script[step]
                next(each for each in world if each.index == index).silent = True
                self._spawn(self._set_node(index, "Unknown"))
                return
            case None:
                pass
        if step < self.run.steps:
            step += 1
            for worker in world:
                worker.step, worker.beat = step, time.monotonic()
        if step % self.run.interval == 0 or step == self.run.steps:
            self._save(world)
        if step == self.run.steps:
            self._complete(world)

    def _complete(self, world: list[Worker]) -> None:
        """All are done. Rank 0 is seen to end last, so that the final status counts everybody."""
        for worker in world:
            worker.ending = True

        async def end() -> None:
            for worker in reversed(world):
                await self._end(worker, 0, last_words(worker, self.run.progress(worker), 0))

        self._spawn(end())

    def _obey(self, world: list[Worker]) -> None:
        """One word is enough for all ranks to save at the same step."""
        asked = {self._ordered(worker) for worker in world}
        if asked - {Order.NONE, Order.STOP} or any(worker.leaving for worker in world):
            self._save(world)

    def _save(self, world: list[Worker]) -> None:
        if world[0].generation >= self.run.fence:
            self.run.checkpoint = world[0].step

    def _ordered(self, worker: Worker) -> Order:
        return worker.assignment.orders if worker.assignment else Order.NONE

    def _leave(self, worker: Worker) -> None:
        said = last_words(worker, self.run.progress(worker), ExitCode.PREEMPTED)
        self.end(worker, ExitCode.PREEMPTED, said)

    def go_on(self) -> None:
        """Let training go on from where it waits."""
        self.run.standing.clear()
        waiting = [step for step, deed in self.run.script.items() if isinstance(deed, Wait)]
        del self.run.script[min(waiting)]

    def of(self, index: int) -> Worker:
        """The newest worker in a place."""
        return [worker for worker in self.workers.values() if worker.index == index][-1]

    @property
    def training(self) -> int:
        """Workers in the world that trains, or waits where the script says so; 0 if none does."""
        return max((len(w) for w in self._worlds() if w[0].started == w[0].generation), default=0)

    # --- the worker's page -----------------------------------------------------------------------

    def status(self, worker: Worker) -> WorkerStatus:
        """What a supervisor says of itself."""
        told = worker.assignment
        present = {
            w.assignment.rank
            for w in self._living()
            if w.assignment and told and w.generation == told.generation
        }
        missing = sorted(set(range(told.size)) - present) if told else []
        trains = bool(told) and worker.started == told.generation and not worker.paused
        return WorkerStatus(
            generation=worker.generation,
            round=1 if trains else 0,
            rank=told.rank if told else None,
            phase=Phase.STEP if trains else Phase.WAITING,
            step=worker.step,
            beat_age_seconds=time.monotonic() - worker.beat,
            progress=self.run.progress(worker),
            warm=True,
            paused=worker.paused,
            waiting_for=tuple(missing) if told and told.rank == 0 else (),
            waiting_seconds=time.monotonic() - worker.beat if missing else None,
        )

    async def _answer(self, request: web.Request) -> web.Response:
        here = request.transport.get_extra_info("sockname")[0] if request.transport else None
        worker = next(each for each in self.workers.values() if each.address == here)
        if worker.silent:
            await self._closing.wait()
        return web.Response(text=self.status(worker).to_json(), content_type="application/json")


def _pages(answer: Callable[[web.Request], Awaitable[web.Response]]) -> web.Application:
    pages = web.Application()
    pages.router.add_get("/status", answer)
    return pages


def _container(**state: Body) -> Body:
    return {
        "name": names.CONTAINER,
        "state": state,
        "ready": "running" in state,
        "restartCount": 0,
        "image": "stand-in",
        "imageID": "",
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@asynccontextmanager
async def stand_in(api: Api, namespace: str, run: Run) -> AsyncIterator[StandIn]:
    """A stand-in for as long as the context lasts."""
    kubelet = StandIn(api, namespace, run)
    await kubelet.prepare()
    try:
        yield kubelet
    finally:
        await kubelet.close()
