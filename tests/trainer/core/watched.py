"""What ranks of the matrix do: train under observation, and copy checkpoints."""

import os
from typing import Any

import numpy as np
import pytest

from pretrain_api.config import RunConfig
from pretrain_api.wire import Order
from pretrain_trainer import step as step_module
from pretrain_trainer.alive import unwatched
from pretrain_trainer.models.base import named_parameters
from pretrain_trainer.precision import float8
from pretrain_trainer.settings import Place
from pretrain_trainer.supervision import Supervision
from pretrain_trainer.trainer import build_trainer, open_checkpoints
from pretrain_trainer.world import joined_world

Array = np.ndarray[Any, np.dtype[np.float32]]


def watched_steps(config: RunConfig) -> tuple[dict[str, Array], list[float]]:
    """Take all steps: the first one's gradients before clipping, whole; and this rank's losses."""
    gradients, losses, _ = watched_run(config)
    return gradients, losses


def watched_run(config: RunConfig) -> tuple[dict[str, Array], list[float], list[float]]:
    """The same, and the norm of all gradients in every step."""
    with joined_world(config, Place.from_environment(os.environ)) as world:
        trainer = build_trainer(config, world, Supervision(world.place))
        machine = trainer.machine
        gradients: dict[str, Array] = {}
        clip = step_module.clip_gradients

        def look(parts: Any, *rest: Any) -> float:
            if trainer.state.step == 0:
                for name, parameter in named_parameters(parts):
                    whole = getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)()
                    gradients[name] = whole.cpu().numpy().copy()
            return clip(parts, *rest)

        losses, norms = [], []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_module, "clip_gradients", look)
            for _ in range(config.training.steps):
                data = step_module.fetch(machine.loader, unwatched)
                report = step_module.run_step(
                    machine, trainer.state, config.training, Order.NONE, data
                )
                assert report is not None
                losses.append(float(report.loss))
                norms.append(float(report.grad_norm))
        machine.loader.close()
        # Ranks that hold the same parameters would send the same again.
        sends = world.mesh.at[1:] == (0, 0, 0, 0)
        return gradients if sends else {}, losses, norms


def watched_steps_in_real_float8(config: RunConfig) -> tuple[dict[str, Array], list[float]]:
    """The same on a CPU with the products that are refused there, because they are slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float8, "require_capability", lambda *_: None)
        return watched_steps(config)


def copy_checkpoint(config: RunConfig, target: RunConfig) -> None:
    """Load the newest checkpoint into this layout, and save what is in memory elsewhere."""
    with joined_world(config, Place.from_environment(os.environ)) as world:
        trainer = build_trainer(config, world, Supervision(world.place))
        trainer.resume()
        trainer.checkpoints = open_checkpoints(target, world.place, {}, world.control)
        trainer.save()
        trainer.machine.loader.close()
