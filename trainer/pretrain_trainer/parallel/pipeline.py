"""Pipeline parallelism: ranks have different layers, and microbatches travel from one to the next.

A rank has one stage or several, each a part of the model. In what order it computes microbatches in
its stages, forward and backward, is a schedule: one of torch's, or one from a file. Shapes of what
travels are computed here and told to torch, which would otherwise send them around as pickles.

Every rank of a pipeline reads the same samples: the first stage wants their tokens, the last one
their labels, and any stage may want their positions. Each call is one run of the schedule over a
local batch. Gradients add up over calls, and FSDP reduces them at the end of the last one.

Some schedules split the backward pass of a stage: first the gradients of what it received, which
somebody waits for, and those of its weights when there is nothing better to do. torch does the
second by going through parts of the recorded graph again, once for almost every weight. Where
blocks recompute their activations they would do so each time, or can't again; what was compiled can
only be run as a whole; and where FSDP frees parameters after the forward pass torch wouldn't find
the weights, without saying so. There both are computed at once, in the place of the first.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from pretrain_api.config import Parallelism, RunConfig
from pretrain_api.mesh import SPLIT_BACKWARD, stage_count, stages_of_rank
from pretrain_trainer.engine import Inputs
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.attention import Documents
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.parallel.mesh import Mesh
from pretrain_trainer.parallel.order import CSV, Order, read_order, splits_backward, stages_in
from pretrain_trainer.parallel.stages import Stages, cut, split

logger = logging.getLogger(__name__)

Schedule = PipelineScheduleSingle | PipelineScheduleMulti


@dataclass(frozen=True, slots=True)
class Plan:
    """A pipeline on paper, as one rank sees it.

    Attributes:
        stages: names of the units in every stage.
        own: numbers of this rank's stages, ascending.
        width: of the stream between stages.
        order: what ranks do, where it comes from a file.
    """

    stages: Stages
    own: tuple[int, ...]
    width: int
    order: Order | None = None

    def cut(self, model: LanguageModel) -> tuple[LanguageModel, ...]:
        """This rank's parts of a whole meta model, in the order of stages."""
        return tuple(cut(model, self.stages[number]) for number in self.own)


class Edges(NamedTuple):
    """What one microbatch is at the borders of stages, on the meta device."""

    tokens: Tensor  # int64 [microbatch, tokens], into the first stage
    stream: Tensor  # [microbatch, tokens, dim] in the blocks' dtype, between stages
    loss: Tensor  # float32 scalar, out of the last stage


def plan(model: LanguageModel, config: RunConfig, mesh: Mesh) -> Plan:
    """Decide which stages there are and which this rank has.

    Raises:
        BadInputError: modules named by hand, or the order in a file, don't make a pipeline.
    """
    parallelism, rank = config.parallelism, mesh.at.pp
    assert model.tok_embeddings is not None, "only a whole model can be cut"
    count = stage_count(parallelism, len(model.layers))
    order = None
    if parallelism.pipeline_parallel_schedule_csv:
        order = read_order(Path(parallelism.pipeline_parallel_schedule_csv), mesh.degrees.pp)
        count = _counted(order, count)
    assert count is not None, "only a file leaves it open"
    own = stages_of_rank(parallelism, count, rank) if order is None else stages_in(order[rank])
    stages = split(model, parallelism, count)
    told = "; ".join(
        stage[0] if len(stage) == 1 else f"{stage[0]}..{stage[-1]}" for stage in stages
    )
    logger.info("a pipeline of %d stages: %s", count, told)
    return Plan(stages, own, model.tok_embeddings.embedding_dim, order)


