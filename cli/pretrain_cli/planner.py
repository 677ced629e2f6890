"""``pretrain plan``: which layouts a run could have on some GPUs, and what each would take."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain_api.config import RunConfig
from pretrain_api.estimate.gpus import GPUS
from pretrain_api.estimate.plan import GIB, Layout, layout, ranked, room
from pretrain_api.estimate.speed import EFFICIENCY
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_api.mesh import MeshError, shape_of
from pretrain_cli.documents import UnreadableError, is_toml, read_toml
from pretrain_cli.local import RefusedError, read_job, validated

_COLUMNS = (
    "pp", "dp_rep", "dp_shard", "cp", "tp", "fits", "peak", "params", "grads", "optim", "activ",
    "logits", "buffers", "tok/s/GPU", "MFU", "bubble",
)  # fmt: skip
_COMPONENTS = ("peak", "parameters", "gradients", "optimizer", "activations", "logits", "buffers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("file", type=Path, metavar="FILE", help="PretrainJob or TOML")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True, help="which GPUs")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="how many")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts (default: 10)")
    parser.add_argument("--output", choices=("table", "json"), default="table", help="form")


def run(options: argparse.Namespace) -> int:
    """Print the layouts; 1 if the file has problems or nothing fits."""
    if options.count < 1 or options.top < 1:
        print("--count and --top: must be at least 1", file=sys.stderr)
        return 2
    try:
        config = load_config(options.file)
    except (RefusedError, UnreadableError) as error:
        print(error, file=sys.stderr)
        return 1
    shape, gpu = shape_of(config.model), GPUS[options.gpu]
    if shape is None:
        message = f"model.name: nothing is known of {config.model.name}; plan knows llama3"
        print(message, file=sys.stderr)
        return 1
    found = ranked(config, shape, gpu, options.count)
    if options.output == "json":
        print(json.dumps([_plain(one) for one in found[: options.top]], indent=2))
    else:
        print(_summary(config, options.gpu, options.count))
        print(table(found[: options.top]))
        print(_as_configured(config, shape, options.gpu, options.count))
    if not any(one.fits for one in found):
        print(_nothing(found, options.count), file=sys.stderr)
        return 1
    return 0


def load_config(path: Path) -> RunConfig:
    """The configuration of a file, of no certain world.

    Raises RefusedError or UnreadableError with what is wrong with the file.
    """
    if is_toml(path):
        return validated(read_toml(path), {})
    job = read_job(path)
    # The job's own would have its batch fixed to that of its number of workers.
    return job.run_config().model_copy(update={"training": job.spec.training})


def table(layouts: list[Layout]) -> str:
    """Rows of layouts in aligned columns, memory in GiB."""
    rows = [_COLUMNS, *map(_row, layouts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _nothing(found: list[Layout], count: int) -> str:
    if not found:
        return f"no layout over {count} ranks is legal with this batch and these sequences"
    return (
        "nothing fits; try activation_checkpoint.mode full, a smaller training.local_batch_size or "
        "more GPUs"
    )


def _row(one: Layout) -> tuple[str, ...]:
    degrees = one.degrees
    sizes = (degrees.pp, degrees.dp_replicate, degrees.dp_shard, degrees.cp, degrees.tp)
    memory = (f"{getattr(one.memory, name) / GIB:.1f}" for name in _COMPONENTS)
    speed = one.speed
    return (
        *map(str, sizes), "yes" if one.fits else "no", *memory,
        f"{speed.tokens_per_second:,.0f}", f"{speed.mfu:.0%}",
        f"{speed.bubble / speed.seconds:.0%}",
    )  # fmt: skip


def _plain(one: Layout) -> dict[str, Any]:
    return {
        "degrees": asdict(one.degrees),
        "fits": one.fits,
        "memoryBytes": {name: getattr(one.memory, name) for name in _COMPONENTS},
        "estimate": {"seconds": one.speed.seconds, **asdict(one.speed)},
    }


def _summary(config: RunConfig, gpu: str, count: int) -> str:
    training, recompute = config.training, config.activation_checkpoint
    option = f" {recompute.selective_ac_option}" if recompute.mode == "selective" else ""
    return (
        f"{config.model.name} {config.model.flavor} on {count} x {gpu} (room for "
        f"{room(GPUS[gpu]) / GIB:.1f} GiB), {training.local_batch_size} sequences of "
        f"{training.seq_len} per rank, recompute {recompute.mode}{option}\n"
        "Memory is that of the fullest rank in GiB; components don't all peak at once. Speed is an "
        f"estimate for ranking:\na roofline at {EFFICIENCY:.0%} of the peak and data sheets' "
        "bandwidths, with nothing lost to data, saves or failures.\n"
    )


def _as_configured(config: RunConfig, shape: LlamaShape, gpu: str, count: int) -> str:
    try:
        one = layout(config, shape, GPUS[gpu], count)
    except MeshError as error:
        return f"\nAs configured it isn't legal on {count} ranks: {error}"
    fits = "fits" if one.fits else "doesn't fit"
    return (
        f"\nAs configured it {fits}: {one.memory.peak / GIB:.1f} GiB, "
        f"{one.speed.tokens_per_second:,.0f} tok/s per GPU"
    )
