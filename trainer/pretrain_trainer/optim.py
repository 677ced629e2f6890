"""Optimizer and learning rate.

The learning rate is a function of the step and nothing else: no scheduler object, no state, nothing
to restore. The optimizer's own state is allocated here, before the first step, so that memory has
its full size at once and a checkpoint has something to load into.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pretrain_api.config import LRScheduler, Optimizer
from pretrain_trainer.models.base import named_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of Adam's two moments


def build_optimizer(parts: Iterable[nn.Module], config: Optimizer) -> torch.optim.Optimizer:
    """AdamW over all parameters, as torchtitan has it: norms are decayed as well."""
    parameters = [parameter for _, parameter in named_parameters(parts)]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )
    for parameter in parameters:
        # Adam wants its step count beside the parameter when fused, and on the host otherwise.
        place = parameter.device if config.implementation == "fused" else torch.device("cpu")
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=place),
            **{name: torch.zeros_like(parameter) for name in MOMENTS},
        }
    return optimizer


@torch.no_grad()
def reset_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Give step counts and moments their initial values, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def optimizer_state(
    parts: Iterable[nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The optimizer's live state, flat, keyed by parameter name: ``state.<name>.exp_avg`` etc.

    Loading into these tensors restores the optimizer. Hyperparameters are not state: they come from
    the configuration.
    """
    return {
        f"state.{name}.{key}": value
        for name, parameter in named_parameters(parts)
        for key, value in optimizer.state[parameter].items()
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use ``rate`` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def schedule(config: LRScheduler, steps: int) -> Callable[[int], float]:
    """The factor on the learning rate as a function of the step about to be taken, from 0.

    Linear warmup over ``warmup_steps``, then a stretch of 1, then a decay that would reach
    ``min_lr_factor`` at step ``steps``. With ``decay_ratio`` the decay takes that share of all
    steps, at the end (warmup, stable, decay); unset, it takes all that warmup leaves.
    """
    warmup = min(config.warmup_steps, steps)
    if config.decay_ratio is None:
        decay = steps - warmup
    else:
        decay = min(round(steps * config.decay_ratio), steps - warmup)
    stable_until = steps - decay
    shape = SHAPES[config.decay_type]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if step < stable_until:
            return 1.0
        progress = min(1.0, (step - stable_until) / max(1, decay))
        return config.min_lr_factor + (1 - config.min_lr_factor) * shape(progress)

    return factor


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
