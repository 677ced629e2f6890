"""One job in a namespace of its own: a stand-in for its nodes, and an operator behind a proxy."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain_api import names
from pretrain_api.status import JobStatus
from pretrain_devcluster.controlplane import ControlPlane

from .api import EVENTS, JOBS, POLICIES, RBAC, Api, ApiError, Body
from .endstate import masked
from .operators import ForkServer, Operator
from .proxy import SERVICE_ACCOUNT, Proxy
from .standin import StandIn, stand_in
from .world import Deed, Run, Worker

JOB = "job"
SYSTEM = "pretrain-system"
WAIT_SECONDS = 180.0
POLL_SECONDS = 0.1
MOST_STARTS = 10
STEPS = 40

_numbers = itertools.count(1)


def manifest(steps: int = STEPS, **spec: Any) -> Body:
    """A small job on two workers that no scheduler looks at; ``spec`` replaces whole sections."""
    base: Body = {
        "training": {"dataset": "text", "datasetPath": "/data", "steps": steps},
        "checkpoint": {"enable": True, "interval": 10},
        "workers": workers(2),
        "recovery": {"backoffSeconds": 1},
        "volumes": {"checkpoint": {"claimTemplate": {"storage": "1Gi"}, "retention": "Delete"}},
    }
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": JOB},
        "spec": base | spec,
    }


def workers(replicas: int, **more: Any) -> Body:
    """Workers that end quickly when they are told to."""
    template = {"schedulerName": "nobody", "terminationGracePeriodSeconds": 10}
    return {"replicas": replicas, "podTemplate": template, **more}


async def install(api: Api, repository: Path) -> None:
    """The definition of PretrainJobs, and the operator's rights, as the manifests have them."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    for file in sorted((repository / "manifests" / "base" / "crds").glob("*.yaml")):
        body = yaml.safe_load(file.read_text())
        await api.apply(f"{path}/{body['metadata']['name']}", body)
    await api.create("/api/v1/namespaces", {"metadata": {"name": SYSTEM}})
    for body in operator_manifests(repository):
        if body["kind"] in ("ClusterRole", "ClusterRoleBinding"):
            plural = body["kind"].lower() + "s"
            await api.apply(f"{RBAC}/{plural}/{body['metadata']['name']}", body)
    async with asyncio.timeout(WAIT_SECONDS):
        while not await _served(api):  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(POLL_SECONDS)


async def _served(api: Api) -> bool:
    try:
        await api.get(f"{JOBS}/namespaces/default/{names.PLURAL}")
    except ApiError as error:
        if error.status not in (404, 429):  # unknown yet, or "storage is (re)initializing"
            raise
        return False
    return True


def operator_manifests(repository: Path) -> list[Body]:
    """Every object the operator consists of."""
    text = (repository / "manifests" / "base" / "operator.yaml").read_text()
    return [body for body in yaml.safe_load_all(text) if body]


async def lend_lease_rights(api: Api, repository: Path, namespace: str) -> None:
    """The operator's role in its own namespace, in this one: each lab has a lease of its own."""
    for body in operator_manifests(repository):
        if body["kind"] == "Role":
            body["metadata"]["namespace"] = namespace
            await api.create(f"{RBAC}/namespaces/{namespace}/roles", body)
            account = SERVICE_ACCOUNT.rpartition(":")[2]
            subject = {"kind": "ServiceAccount", "name": account, "namespace": SYSTEM}
            binding = {
                "metadata": {"name": body["metadata"]["name"]},
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io",
                    "kind": "Role",
                    "name": body["metadata"]["name"],
                },
                "subjects": [subject],
            }
            await api.create(f"{RBAC}/namespaces/{namespace}/rolebindings", binding)


