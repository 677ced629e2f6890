"""The training process of one rank: join, build, resume, train, save.

This module is what the agent's fork server imports before any rank exists, so importing it loads
torch and everything of ours, and touches no device.
"""

import argparse
import gc
import logging
import os
import sys
from pathlib import Path

from pretrain_api.config import RunConfig
from pretrain_api.wire import ExitCode, Order, Phase
from pretrain_trainer.endings import verdicts
from pretrain_trainer.logs import set_up_logs
from pretrain_trainer.precision.compile import report_cache
from pretrain_trainer.settings import Place, load_config
from pretrain_trainer.step import fetch, run_step
from pretrain_trainer.supervision import Supervision
from pretrain_trainer.trainer import Trainer, build_trainer
from pretrain_trainer.world import World, joined_world, set_timeouts

logger = logging.getLogger(__name__)


def main(config_path: str) -> None:
    """Train as the configuration says, from wherever the newest checkpoint left off.

    Returns when training is complete and saved. Otherwise raises SystemExit with an
    :class:`ExitCode`, or the error that ended this rank.
    """
    # Signals are as they should be: a forked rank's were reset by the agent before this was called,
    # and plain torchrun starts ranks by exec, which leaves no handlers of the launcher behind.
    place = Place.from_environment(os.environ)
    supervision = Supervision(place)
    set_up_logs(place.rank)
    with verdicts(supervision):
        supervision.enter(Phase.STARTING, 0)
        config = load_config(Path(config_path))
        with joined_world(config, place) as world:
            ordered = run(config, world, supervision)
    if ordered != Order.NONE:
        sys.exit(ExitCode.PREEMPTED)


def run(config: RunConfig, world: World, supervision: Supervision) -> Order:
    """Build, load and train. Returns the order that ended training early, or NONE."""
    trainer = build_trainer(config, world, supervision)
    ordered = Order.NONE
    if config.checkpoint.create_seed_checkpoint:
        trainer.save_seed()
    elif not trainer.resume():
        ordered = train(trainer)
        if ordered == Order.NONE:
            trainer.save(last=True)
    trainer.machine.loader.close()
    if ordered == Order.NONE:
        supervision.enter(Phase.DONE, trainer.state.step)
    return ordered


def train(trainer: Trainer) -> Order:
    """Step until training or data ends, or an order to leave, which is returned."""
    training, state = trainer.config.training, trainer.state
    gc.disable()  # collections at each rank's own whim would make all others wait
    phase = Phase.FIRST_STEP
    trainer.telemetry.start()
    while state.step < training.steps:
        trainer.supervision.enter(Phase.DATA, state.step)
        data = fetch(trainer.machine.loader, trainer.supervision.alive)
        trainer.supervision.enter(phase, state.step)
        order = trainer.supervision.new_order()
        report = run_step(trainer.machine, state, training, order, data)
        if report is None:
            break
        ends = report.last or state.step == training.steps
        leaves = report.agreed.order in (Order.DRAIN, Order.STOP)
        trainer.report(report, last=ends or leaves)
        if phase == Phase.FIRST_STEP:
            # Compiled and connected: from here on they are quick.
            set_timeouts(trainer.world.mesh, trainer.config.comm.train_timeout_seconds)
            report_cache(trainer.config.compile)
            phase = Phase.STEP
        if state.step % training.gc_freq == 0:
            gc.collect(1)
        if report.agreed.order == Order.STOP:
            return Order.STOP
        if ends:
            break
        if trainer.save_due(report.agreed.order):
            trainer.save(must=leaves)
        if leaves:
            return Order.DRAIN
    return Order.NONE


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One rank of a training run, started by torchrun.")
    parser.add_argument("config", help="the run's configuration, JSON")
    main(parser.parse_args().config)
