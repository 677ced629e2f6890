"""An in-memory cluster for tests: the API server's rules that the operator relies on.

Resource versions and their conflicts, UIDs as preconditions, names that are taken, deletion with a
grace period, and garbage collection by owner. A test plays kubelet and scheduler with the methods
of :class:`MemoryCluster` below the line, and may let the operator crash at any write.
"""

import asyncio
import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pretrain_api import names
from pretrain_api.status import JobStatus
from pretrain_api.wire import (
    Assignment,
    ExitCode,
    Failure,
    Order,
    Phase,
    Progress,
    Result,
    TerminationMessage,
    WorkerStatus,
)
from pretrain_operator.cluster import (
    Body,
    ConflictError,
    Kind,
    NotFoundError,
    RefusedError,
)
from pretrain_operator.merge import apply_merge_patch
from pretrain_operator.metrics import Metrics
from pretrain_operator.observe import Pod, parse_pod
from pretrain_operator.reconcile import Key, Reconciler
from pretrain_operator.settings import Settings
from pretrain_operator.workers import Answers

START = datetime(2026, 1, 1, tzinfo=UTC)


class CrashError(BaseException):
    """The operator dies here. A BaseException, so that nothing in it can catch it."""


class MemoryCluster:
    """:class:`pretrain_operator.cluster.Cluster` in memory."""

    def __init__(self) -> None:
        self.now = START
        self.objects: dict[tuple[Kind, str, str], Body] = {}
        self.writes: list[str] = []
        self.crash_in: int | None = None  # writes until the crash, which happens after the last
        self.admit: Callable[[Kind, Body], str | None] = lambda kind, body: None
        self._versions = itertools.count(1)
        self._uids = itertools.count(1)

    async def get(self, kind: Kind, namespace: str, name: str) -> Body:
        """See Cluster."""
        return copy.deepcopy(self._stored(kind, namespace, name))

    async def create(self, kind: Kind, namespace: str, body: Body) -> Body:
        """See Cluster."""
        body = copy.deepcopy(body)
        meta = body["metadata"]
        if "name" not in meta:
            meta["name"] = f"{meta['generateName']}{next(self._uids)}"
        key = (kind, namespace, meta["name"])
        if key in self.objects:
            raise ConflictError(f"{kind.plural} {meta['name']} already exists", 409)
        if said := self.admit(kind, body):
            raise RefusedError(said, 403)
        meta |= {
            "namespace": namespace,
            "uid": f"uid-{next(self._uids)}",
            "generation": 1,
            "creationTimestamp": stamp(self.now),
        }
        self._store(key, body)
        self._wrote(f"create {kind.plural}/{meta['name']}")
        return copy.deepcopy(body)

    async def patch(self, kind: Kind, namespace: str, name: str, patch: Body) -> Body:
        """See Cluster."""
        return self._patched(kind, namespace, name, patch, status=False)

    async def patch_status(self, kind: Kind, namespace: str, name: str, patch: Body) -> Body:
        """See Cluster."""
        return self._patched(kind, namespace, name, patch, status=True)

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        """See Cluster. Of grace periods only 0 and the object's own are known here."""
        meta = self._stored(kind, namespace, name)["metadata"]
        if uid not in (None, meta["uid"]):
            raise ConflictError(f"{kind.plural} {name} has another UID", 409)
        if grace_seconds == 0:
            self.vanish(kind, name, namespace)
        else:
            self.remove(kind, name, namespace)
        self._wrote(f"delete {kind.plural}/{name}")

    def _patched(self, kind: Kind, namespace: str, name: str, patch: Body, *, status: bool) -> Body:
        before = self._stored(kind, namespace, name)
        for field in ("uid", "resourceVersion"):
            wanted = patch.get("metadata", {}).get(field)
            if wanted is not None and wanted != before["metadata"][field]:
                raise ConflictError(f"{kind.plural} {name} was changed: {field}", 409)
        allowed = {key: patch[key] for key in patch if (key == "status") is status}
        after = apply_merge_patch(before, allowed)
        if after.get("spec") != before.get("spec"):
            after["metadata"]["generation"] += 1
        self._store((kind, namespace, name), after)
        self._wrote(f"patch {kind.plural}/{name}{'/status' if status else ''}")
        return copy.deepcopy(after)

    def _stored(self, kind: Kind, namespace: str, name: str) -> Body:
        try:
            return self.objects[kind, namespace, name]
        except KeyError:
            raise NotFoundError(f"{kind.plural} {name} not found", 404) from None

    def _store(self, key: tuple[Kind, str, str], body: Body) -> None:
        body["metadata"]["resourceVersion"] = str(next(self._versions))
        self.objects[key] = body

    def _wrote(self, what: str) -> None:
        self.writes.append(what)
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in <= 0:
                self.crash_in = None
                raise CrashError(what)

    # --- what users, scheduler, kubelet and garbage collector do ---------------------------------

    def all(self, kind: Kind) -> list[Body]:
        """All objects of a kind, by name."""
        found = [body for (kind_, _, _), body in self.objects.items() if kind_ is kind]
        return sorted(found, key=lambda body: body["metadata"]["name"])

    def pods(self) -> list[Body]:
        """Copies of all pods, as a watch would have brought them."""
        return copy.deepcopy(self.all(Kind.POD))

    def pod(self, name: str, namespace: str = "default") -> Body:
        """A pod to look at or to change in place."""
        return self._stored(Kind.POD, namespace, name)

    def edit(self, kind: Kind, name: str, patch: Body, namespace: str = "default") -> None:
        """A user changes an object."""
        crash, self.crash_in = self.crash_in, None
        self._patched(kind, namespace, name, patch, status=False)
        self.crash_in = crash

    def remove(self, kind: Kind, name: str, namespace: str = "default") -> None:
        """Delete: a pod on a node gets its grace period, anything else goes, children with it."""
        key = (kind, namespace, name)
        body = self._stored(*key)
        over = body.get("status", {}).get("phase") in ("Succeeded", "Failed")
        if kind is Kind.POD and body["spec"].get("nodeName") and not over:
            grace = body["spec"].get("terminationGracePeriodSeconds", 30)
            until = stamp(self.now + timedelta(seconds=grace))
            meta = body["metadata"]
            meta.setdefault("deletionTimestamp", until)
            meta.setdefault("deletionGracePeriodSeconds", grace)
            self._store(key, body)
            return
        self.vanish(kind, name, namespace)

    def vanish(self, kind: Kind, name: str, namespace: str = "default") -> None:
        """The object is gone at once, and in time all it owned."""
        uid = self.objects.pop((kind, namespace, name))["metadata"]["uid"]
        for (child_kind, space, child), body in list(self.objects.items()):
            owners = body["metadata"].get("ownerReferences") or ()
            if any(owner["uid"] == uid for owner in owners):
                self.vanish(child_kind, child, space)

    def set_status(self, name: str, **fields: Any) -> None:
        """Change a pod's status."""
        body = self.pod(name)
        body.setdefault("status", {}).update(fields)
        self._store((Kind.POD, "default", name), body)

    def schedule(self, name: str, node: str = "node-1") -> None:
        """The scheduler finds a node, which is ready unless the test made it otherwise."""
        ready = {"metadata": {"name": node}, "status": {"conditions": [condition("Ready", "True")]}}
        self.objects.setdefault((Kind.NODE, "", node), ready)
        self.pod(name)["spec"]["nodeName"] = node
        self.set_status(name, conditions=[condition("PodScheduled", "True")])

    def refuse(self, name: str, words: str, reason: str = "Unschedulable") -> None:
        """The scheduler finds no node, or a queue holds the pod back."""
        said = condition("PodScheduled", "False", reason=reason, message=words)
        self.set_status(name, conditions=[said])

    def start(self, name: str, ip: str | None = None, node: str = "node-1") -> None:
        """The kubelet starts the container and finds it ready."""
        self.schedule(name, node)
        address = ip or f"10.0.0.{next(self._uids) % 250 + 1}"
        ready = [condition("PodScheduled", "True"), condition("Ready", "True")]
        self.set_status(name, phase="Running", podIP=address, conditions=ready)

    def finish(
        self,
        name: str,
        code: int,
        message: TerminationMessage | str = "",
        *,
        reason: str | None = None,
    ) -> None:
        """The container ends. A pod that was being deleted is gone then."""
        text = message if isinstance(message, str) else message.to_bytes().decode()
        ended: Mapping[str, Any] = {
            "exitCode": code,
            "reason": reason or ("Completed" if code == 0 else "Error"),
            "finishedAt": stamp(self.now),
            "message": text,
        }
        status = {"name": names.CONTAINER, "state": {"terminated": ended}}
        phase = "Succeeded" if code == 0 else "Failed"
        self.set_status(name, phase=phase, containerStatuses=[status], conditions=[])
        if "deletionTimestamp" in self.pod(name)["metadata"]:
            self.vanish(Kind.POD, name)

    def advance(self, seconds: float) -> None:
        """Time goes by."""
        self.now += timedelta(seconds=seconds)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for what has no event of its own. Raises TimeoutError if it doesn't come."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - anything may make it true
            await asyncio.sleep(0.001)


