"""Honest numbers about training: how far, how fast, how well the hardware is used.

Tokens per second count tokens of the whole run. MFU is torchtitan's: model FLOPs of the trained
tokens (6 per parameter and token without the input embedding, plus 12 per layer, feature and token
of the sequence for attention, causality not discounted, recomputation not counted) over the peak
of the GPU for dense bfloat16. What is computed in float8 or MXFP8 counts half, because its peak is
twice as high: so MFU stays the share of its time that perfect hardware would need. A device whose
peak isn't known has no MFU. Both are taken over the whole time since the last report, saves and
waits included.
"""

import logging
import math
import time

import torch
import torch.distributed as dist

from pretrain_api.config import RunConfig
from pretrain_api.estimate.gpus import peak_flops
from pretrain_api.wire import CheckpointReport, Progress, SkippedCheckpoint
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.parallel.mesh import DP_SHARD, sizes
from pretrain_trainer.precision.float8 import eight_bit_flops
from pretrain_trainer.state import TrainState
from pretrain_trainer.step import StepReport
from pretrain_trainer.world import World

logger = logging.getLogger(__name__)


def mfu(tokens_per_second: float, flops_per_token: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation as a fraction, of one device that trains on so many tokens."""
    return None if peak is None else tokens_per_second * flops_per_token / peak


class Telemetry:
    """Collects what steps report and makes :class:`Progress` of it.

    Args:
        config: says how often to report.
        world: this rank's place and device.
        model: says how much arithmetic a token is.
        known: what was reported before a restart; it stands until something newer is known.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        model: LanguageModel,
        known: Progress,
    ) -> None:
        self._config = config
        self._ranks = world.place.world_size
        # Half of what is in eight bits: it has twice the peak.
        self._flops_per_token = model.flops_per_token() - eight_bit_flops(model) // 2
        on_gpu = world.device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(world.device)) if on_gpu else None
        self._since = time.monotonic()
        self._steps = 0
        self._tokens = 0
        self._reported = False
        self.progress = known.model_copy(update={"steps": config.training.steps})

    def start(self) -> None:
        """Rates count from here: what came before, such as loading, was no training."""
        self._since = time.monotonic()

    def note(self, **changes: object) -> None:
        """Change fields of the progress that don't come from steps."""
        self.progress = self.progress.model_copy(update=changes)

    def resumed(self, state: TrainState, skipped: tuple[SkippedCheckpoint, ...]) -> None:
        """Training goes on from a checkpoint, past newer ones that were damaged."""
        self.note(
            step=state.step,
            tokens=state.tokens,
            first_loss=_number(state.first_loss),
            ledger=state.ledger.hex(),
            resumed_from=state.step,
            skipped=skipped,
        )

    def saved(self, report: CheckpointReport) -> None:
        """A checkpoint was committed."""
        self.note(checkpoint=report)
        logger.info(
            "saved step %d in %.1f s (%.1f MB)", report.step, report.seconds, report.bytes / 1e6,
            extra={"fields": {"checkpoint": report.model_dump()}},
        )  # fmt: skip

    def step_done(self, report: StepReport, state: TrainState, *, last: bool) -> bool:
        """Take in one step; True if this was one to report. Collective when it is.

        Reported are the first step of this process, every ``metrics.log_freq``-th and the last one.
        """
        self._steps += 1
        self._tokens += report.agreed.valid_tokens
        due = state.step % self._config.metrics.log_freq == 0
        if self._reported and not (due or last):
            return False
        self._reported = True
        loss = report.loss.clone()
        dist.all_reduce(loss)
        if state.step == 1:
            state.first_loss = float(loss)
        self._summarise(report, state, float(loss))
        return True

    def _summarise(self, report: StepReport, state: TrainState, loss: float) -> None:
        elapsed = time.monotonic() - self._since
        rate = self._tokens / elapsed
        self.note(
            step=state.step,
            tokens=state.tokens,
            loss=_number(loss),
            first_loss=_number(state.first_loss),
            grad_norm=_number(report.grad_norm),
            learning_rate=report.learning_rate,
            tokens_per_second=rate,
            mfu=mfu(rate / self._ranks, self._flops_per_token, self._peak),
            step_seconds=elapsed / self._steps,
            data_wait_seconds=report.data_wait,
            ledger=state.ledger.hex(),
        )
        logger.info(log_line(self.progress), extra={"fields": log_fields(self.progress)})
        self._since, self._steps, self._tokens = time.monotonic(), 0, 0


def log_line(progress: Progress) -> str:
    """The numbers a person follows, aligned over steps."""
    width = len(str(progress.steps))
    numbers = (
        f"step {progress.step:>{width}}/{progress.steps}  loss {progress.loss or math.nan:8.4f}"
        f"  grad {progress.grad_norm or math.nan:8.3f}  lr {progress.learning_rate:.2e}"
        f"  {progress.tokens_per_second:>10,.0f} tok/s  {progress.step_seconds:7.3f} s/step"
    )
    return numbers if progress.mfu is None else f"{numbers}  mfu {progress.mfu:6.1%}"


def log_fields(progress: Progress) -> dict[str, object]:
    """The numbers a machine collects; the checkpoint has lines of its own."""
    return progress.model_dump(exclude={"checkpoint", "skipped"}, exclude_none=True)


def log_start(config: RunConfig, world: World, model: LanguageModel) -> None:
    """One line that says what is about to be trained, and on what."""
    plan = world.plan
    parameters = sum(p.numel() for p in model.parameters())
    tokens = plan.global_batch_size * config.training.seq_len
    axes = sizes(world.mesh.degrees)._asdict()
    mesh = {name: n for name, n in axes.items() if n > 1} or {DP_SHARD: 1}
    logger.info(
        "%s: %s %s, %s parameters, %s on %s, %s tokens per step (%d sequences of %d, "
        "%d accumulated), %d steps",
        config.job.description, config.model.name, config.model.flavor, f"{parameters:,}",
        " x ".join(f"{name} {size}" for name, size in mesh.items()), world.device.type,
        f"{tokens:,}", plan.global_batch_size, config.training.seq_len, plan.accumulation_steps,
        config.training.steps,
        extra={"fields": {"parameters": parameters, "mesh": mesh, "tokens_per_step": tokens}},
    )  # fmt: skip
    if config.job.print_config:
        logger.info("configuration: %s", config.model_dump_json())


def _number(value: float) -> float | None:
    """None for what JSON can't write."""
    return value if math.isfinite(value) else None