def connect(
    parts: tuple[LanguageModel, ...],
    plan: Plan,
    config: RunConfig,
    mesh: Mesh,
    device: torch.device,
) -> "Pipeline":
    """Put this rank's parts, ready to train, into their places in the pipeline.

    Raises:
        BadInputError: the order in a file can't be followed, or torch is too old.
    """
    if "finalize_gradients" not in inspect.signature(PipelineScheduleSingle.step).parameters:
        raise BadInputError(
            "parallelism.pipeline_parallel_degree: pipelines need torch 2.15 or newer, and this is "
            f"{torch.__version__}; update it or use 1"
        )
    assert mesh.pp is not None
    edges, last = _edges(plan, config, mesh), len(plan.stages) - 1
    at_once = backward_at_once(plan, config)
    stages = [
        PipelineStage(
            part,
            number,
            len(plan.stages),
            device,
            input_args=edges.tokens if number == 0 else edges.stream,
            output_args=edges.loss if number == last else edges.stream,
            group=mesh.pp.get_group(),
            dw_builder=_nothing_left if at_once else None,
        )
        for number, part in zip(plan.own, parts, strict=True)
    ]
    size = config.parallelism.pipeline_parallel_microbatch_size
    schedule = _schedule(stages, plan, config.parallelism, config.training.local_batch_size // size)
    return Pipeline(schedule, size, device)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Computes local batches with the other ranks of a pipeline; a :class:`..engine.Engine`."""

    schedule: Schedule
    microbatch_size: int
    device: torch.device

    def __call__(self, inputs: Inputs, step_tokens: int, *, last: bool) -> Tensor:
        """See :class:`pretrain_trainer.engine.Engine`."""
        size = self.microbatch_size
        tokens = inputs.tokens.split(size)
        others = zip(inputs.labels.split(size), inputs.document_ids.split(size), strict=True)
        losses: list[Tensor] = []
        self.schedule.step(
            arg_mbs=[(microbatch,) for microbatch in tokens],
            kwarg_mbs=[
                {"positions": inputs.positions, "labels": labels, "documents": Documents(ids)}
                for labels, ids in others
            ],
            target_mbs=[step_tokens] * len(tokens),
            losses=losses,
            return_outputs=False,
            finalize_gradients=last,
        )
        if not losses:
            return torch.zeros((), dtype=torch.float32, device=self.device)
        return torch.stack(losses).detach().sum()


def _schedule(
    stages: list[PipelineStage], plan: Plan, parallelism: Parallelism, microbatches: int
) -> Schedule:
    """The schedule over this rank's stages.

    The last stage returns the sum of a microbatch's losses; its target is what to divide it by.
    """
    options = {"loss_fn": torch.div, "scale_grads": False}
    if plan.order is None:
        kind = get_schedule_class(parallelism.pipeline_parallel_schedule)
        own: Any = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        return kind(own, microbatches, **options)
    schedule = _PipelineScheduleRuntime(stages, microbatches, **options)
    try:
        schedule._prepare_schedule_with_comms(plan.order)
    except (AssertionError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        path = parallelism.pipeline_parallel_schedule_csv
        raise BadInputError(
            f"{CSV}: {path} can't be followed with {microbatches} microbatches in "
            f"{len(plan.stages)} stages: {reason}"
        ) from error
    return schedule


def _edges(plan: Plan, config: RunConfig, mesh: Mesh) -> Edges:
    training, size = config.training, config.parallelism.pipeline_parallel_microbatch_size
    tokens = training.seq_len // mesh.degrees.cp
    positions = tokens // mesh.degrees.tp  # ranks that split matrices split the stream by position
    dtype = getattr(torch, training.mixed_precision_param)
    with torch.device("meta"):
        return Edges(
            tokens=torch.empty(size, tokens, dtype=torch.int64),
            stream=torch.empty(size, positions, plan.width, dtype=dtype, requires_grad=True),
            loss=torch.empty((), dtype=torch.float32, requires_grad=True),
        )


def _counted(order: Order, wanted: int | None) -> int:
    """Stages in a file; another number that the configuration asks for is refused."""
    count = 1 + max(stage for actions in order.values() for stage in stages_in(actions))
    if wanted not in (None, count):
        raise BadInputError(
            f"{CSV}: the file has {count} stages, but module_fqns_per_model_part or "
            f"pipeline_parallel_layers_per_stage makes {wanted}; leave them out or make it as many"
        )
    return count


def backward_at_once(plan: Plan, config: RunConfig) -> bool:
    """Whether a schedule that would split the backward pass can't; says so."""
    parallelism = config.parallelism
    if plan.order is None:
        splits = parallelism.pipeline_parallel_schedule in SPLIT_BACKWARD
    else:
        splits = splits_backward(plan.order)
    reasons = {
        "activation_checkpoint.mode": config.activation_checkpoint.mode != "none",
        "compile.enable": config.compile.enable,
        "parallelism.fsdp_reshard_after_forward": parallelism.fsdp_reshard_after_forward
        not in ("default", "never"),
    }
    why = [key for key, holds in reasons.items() if holds]
    if splits and why:
        logger.warning(
            "the pipeline computes gradients of weights together with those of inputs, and idles "
            "where it could do it later, because of %s",
            " and ".join(why),
        )
    return splits and bool(why)


def _nothing_left() -> Callable[[], None]:
    """For torch: what remains to be done for weights when a backward pass was whole."""
    return lambda: None
