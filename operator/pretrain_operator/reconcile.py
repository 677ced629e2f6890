"""One round over one job: observe, plan, apply."""

import secrets
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from pretrain_api import names
from pretrain_api.job import JobSpec
from pretrain_api.status import JobStatus
from pretrain_operator.apply import Outcome, apply
from pretrain_operator.cluster import Body, Cluster, Kind, NotFoundError
from pretrain_operator.metrics import Metrics
from pretrain_operator.observe import Job, Observation, Pod, gather, gather_pods, parse_job
from pretrain_operator.plan import plan
from pretrain_operator.policies.silence import whom_else, whom_to_ask
from pretrain_operator.progress import pace
from pretrain_operator.settings import Settings
from pretrain_operator.status import is_finished
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
        cached_pods: Callable[[Key], Iterable[Pod]],
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
        self._wrote: dict[Key, datetime] = {}  # the status; of jobs that have numbers
        self._specs: dict[Key, tuple[object, JobSpec]] = {}  # with the version each was parsed of
        self._failed: set[Key] = set()  # whose last round did, or was refused something

    async def reconcile(self, key: Key) -> float | None:
        """Bring one job a step further. Returns seconds until it wants to be looked at again.

        Raises ClusterError if another attempt is due.
        """
        again = key in self._failed
        self._failed.add(key)
        outcome = await self._round(key, again=again)
        if not outcome.refused:
            self._failed.discard(key)
        return outcome.wake_after

    async def _round(self, key: Key, *, again: bool) -> Outcome:
        namespace, name = key
        body = await self._read(namespace, name)
        if body is None:
            self._metrics.forget(namespace, name)
            self._wrote.pop(key, None)
            self._specs.pop(key, None)
            return Outcome(None)
        job = self._parse(key, body)
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
            again=again,
        )
        decided = plan(seen)
        self._metrics.record(namespace, name, decided.status or seen.status)
        if seen.leader_report and seen.leader_report.timeline:
            self._metrics.record_start(namespace, name, seen.leader_report.timeline)
        outcome = await apply(
            self._cluster, seen, body, decided, self._metrics, self._patience(key, seen)
        )
        self._remember(key, decided.status or seen.status, seen.now if outcome.wrote else None)
        return outcome

    def _parse(self, key: Key, body: Body) -> Job:
        """Parse the job; its spec, whose rules take longest, only once in each generation."""
        version = (body["metadata"].get("uid"), body["metadata"].get("generation"))
        known = self._specs.get(key)
        job = parse_job(body, known[1] if known and known[0] == version else None)
        if job.job is not None:
            self._specs[key] = (version, job.job.spec)
        return job

    def _patience(self, key: Key, seen: Observation) -> float:
        """Seconds for which numbers alone are not to be written.

        A new operator knows of the last one's writes only those that brought progress.
        """
        progress = seen.status.progress
        wrote = self._wrote.get(key) or (progress and progress.updated)
        if wrote is None or wrote > seen.now:  # a clock was set, here or where the last one ran
            return 0.0
        return pace(len(self._wrote)) - (seen.now - wrote).total_seconds()

    def _remember(self, key: Key, status: JobStatus, wrote: datetime | None) -> None:
        """Note when a status was written, of a job that has numbers: not finished, with members."""
        has_members = status.assignment is not None and bool(status.assignment.workers)
        if is_finished(status) or not has_members:
            self._wrote.pop(key, None)
        elif wrote is not None:
            self._wrote[key] = wrote

    async def _read(self, namespace: str, name: str) -> Body | None:
        try:
            return await self._cluster.get(Kind.JOB, namespace, name)
        except NotFoundError:
            return None

    async def _ask(self, job: Job, pods: tuple[Pod, ...]) -> Answers:
        """Ask the leader, and everybody else in the same round if that is not enough."""
        answers = await self._workers.ask(whom_to_ask(job, pods))
        return answers | await self._workers.ask(whom_else(job, pods, answers.reports))