def condition(kind: str, status: str, **fields: str) -> Body:
    """A condition of a pod."""
    return {"type": kind, "status": status, **fields}


def stamp(time: datetime) -> str:
    """A time as Kubernetes writes it."""
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


JOB = "llama"


def job_body(**spec: Any) -> Body:
    """A small valid PretrainJob with a retained claim; ``spec`` replaces whole sections."""
    base: Body = {
        "training": {"dataset": "text", "datasetPath": "/data", "steps": 100},
        "checkpoint": {"enable": True, "interval": 10},
        "workers": {"replicas": 2},
        "volumes": {"checkpoint": {"claimTemplate": {"storage": "1Gi"}}},
    }
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": JOB},
        "spec": base | spec,
    }


class SilentWorkers:
    """Workers that answer what the test put into ``reports``, and are silent as ``silent`` says."""

    def __init__(self) -> None:
        self.reports: dict[str, WorkerStatus] = {}
        self.silent: dict[str, float] = {}

    async def ask(self, pods: Iterable[Pod]) -> Answers:
        """See Workers."""
        asked = {pod.name for pod in pods}
        silent = {name: self.silent[name] for name in asked & self.silent.keys()}
        answered = (asked - silent.keys()) & self.reports.keys()
        return Answers({name: self.reports[name] for name in answered}, silent)


