"""Metrics of the operator, in Prometheus' words.

Counters carry no job name: they would outlive their job. Gauges of a job do, and go with it. All
are in a registry that the process makes, so that two operators in one test don't share numbers.
"""

from contextlib import suppress
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pretrain_api.status import JobPhase, JobStatus
from pretrain_api.wire import Timeline

JOB = ("namespace", "job")
ENDED = (JobPhase.COMPLETE, JobPhase.FAILED)
RECOVERY_BUCKETS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


def _job_gauge(registry: CollectorRegistry, name: str, text: str) -> Gauge:
    return Gauge(f"pretrain_job_{name}", text, JOB, registry=registry)


@dataclass
class Metrics:
    """All metrics of one operator."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        reg = self.registry
        self.reconciles = Counter(
            "pretrain_operator_reconciles",
            "Rounds over one job, by result.",
            ["result"],
            registry=reg,
        )
        self.reconcile_seconds = Histogram(
            "pretrain_operator_reconcile_seconds",
            "Duration of a round.",
            buckets=BUCKETS,
            registry=reg,
        )
        self.queue_depth = Gauge(
            "pretrain_operator_queue_depth", "Jobs that wait for a round.", registry=reg
        )
        self.writes = Counter(
            "pretrain_operator_writes",
            "Writes to the cluster, by kind and verb.",
            ["kind", "verb"],
            registry=reg,
        )
        self.leader = Gauge(
            "pretrain_operator_leader", "Whether this operator makes the rounds.", registry=reg
        )
        self.watch_lag = Gauge(
            "pretrain_operator_watch_lag_seconds",
            "For how long lists have shown what the watch did not bring, by kind.",
            ["kind"],
            registry=reg,
        )
        self.restarts = Counter(
            "pretrain_job_restarts", "Restarts of a world, by reason.", ["reason"], registry=reg
        )
        self.recovery_seconds = Histogram(
            "pretrain_job_recovery_seconds",
            "From the end of the ranks to the first step after it, as seen by the leader.",
            buckets=RECOVERY_BUCKETS,
            registry=reg,
        )
        self.finished = Counter(
            "pretrain_jobs_finished", "Jobs that ended, by phase.", ["phase"], registry=reg
        )
        # A counter that begins at 1 has never increased: the first failure would alert nobody.
        for phase in ENDED:
            self.finished.labels(str(phase))
        self.jobs = Gauge("pretrain_jobs", "Jobs, by phase.", ["phase"], registry=reg)
        self._gauges = {
            "step": _job_gauge(reg, "step", "Optimizer steps done."),
            "steps": _job_gauge(reg, "steps", "Optimizer steps in all."),
            "tokens": _job_gauge(reg, "tokens", "Tokens trained on."),
            "loss": _job_gauge(reg, "loss", "Loss of the last reported step."),
            "tokens_per_second": _job_gauge(reg, "tokens_per_second", "Speed over all ranks."),
            "mfu": _job_gauge(reg, "mfu_ratio", "Model FLOPs utilization, 0 to 1."),
        }
        self._goodput = _job_gauge(
            reg, "goodput_ratio", "Share of the time spent on steps that count, 0 to 1."
        )
        self._checkpoint_step = _job_gauge(
            reg, "checkpoint_step", "Step of the newest committed checkpoint."
        )
        self._checkpoint_time = _job_gauge(
            reg, "checkpoint_timestamp_seconds", "When the newest checkpoint was committed."
        )
        self._ready = _job_gauge(reg, "workers_ready", "Workers that are ready.")
        self._desired = _job_gauge(reg, "workers_desired", "Workers the spec asks for.")
        self._in_place = _job_gauge(
            reg, "restarts_in_place", "Restarts of ranks within their pods."
        )
        self._jobs: set[tuple[str, str]] = set()
        self._hidden: set[tuple[str, str]] = set()  # while another operator may lead
        self._phases: dict[tuple[str, str], JobPhase] = {}
        self._starts: dict[tuple[str, str], tuple[int, int] | None] = {}

    def record(self, namespace: str, name: str, status: JobStatus) -> None:
        """Show the status of a job."""
        self._jobs.add((namespace, name))
        self._count_phase((namespace, name), status.phase)
        if status.progress is not None:
            for key, gauge in self._gauges.items():
                value = getattr(status.progress, key)
                if value is not None:
                    gauge.labels(namespace, name).set(value / 100 if key == "mfu" else value)
        if status.goodput is not None:
            self._goodput.labels(namespace, name).set(status.goodput / 100)
        if status.checkpoint is not None:
            self._checkpoint_step.labels(namespace, name).set(status.checkpoint.step)
            time = status.checkpoint.time.timestamp()
            self._checkpoint_time.labels(namespace, name).set(time)
        if status.workers is not None:
            self._ready.labels(namespace, name).set(status.workers.ready)
            self._desired.labels(namespace, name).set(status.workers.desired)
        if status.restarts is not None:
            self._in_place.labels(namespace, name).set(status.restarts.in_place)

    def record_start(self, namespace: str, name: str, timeline: Timeline) -> None:
        """Observe how long a start took that followed another one, once it has trained.

        One that was over when this process heard of the job first was observed by another.
        """
        job, start = (namespace, name), (timeline.generation, timeline.round)
        known = self._starts.get(job)
        first = job not in self._starts
        if timeline.trained is None:
            self._starts[job] = known
            return
        self._starts[job] = start
        if not first and start != known and timeline.stopped is not None:
            self.recovery_seconds.observe(max(0.0, timeline.trained - timeline.stopped))

    def lead(self, leading: bool) -> set[tuple[str, str]]:
        """Show whether this operator leads. Who doesn't shows no jobs: another one may.

        Returns the jobs that were forgotten for it, once it leads again: they are to be recorded
        anew, also those that nothing happens to.
        """
        self.leader.set(leading)
        if leading:
            again, self._hidden = self._hidden, set()
            return again
        for job in [*self._jobs]:
            self._hidden.add(job)
            self.forget(*job)
        return set()

    def forget(self, namespace: str, name: str) -> None:
        """Drop everything about a job that is gone."""
        self._jobs.discard((namespace, name))
        self._starts.pop((namespace, name), None)
        self._count_phase((namespace, name), None)
        for gauge in (
            *self._gauges.values(),
            self._goodput,
            self._checkpoint_step,
            self._checkpoint_time,
            self._ready,
            self._desired,
            self._in_place,
        ):
            with suppress(KeyError):  # never shown
                gauge.remove(namespace, name)

    def count_restarts(self, before: JobStatus, after: JobStatus) -> None:
        """Count the restarts that a status written ahead has added."""
        old = before.restarts.by_reason if before.restarts else {}
        for reason, count in (after.restarts.by_reason if after.restarts else {}).items():
            if count > old.get(reason, 0):
                self.restarts.labels(reason).inc(count - old.get(reason, 0))
        if after.phase in ENDED and after.completion_time and not before.completion_time:
            self.finished.labels(str(after.phase)).inc()

    def _count_phase(self, job: tuple[str, str], phase: JobPhase | None) -> None:
        before = self._phases.pop(job, None)
        if before is not None:
            self.jobs.labels(before.value).dec()
        if phase is not None:
            self._phases[job] = phase
            self.jobs.labels(phase.value).inc()
