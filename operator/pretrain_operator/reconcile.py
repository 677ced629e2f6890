"""One round over one job: observe, plan, apply."""

import secrets
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from pretrain_api import names
from pretrain_operator.apply import apply
from pretrain_operator.cluster import Body, Cluster, Kind, NotFoundError
from pretrain_operator.metrics import Metrics
from pretrain_operator.observe import Job, Pod, gather, gather_pods, parse_job
from pretrain_operator.plan import plan
from pretrain_operator.policies.silence import whom_else, whom_to_ask
from pretrain_operator.settings import Settings
from pretrain_operator.workers import Answers, Workers

Key = tuple[str, str]  # namespace and name of a job

NONCE_BYTES = 16


def job_of(pod: Mapping[str, Any]) -> Key | None:
    """The job a worker pod says it belongs to."""
    meta: Mapping[str, Any] = pod["metadata"]
    labels: Mapping[str, str] = meta.get("labels") or {}
    name = labels.get(names.LABEL_JOB)
    return (meta["namespace"], name) if name else None


def utc_now() -> datetime:
    """The clock; whole seconds, as Kubernetes writes times."""
    return datetime.now(UTC).replace(microsecond=0)


class Reconciler:
    """Knows the cluster, the pods in the cache and the workers; decides nothing itself."""

    def __init__(
        self,
        cluster: Cluster,
        workers: Workers,
        cached_pods: Callable[[Key], Iterable[Mapping[str, Any]]],
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._cluster = cluster
        self._workers = workers
        self._cached_pods = cached_pods
        self._settings = settings
        self._metrics = metrics
        self._clock = clock

    async def reconcile(self, key: Key) -> float | None:
        """Bring one job a step further. Returns seconds until it wants to be looked at again.

        Raises ClusterError if another attempt is due.
        """
        namespace, name = key
        body = await self._read(namespace, name)
        if body is None:
            self._metrics.forget(namespace, name)
            return None
        job = parse_job(body)
        pods = await gather_pods(self._cluster, job, self._cached_pods(key))
        answers = await self._ask(job, pods)
        seen = await gather(
            self._cluster,
            job,
            pods,
            settings=self._settings,
            now=self._clock(),
            nonce=secrets.token_hex(NONCE_BYTES),
            reports=answers.reports,
            silent=answers.silent,
        )
        decided = plan(seen)
        self._metrics.record(namespace, name, decided.status or seen.status)
        if seen.leader_report and seen.leader_report.timeline:
            self._metrics.record_start(namespace, name, seen.leader_report.timeline)
        return await apply(self._cluster, seen, body, decided, self._metrics)

    async def _read(self, namespace: str, name: str) -> Body | None:
        try:
            return await self._cluster.get(Kind.JOB, namespace, name)
        except NotFoundError:
            return None

    async def _ask(self, job: Job, pods: tuple[Pod, ...]) -> Answers:
        """Ask the leader, and everybody else in the same round if that is not enough."""
        answers = await self._workers.ask(whom_to_ask(job, pods))
        return answers | await self._workers.ask(whom_else(job, pods, answers.reports))