class Bench:
    """One job on a memory cluster with an operator that can be crashed at will."""

    def __init__(self) -> None:
        self.cluster = MemoryCluster()
        self.workers = SilentWorkers()
        self.metrics = Metrics()
        self.stale: list[Body] | None = None  # what the watch brought, if it lags

    async def submit(self, **spec: Any) -> None:
        """A user creates the job."""
        await self.cluster.create(Kind.JOB, "default", job_body(**spec))

    def cached_pods(self, key: Key) -> list[Pod]:
        """The pods as the operator's cache has them."""
        bodies = self.cluster.all(Kind.POD) if self.stale is None else self.stale
        return [pod for body in bodies if (pod := parse_pod(body))]

    def operator(self) -> Reconciler:
        """An operator that remembers nothing of any round."""
        return Reconciler(
            self.cluster,
            self.workers,
            self.cached_pods,
            Settings(),
            self.metrics,
            clock=lambda: self.cluster.now,
        )

    async def round(self) -> float | None:
        """One round, by an operator that remembers nothing of the last one."""
        return await self.operator().reconcile(("default", JOB))

    async def rest(self, operator: Reconciler) -> float | None:
        """Rounds by one operator until it doesn't ask for another at once. Returns what it does."""
        while (wake := await operator.reconcile(("default", JOB))) == 0:
            pass
        return wake

    async def settle(self, rounds: int = 30) -> float | None:
        """Rounds until nothing is written any more. Returns what the last one asked for.

        Raises AssertionError if the operator doesn't come to rest.
        """
        for _ in range(rounds):
            before = len(self.cluster.writes)
            wake = await self.round()
            if len(self.cluster.writes) == before and wake != 0:
                return wake
        raise AssertionError(f"still writing: {self.cluster.writes[-6:]}")

    async def train(self, report: Progress | None = None) -> None:
        """Settle, let every pod without an address start, and settle again."""
        await self.settle()
        there = {pod["metadata"]["name"]: pod for pod in self.cluster.pods()}
        for name in (*self.member_pods(), *self.candidate_pods()):
            if name in there and "podIP" not in there[name].get("status", {}):
                self.cluster.start(name)
        await self.settle()
        if report is not None:
            self.report(report)
            await self.settle()

    async def crash(self) -> None:
        """The program of worker 1 fails; the job goes on a second later, if at all."""
        assignment = self.status.assignment
        said = message(Result.FAILED, generation=assignment.generation if assignment else 0, rank=1)
        self.cluster.finish(self.member_pods()[1], 1, said)
        await self.settle()
        self.cluster.advance(1)
        await self.train()

    async def obey(self, progress: Progress | None = None) -> None:
        """Members do what they were told, the leader with this ``progress``, and the rest follows.

        Those told to drain save and end; those told to pause save and say so.
        """
        await self.settle()
        for name in self.member_pods():
            word = self.told(name)
            done = progress if word and word.rank == 0 else None
            if word and word.orders is Order.DRAIN:
                said = message(Result.PREEMPTED, done, generation=word.generation, rank=word.rank)
                self.cluster.finish(name, ExitCode.PREEMPTED, said)
            elif word and word.orders is Order.PAUSE:
                said = WorkerStatus(generation=word.generation, rank=word.rank, paused=True)
                said = said.model_copy(update={"progress": done or Progress()})
                self.workers.reports[name] = said
        await self.settle()

    def told(self, name: str) -> Assignment | None:
        """What a pod was told by its annotation, if it is there and runs."""
        there = {pod["metadata"]["name"]: pod for pod in self.cluster.pods()}
        phase = there[name].get("status", {}).get("phase") if name in there else "Failed"
        if phase in ("Succeeded", "Failed"):
            return None
        text = there[name]["metadata"]["annotations"].get(names.ANNOTATION_ASSIGNMENT)
        return Assignment.model_validate_json(text) if text else None

    def report(self, progress: Progress, phase: Phase = Phase.STEP) -> None:
        """The leader reports progress in the present generation."""
        assignment = self.status.assignment
        if assignment is None:
            raise AssertionError("nobody leads yet")
        said = WorkerStatus(
            generation=assignment.generation,
            rank=0,
            phase=phase,
            step=progress.step,
            progress=progress,
        )
        self.workers.reports[assignment.workers[0].pod] = said

    def member_pods(self) -> list[str]:
        """Names of the members' pods."""
        assignment = self.status.assignment
        return [member.pod for member in assignment.workers] if assignment else []

    def candidate_pods(self) -> list[str]:
        """Names of the candidates' pods."""
        assignment = self.status.assignment
        return [member.pod for member in assignment.candidates] if assignment else []

    @property
    def status(self) -> JobStatus:
        """The job's status as stored."""
        body = self.cluster.objects[Kind.JOB, "default", JOB]
        return JobStatus.model_validate(body.get("status") or {})

    def condition(self, kind: str) -> tuple[str, str] | None:
        """Status and reason of a condition."""
        found = next((c for c in self.status.conditions if c.type == kind), None)
        return (found.status, found.reason) if found else None

    def events(self) -> list[str]:
        """Reasons of all Events, oldest first."""
        bodies = [b for (kind, _, _), b in self.cluster.objects.items() if kind is Kind.EVENT]
        return [body["reason"] for body in bodies]


def message(
    result: Result,
    progress: Progress | None = None,
    *,
    generation: int = 1,
    rank: int | None = 0,
    failure: Failure | None = None,
) -> TerminationMessage:
    """A termination message."""
    return TerminationMessage(
        result=result,
        generation=generation,
        rank=rank,
        progress=progress or Progress(),
        failure=failure,
    )