@dataclass
class Lab:
    """See the module. Made by :func:`lab`."""

    api: Api
    plane: ControlPlane
    servers: ForkServer
    namespace: str
    folder: Path
    kubelet: StandIn
    proxy: Proxy
    operator: Operator

    @property
    def job_path(self) -> str:
        return f"{JOBS}/namespaces/{self.namespace}/{names.PLURAL}/{JOB}"

    @property
    def workers(self) -> list[Worker]:
        """All workers whose pods exist."""
        return list(self.kubelet.workers.values())

    async def submit(self, body: Body) -> None:
        """A user creates the job."""
        await self.api.create(f"{JOBS}/namespaces/{self.namespace}/{names.PLURAL}", body)

    async def change(self, **spec: Any) -> None:
        """A user changes the job."""
        await self.api.patch(self.job_path, {"spec": spec})

    async def status(self) -> JobStatus | None:
        """The job's status; None if the job is gone."""
        body = await self.api.find(self.job_path)
        return None if body is None else JobStatus.model_validate(body.get("status") or {})

    async def phase(self) -> str | None:
        """One word about the job; None if it is gone."""
        status = await self.status()
        return None if status is None else str(status.phase or "")

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        """Wait for a condition. Raises AssertionError with all there is to know."""
        deadline = asyncio.get_running_loop().time() + WAIT_SECONDS
        while not await condition():
            self.kubelet.check()
            if self.operator.starts > MOST_STARTS:
                raise AssertionError(f"the operator ends by itself\n{await self.story()}")
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"never seen: {what}\n{await self.story()}")
            await asyncio.sleep(POLL_SECONDS)

    async def until_true(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition that needs no question to the API server."""

        async def there() -> bool:
            return condition()

        await self.until(there, what)

    async def until_phase(self, *phases: str | None) -> None:
        """Wait until the job is in one of these phases."""

        async def there() -> bool:
            return await self.phase() in phases

        await self.until(there, f"a phase among {phases}")

    async def until_standing(self) -> None:
        """Wait until training has come to where the script lets it wait."""
        await self.until_true(self.kubelet.run.standing.is_set, "training waits")

    async def children(self) -> dict[str, list[str]]:
        """Names of everything that was made for the job, by kind."""
        kinds = {
            "pods": "/api/v1",
            "configmaps": "/api/v1",
            "persistentvolumeclaims": "/api/v1",
            "networkpolicies": POLICIES,
        }
        found: dict[str, list[str]] = {}
        for plural, prefix in kinds.items():
            path = f"{prefix}/namespaces/{self.namespace}/{plural}"
            selector = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
            bodies = await self.api.list(path, labelSelector=selector)
            found[plural] = sorted(body["metadata"]["name"] for body in bodies)
        return found

    async def events(self) -> Counter[str]:
        """How often each reason was told."""
        bodies = await self.api.list(f"{EVENTS}/namespaces/{self.namespace}/events")
        return Counter(body["reason"] for body in bodies)

    async def state(self) -> Body:
        """All that must be the same in the end, whatever happened on the way."""
        body = await self.api.find(self.job_path)
        return {
            "status": masked(body["status"]) if body and "status" in body else None,
            "children": await self.children(),
            "pods ever": sorted(self.kubelet.pods_seen.values()),
            "volume": self.kubelet.run.checkpoint,
            "complaints": list(self.kubelet.run.complaints),
        }

    @asynccontextmanager
    async def another(self, identity: str) -> AsyncIterator[Operator]:
        """One more operator of the same release, behind a proxy of its own."""
        async with Proxy(self.plane) as proxy:
            new = Operator(self.servers, proxy, self.namespace, self.folder, identity)
            async with kept(new):
                yield new

    async def story(self) -> str:
        """All there is to know about a run that went wrong."""
        body = await self.api.find(self.job_path)
        log = self.operator.log.read_text()[-4000:] if self.operator.log.exists() else ""
        parts = [
            yaml.safe_dump(body.get("status") if body else None),
            str(await self.children()),
            str(self.kubelet.pods_seen),
            "writes: " + ", ".join(self.proxy.writes),
            f"workers: {[vars(w) | {'pod': w.name} for w in self.kubelet.workers.values()]}",
            f"operator, started {self.operator.starts} times:\n{log}",
        ]
        return "\n---\n".join(parts)


@asynccontextmanager
async def kept(operator: Operator) -> AsyncIterator[Operator]:
    """An operator that is started again when it ends; nothing of it is left afterwards."""
    keeping = asyncio.create_task(operator.keep())
    try:
        yield operator
    finally:
        keeping.cancel()
        operator.end()


@asynccontextmanager
async def lab(
    plane: ControlPlane,
    servers: ForkServer,
    repository: Path,
    folder: Path,
    script: dict[int, Deed] | None = None,
    steps: int = STEPS,
) -> AsyncIterator[Lab]:
    """A namespace with everything in it but the job; the operator is started by whoever uses it."""
    namespace = f"lab-{next(_numbers)}"
    folder = folder / namespace
    folder.mkdir(parents=True)
    async with Api(plane) as api, Proxy(plane) as proxy:
        enforced = {"pod-security.kubernetes.io/enforce": "restricted"}
        meta = {"name": namespace, "labels": enforced}
        await api.create("/api/v1/namespaces", {"metadata": meta})
        await lend_lease_rights(api, repository, namespace)
        operator = Operator(servers, proxy, namespace, folder, "a")
        run = Run(dict(script or {}), steps)
        async with stand_in(api, namespace, run) as kubelet, kept(operator):
            yield Lab(api, plane, servers, namespace, folder, kubelet, proxy, operator)


NewLab = Callable[..., AbstractAsyncContextManager[Lab]]
