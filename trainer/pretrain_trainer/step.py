"""One optimizer step, top to bottom."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain_api.config import Training
from pretrain_api.wire import Order
from pretrain_trainer.agreement import Count, agree, count
from pretrain_trainer.alive import Alive
from pretrain_trainer.balance import rebalance
from pretrain_trainer.data.loader import Loader, Microbatch, StepBatch
from pretrain_trainer.engine import Engine, Inputs
from pretrain_trainer.errors import HopelessError
from pretrain_trainer.loss import valid_tokens
from pretrain_trainer.models.base import LanguageModel, named_parameters
from pretrain_trainer.optim import set_learning_rate
from pretrain_trainer.parallel.context import own_part
from pretrain_trainer.parallel.mesh import Mesh
from pretrain_trainer.parallel.norm import clip, total_norm
from pretrain_trainer.state import TrainState

MAX_SKIPPED = 10  # steps in a row without finite gradients before training is given up


@dataclass(frozen=True, slots=True)
class Machine:
    """What a step works with; stays the same from step to step."""

    parts: tuple[LanguageModel, ...]  # of the model, on this rank; without a pipeline it is one
    engine: Engine
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]  # of the step about to be taken, from 0
    loader: Loader
    device: torch.device
    mesh: Mesh
    control: dist.ProcessGroup  # in which ranks agree


class Fetched(NamedTuple):
    """This rank's data for one step."""

    batch: StepBatch
    waited: float  # seconds


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did."""

    loss: Tensor  # float32 scalar; this rank's part, all ranks' parts add up to the mean
    grad_norm: float
    learning_rate: float
    agreed: Count
    data_wait: float  # seconds
    last: bool  # the data ends with this step


def fetch(loader: Loader, alive: Alive) -> Fetched:
    """Wait for the data of the next step. Not collective: ranks whose data is there go ahead.

    Args:
        loader: of this rank.
        alive: called while data is on its way.

    Raises:
        DataError, DataUnavailableError: there is none to be had.
    """
    asked = time.monotonic()
    batch = loader.next_step(alive)
    return Fetched(batch, time.monotonic() - asked)


def run_step(
    machine: Machine, state: TrainState, training: Training, order: Order, data: Fetched
) -> StepReport | None:
    """Take one step and note it in ``state``; None if there was nothing left to train on.

    Collective: every rank takes the same decisions, because all follow from agreed numbers.

    Raises:
        HopelessError: gradients are not finite, and ``training.non_finite`` asks to stop or has
            skipped long enough.
    """
    batch = data.batch
    valid = sum(valid_tokens(microbatch.labels) for microbatch in batch.microbatches)
    # Of the ranks that see the same samples one counts them; orders may reach any.
    own = count(valid, batch.sample_hash, batch.ended, order, samples=machine.mesh.leads)
    agreed = agree(own, machine.control)
    ended = agreed.ended == machine.mesh.degrees.dp
    if ended and agreed.valid_tokens == 0:
        return None

    rate = machine.learning_rate(state.schedule_step)
    set_learning_rate(machine.optimizer, rate)
    loss = accumulate(machine, batch.microbatches, agreed.valid_tokens)
    grad_norm = clip_gradients(machine.parts, training.max_norm, machine.mesh)
    finite = math.isfinite(grad_norm)
    if finite:
        machine.optimizer.step()
    rebalance(machine.parts, machine.mesh, learn=finite)
    machine.optimizer.zero_grad(set_to_none=True)

    state.advance(agreed.valid_tokens, agreed.sample_hash, finite)
    if not finite:
        tolerate(state, training)
    return StepReport(loss, grad_norm, rate, agreed, data.waited, last=ended)


def accumulate(machine: Machine, microbatches: list[Microbatch], step_tokens: int) -> Tensor:
    """Forward and backward of all microbatches; gradients are reduced with the last.

    Args:
        machine: what computes them.
        microbatches: this rank's, at least one.
        step_tokens: valid tokens of all ranks' microbatches; the loss is a mean over them.

    Returns:
        This rank's part of the loss, float32 scalar, detached.
    """
    total = torch.zeros((), dtype=torch.float32, device=machine.device)
    for number, microbatch in enumerate(microbatches, start=1):
        tokens, labels, positions = (
            tensor.to(machine.device, non_blocking=True)
            for tensor in own_part(microbatch, machine.mesh)
        )
        inputs = Inputs(tokens, labels, positions, microbatch.document_ids)
        total += machine.engine(inputs, max(1, step_tokens), last=number == len(microbatches))
    # Ranks that split matrices compute the same loss; one of them counts.
    return total if machine.mesh.at.tp == 0 else torch.zeros_like(total)


def clip_gradients(parts: Iterable[nn.Module], max_norm: float, mesh: Mesh) -> float:
    """Scale all gradients so that their total norm is at most ``max_norm``. Collective.

    Returns:
        The norm before; the same number on every rank.
    """
    parameters = [p for _, p in named_parameters(parts) if p.grad is not None]
    norm = total_norm([p.grad for p in parameters if p.grad is not None], mesh)
    clip(parameters, max_norm, norm)
    return float(norm)


def tolerate(state: TrainState, training: Training) -> None:
    """Accept a step without finite gradients, or raise HopelessError."""
    if training.non_finite == "stop":
        raise HopelessError(
            f"step {state.step}: gradients are not finite, and training.non_finite is stop"
        )
    if state.skipped_in_a_row >= MAX_SKIPPED:
        raise HopelessError(
            f"step {state.step}: gradients were not finite in {MAX_SKIPPED} steps in a row; lower "
            "optimizer.lr or look at the data of these steps"
        )
