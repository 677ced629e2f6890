"""How many sequences a rank sees per step, and in how many streams documents are packed."""

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain_api.config import Training
from pretrain_api.mesh.degrees import divisors
from pretrain_api.mesh.refusal import Broken


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Sequences per step: global = local x data-parallel degree x accumulation steps."""

    global_batch_size: int
    local_batch_size: int
    accumulation_steps: int
    dp_degree: int
    streams: int


def batch_of(training: Training, dp: int) -> BatchPlan:
    """Batch arithmetic over ``dp`` ranks that see different samples, where it comes out even."""
    total = _total(training, dp)
    return BatchPlan(
        global_batch_size=total,
        local_batch_size=training.local_batch_size,
        accumulation_steps=total // (training.local_batch_size * dp),
        dp_degree=dp,
        streams=total if training.data_streams is None else training.data_streams,
    )


def batch_rules(training: Training, dp: int) -> Iterator[Broken]:
    """Broken rules about batches; each assumes that those before it hold."""
    per_pass, total = training.local_batch_size * dp, _total(training, dp)
    if total < 1 or total % per_pass:
        wrong = (
            f"{training.global_batch_size} is no multiple of local_batch_size "
            f"{training.local_batch_size} x data-parallel degree {dp}"
        )
        below = training.global_batch_size // per_pass * per_pass
        values = (-1, *(n for n in (below, below + per_pass) if n > 0))
        yield Broken("training.global_batch_size", wrong, values)
        return
    streams = training.data_streams
    if streams is not None and (total % streams or streams % dp):
        wrong = (
            f"{streams} must divide the global batch size {total} and be a multiple of the "
            f"data-parallel degree {dp}"
        )
        legal = tuple(n for n in divisors(total) if n % dp == 0)
        yield Broken("training.data_streams", wrong, legal, near=streams)


def resized(training: Training, batch: BatchPlan) -> Training:
    """``training`` with batch size and streams fixed to those of ``batch``, for any other world."""
    return training.model_copy(
        update={"global_batch_size": batch.global_batch_size, "data_streams": batch.streams}
    )


def _total(training: Training, dp: int) -> int:
    wanted = training.global_batch_size
    return training.local_batch_size * dp if wanted == -1 else wanted
