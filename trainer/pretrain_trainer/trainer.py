"""Everything one rank trains with, put together once, and its dealings with checkpoints."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain_api.config import RunConfig
from pretrain_api.wire import Order, Phase
from pretrain_trainer.alive import Alive, unwatched
from pretrain_trainer.checkpoint.errors import SaveFailedError
from pretrain_trainer.checkpoint.manager import CheckpointManager, Identity
from pretrain_trainer.checkpoint.peers import Peers
from pretrain_trainer.data.loader import build_loader
from pretrain_trainer.data.tokenizer import Tokenizer, load_tokenizer
from pretrain_trainer.engine import Engine, Whole
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.init import initialise
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.models.registry import build_model
from pretrain_trainer.optim import build_optimizer, reset_optimizer, schedule
from pretrain_trainer.parallel.mesh import Mesh
from pretrain_trainer.parallel.parallelize import parallelize
from pretrain_trainer.precision.compile import set_up_compiler
from pretrain_trainer.precision.convert import convert
from pretrain_trainer.precision.float8 import precompute_scales
from pretrain_trainer.settings import Place
from pretrain_trainer.state import TrainState, restore, state_tensors
from pretrain_trainer.step import Machine, StepReport
from pretrain_trainer.supervision import Supervision
from pretrain_trainer.telemetry import Telemetry, log_start
from pretrain_trainer.world import World

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Trainer:
    """One rank's training: what it works with, how far it is, where it saves and reports."""

    config: RunConfig
    world: World
    machine: Machine
    supervision: Supervision
    telemetry: Telemetry
    checkpoints: CheckpointManager | None
    state: TrainState = field(default_factory=TrainState)
    failed_saves: int = 0  # in a row

    def resume(self) -> bool:
        """Load the newest good checkpoint, or what the run is told to start from. Collective.

        Returns:
            whether training was complete already, so that nothing is left to do.

        Raises:
            BadInputError: the newest checkpoint can't continue training.
            DataError: ranks see different data, or other data than the checkpoint was made with.
        """
        self._compare_data()
        if self.checkpoints is None:
            return False
        self.supervision.enter(Phase.LOAD, 0)
        tensors = self._tensors()
        found = self.checkpoints.load(tensors)
        self.telemetry.note(skipped=found.skipped)
        if found.complete and found.step:
            return self._check_complete(found.step)
        if not found.complete:
            restore(tensors, self.state, self.machine.loader)
        elif found.skipped:  # a seed, after some of a damaged step was filled in before that showed
            reset_optimizer(self.machine.optimizer)
        if found.step is not None:
            self.telemetry.resumed(self.state, found.skipped)
            self.supervision.report(self.telemetry.progress)
        source = found.initial or (None if found.step is None else f"step-{found.step}")
        logger.info("training starts at step %d, from %s", self.state.step, source or "scratch")
        return False

    def _compare_data(self) -> None:
        """Make sure that all ranks see the same samples. Collective."""
        peers, loader = Peers(self.world.control), self.machine.loader
        first = peers.broadcast(loader.fingerprint)
        peers.everywhere(lambda: loader.compare(first))

    def save_due(self, order: Order) -> bool:
        """Whether a checkpoint is due after the step just finished."""
        options, step = self.config.checkpoint, self.state.step
        first = step == 1 and options.enable_first_step_checkpoint
        return first or step % options.interval == 0 or order in (Order.SAVE, Order.DRAIN)

    def save(self, *, last: bool = False, must: bool = False) -> None:
        """Commit a checkpoint of the current step, then delete old ones. Collective.

        One failure is survived, loudly: the next save may find the storage well again.

        Args:
            last: training is complete with this step.
            must: this process leaves next, so there is no later save to make up for this one.

        Raises:
            SaveFailedError: if it is the second in a row, or if no other save follows.
        """
        if self.checkpoints is None or self.config.checkpoint.load_only:
            return
        self.supervision.enter(Phase.SAVE, self.state.step)
        try:
            committed = self.checkpoints.save(self.state.step, self._tensors(), last=last)
        except SaveFailedError:
            self.failed_saves += 1
            if last or must or self.failed_saves > 1:
                raise
            logger.exception("step %d could not be saved; training goes on", self.state.step)
            return
        self.failed_saves = 0
        self.checkpoints.prune()
        self.telemetry.saved(committed)
        self.supervision.report(self.telemetry.progress)

    def save_seed(self) -> None:
        """Save the initial weights as step 0, for runs on other layouts to start from.

        Raises:
            BadInputError: checkpoints are disabled, or there is more than one process.
        """
        if self.checkpoints is None or self.world.place.world_size > 1:
            raise BadInputError(
                "checkpoint.create_seed_checkpoint: needs checkpoint.enable and a single process"
            )
        self.save(last=True)

    def report(self, report: StepReport, *, last: bool) -> None:
        """Report a finished step where it is due. Collective."""
        if self.telemetry.step_done(report, self.state, last=last):
            self.supervision.report(self.telemetry.progress)

    def _tensors(self) -> dict[str, object]:
        machine = self.machine
        return state_tensors(
            self.state,
            machine.parts,
            machine.optimizer,
            machine.loader,
            machine.control,
            machine.mesh,
        )

    def _check_complete(self, step: int) -> bool:
        """A checkpoint of weights alone ends a run; more steps than it has can't be added."""
        steps = self.config.training.steps
        if step < steps and self.config.training.epochs is None:
            raise BadInputError(
                f"training.steps: {steps} steps are asked for, but the newest checkpoint, "
                f"step-{step}, holds only weights and can't continue training; start a new run "
                "with checkpoint.initial_load_path, or use checkpoint.load_step"
            )
        logger.info("training was complete at step %d: nothing left to do", step)
        self.state.step = step
        self.telemetry.note(step=step, resumed_from=step)
        self.supervision.report(self.telemetry.progress)
        return True


