"""torch.compile for what runs most: every block, and the loss.

Blocks are compiled one by one, as whole graphs. Equal blocks share one compilation, so its time
doesn't grow with depth, and FSDP's gathering between blocks stays outside of the graphs.

What was compiled is kept beside the run's output, so a restart loads it in seconds instead of
compiling it in minutes, on another node as well. Entries are named by a digest of what they were
made from, versions of torch and hardware included, and appear by renaming, so any number of ranks
may share the folder. It holds code that ranks run, so each job has a folder of its own: code that
somebody left on a volume before is not picked up.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from pretrain_api.config import ActivationCheckpoint, Compile, RunConfig
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.base import LanguageModel

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., object])

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch reads it whenever it compiles
CACHE_FOLDER = "compile_cache"
PARETO_FOLDER = "memory_budget_pareto"


def set_up_compiler(config: RunConfig, job_uid: str) -> None:
    """Say where compiled code is kept and how much memory it may use. Before anything is compiled.

    Whoever set the cache's variable already, as a user may in the pod template, has decided.

    Raises:
        BadInputError: a drawing is asked for that can't be made here.
    """
    output = Path(config.job.dump_folder)
    plan_memory(config.activation_checkpoint, output / PARETO_FOLDER)
    if config.compile.enable and not cache_chosen():
        folder = output / CACHE_FOLDER / (job_uid or "local")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            logger.warning("%s: compiled code is not kept there: %s", folder, error.strerror)
        else:
            os.environ[CACHE_VARIABLE] = str(folder.absolute())


def cache_chosen() -> bool:
    """Whether somebody set the variable. torch does too, to its default, when it is imported."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return os.environ.get(CACHE_VARIABLE) not in (None, os.path.abspath(default_cache_dir()))


def plan_memory(config: ActivationCheckpoint, drawings: Path) -> None:
    """Give the compiler its budget of memory, or all it wants without mode memory_budget."""
    from torch._functorch import config as functorch

    budgeted = config.mode == "memory_budget"
    draws = budgeted and config.visualize_memory_budget_pareto
    if draws:
        try:
            import matplotlib as mpl
        except ImportError as error:
            raise BadInputError(
                "activation_checkpoint.visualize_memory_budget_pareto: is drawn with matplotlib, "
                "which is not installed; install it or leave the key at false"
            ) from error
        mpl.use("Agg")  # there is no screen
    functorch.activation_memory_budget = config.memory_budget if budgeted else 1.0
    functorch.visualize_memory_budget_pareto = draws
    functorch.memory_budget_pareto_dir = str(drawings)


def compile_blocks(model: LanguageModel, config: Compile, *, whole: bool = True) -> None:
    """Compile the blocks of ``model`` in place, if ``config`` names them.

    Args:
        model: parallelised.
        config: says whether and how.
        whole: each must be a single graph, which it can't be where tokens travel to experts.
    """
    if config.enable and "model" in config.components:
        for block in model.layers.values():
            block.forward = torch.compile(block.forward, backend=config.backend, fullgraph=whole)


def compile_loss(loss: Function, config: Compile) -> Function:
    """The loss, compiled if ``config`` names it."""
    if config.enable and "loss" in config.components:
        return torch.compile(loss, backend=config.backend)  # pyright: ignore[reportReturnType]  # same call signature
    return loss


def report_cache(config: Compile) -> None:
    """Log how much of what was compiled until now came from the cache."""
    if config.enable:
        from torch._dynamo.utils import counters

        known, new = (counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))
        logger.info(
            "compiled graphs: %d from the cache, %d new", known, new,
            extra={"fields": {"compiled_from_cache": known, "compiled_new": new}},
        )  # fmt: skip
