"""Prometheus metrics of one worker, made from its status at the moment of the scrape.

Which job and pod a sample belongs to is said by the scrape's own target labels. Tokens are a gauge:
after a restart the count goes back to that of the checkpoint, which a counter must not.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from pretrain_api.wire import WorkerStatus

Sample = tuple[str, str, float | None]


def samples(status: WorkerStatus) -> Iterator[Sample]:
    """Name, help and value of every gauge; a value of None is not known yet."""
    progress, checkpoint = status.progress, status.progress.checkpoint
    yield "generation", "Generation of the world this worker is in.", status.generation
    yield "round", "Start of the ranks within the generation.", status.round
    yield "step", "Newest step of the slowest local rank.", status.step
    yield "beat_age_seconds", "Since the slowest local rank reported.", status.beat_age_seconds
    yield "draining", "1 while leaving on request.", int(status.draining)
    yield (
        "failures_without_progress",
        "Rank failures since the last new step.",
        status.failures_without_progress,
    )
    if progress.steps:  # only the worker of rank 0 knows how far training is
        yield "trained_steps", "Last step whose numbers were published.", progress.step
        yield "target_steps", "Steps to train.", progress.steps
        yield "tokens", "Tokens trained, over all restarts.", progress.tokens
        yield "loss", "Training loss.", progress.loss
        yield "grad_norm", "Norm of the gradient before clipping.", progress.grad_norm
        yield "learning_rate", "Learning rate.", progress.learning_rate
        yield "tokens_per_second", "Training speed.", progress.tokens_per_second
        yield "mfu_ratio", "Model FLOPs utilisation, 1 is all.", progress.mfu
        yield "step_seconds", "Duration of the last step.", progress.step_seconds
        yield "data_wait_seconds", "Waiting for data, last step.", progress.data_wait_seconds
    if checkpoint is not None:
        yield "checkpoint_step", "Step of the newest checkpoint.", checkpoint.step
        yield "checkpoint_timestamp_seconds", "When it was committed.", checkpoint.time
        yield "checkpoint_size_bytes", "Its size.", checkpoint.bytes
        yield "checkpoint_save_seconds", "How long training stood still.", checkpoint.seconds


class StatusCollector:
    """What a prometheus-client registry collects from one status."""

    def __init__(self, status: WorkerStatus, restart_seconds: float | None) -> None:
        self._status = status
        self._restart_seconds = restart_seconds

    def collect(self) -> Iterator[Metric]:
        """All metric families, called by the registry."""
        status = self._status
        if self._restart_seconds is not None:
            text = "From the report of a failure until all ranks ran again, the last time."
            yield GaugeMetricFamily("pretrain_restart_seconds", text, self._restart_seconds)
        for name, text, value in samples(status):
            if value is not None:
                yield GaugeMetricFamily(f"pretrain_{name}", text, value=float(value))
        yield CounterMetricFamily(
            "pretrain_restarts_in_place",
            "Restarts of the ranks without a change of membership.",
            value=status.restarts_in_place,
        )


def render(status: WorkerStatus, restart_seconds: float | None) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(status, restart_seconds))
    return generate_latest(registry)