def build_trainer(config: RunConfig, world: World, supervision: Supervision) -> Trainer:
    """Put together everything this rank trains with, at its initial values. Collective.

    Raises:
        BadInputError, DataError, CheckpointConfigError: the configuration can't be trained with.
    """
    training = config.training
    tokenizer = load_tokenizer(config.model.hf_assets_path)
    loader = build_loader(
        config,
        tokenizer,
        dp_rank=world.mesh.data_rank,
        dp_degree=world.plan.dp_degree,
        alive=supervision.alive,
    )
    model = build_model(
        config.model, tokenizer.vocab_size, training.seq_len, getattr(torch, training.dtype)
    )
    log_start(config, world, model)
    set_up_compiler(config, world.place.job_uid)
    convert(model, config, world.device)
    parts, engine = place_model(model, config, world.mesh, world.device)
    for part in parts:
        initialise(part, training.seed or 0, world.device, supervision.alive)
    optimizer = build_optimizer(parts, config.optimizer)
    engine = precompute_scales(parts, engine, optimizer, config)
    factor = schedule(config.lr_scheduler, training.steps)
    machine = Machine(
        parts=parts,
        engine=engine,
        optimizer=optimizer,
        learning_rate=lambda step: config.optimizer.lr * factor(step),
        loader=loader,
        device=world.device,
        mesh=world.mesh,
        control=world.control,
    )
    known = supervision.known_progress()
    telemetry = Telemetry(config, world, model, known)
    checkpoints = open_checkpoints(
        config,
        world.place,
        fingerprint(model, tokenizer, config),
        world.control,
        supervision.alive,
        saved_step=known.checkpoint.step if known.checkpoint else world.place.saved_step,
    )
    return Trainer(config, world, machine, supervision, telemetry, checkpoints)


def place_model(
    model: LanguageModel, config: RunConfig, mesh: Mesh, device: torch.device
) -> tuple[tuple[LanguageModel, ...], Engine]:
    """What this rank has of a meta model, with undefined values, and how it computes with it.

    Without a pipeline that is the model itself, changed in place.
    """
    if mesh.pp is None:
        parallelize(model, config, mesh, device)
        return (model,), Whole(model)
    # Two seconds of imports, which the fork server takes where there are pipelines.
    from pretrain_trainer.parallel import pipeline

    plan = pipeline.plan(model, config, mesh)
    parts = plan.cut(model)
    for part in parts:
        parallelize(part, config, mesh, device)
    return parts, pipeline.connect(parts, plan, config, mesh, device)


def fingerprint(model: LanguageModel, tokenizer: Tokenizer, config: RunConfig) -> dict[str, str]:
    """What the run's checkpoints must have been made with, beyond names and shapes of tensors."""
    meaning = model.meaning() | {"attn_mask_type": config.model.attn_mask_type}
    named = {f"model.{name}": value for name, value in meaning.items()}
    return {**named, "tokenizer": tokenizer.digest}


def open_checkpoints(
    config: RunConfig,
    place: Place,
    made_with: dict[str, str],
    control: dist.ProcessGroup | None = None,
    alive: Alive = unwatched,
    saved_step: int | None = None,
) -> CheckpointManager | None:
    """The run's checkpoints, if they are enabled; of ``saved_step`` there was one.

    Options that choose where a run begins apply to its first start only: restarted after a failure,
    it goes on from where it was, or it would never get anywhere.
    """
    options = config.checkpoint
    if not options.enable:
        return None
    if options.create_seed_checkpoint:
        options = options.model_copy(
            update={"last_save_model_only": True, "export_dtype": "float32"}
        )
    identity = Identity(
        job_uid=place.job_uid,
        generation=place.generation,
        nonce=place.nonce,
        fingerprint=made_with,
        round=place.round,
    )
    root = Path(config.job.dump_folder) / config.checkpoint.folder
    return CheckpointManager(
        root,
        options,
        identity,
        control,
        alive=alive,
        recovering=not place.first_start,
        began=None if place.namespace else place.generation,
        saved_step=saved_step,
    )
