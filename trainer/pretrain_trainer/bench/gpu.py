"""Tokens per second, MFU and the share of the measured roofline, of real steps on one device.

``python -m pretrain_trainer.bench.gpu`` (``make bench-gpu``) trains a Llama 3 of full width, with
as many layers as fit, by the trainer's own code: loader, step, optimizer. Each variant gets a row
beside torchtitan's published figure for it. On a machine without a GPU it takes what it has, which
shows that it runs and little else: choose a small flavor there.

Rates are also given as those of the whole model, by the FLOPs of a token. MFU is torchtitan's
(causality not discounted); ``causal`` counts attention by half, as NVIDIA's figures do.
"""

import argparse
import dataclasses
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain_api.config import Model, RunConfig
from pretrain_api.estimate.gpus import peak_flops
from pretrain_api.estimate.plan import DEBUG_VOCABULARY
from pretrain_api.flavors.llama3 import FLAVORS, LlamaShape
from pretrain_api.wire import Order
from pretrain_trainer.alive import unwatched
from pretrain_trainer.bench.roofline import Floor, floor, synchronize
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.models.registry import FAMILIES
from pretrain_trainer.precision.compile import CACHE_VARIABLE
from pretrain_trainer.settings import Place
from pretrain_trainer.step import fetch, run_step
from pretrain_trainer.supervision import Supervision
from pretrain_trainer.telemetry import mfu
from pretrain_trainer.trainer import build_trainer
from pretrain_trainer.world import joined_world

FAMILY = "llama3_cut"  # Llama 3 with fewer layers, known to this process alone
STATE_BYTES = 16  # per parameter: weight, gradient and two moments, float32
STATE_SHARE = 0.6  # of the device's memory, when layers are chosen; the rest is for activations

Sections = dict[str, dict[str, Any]]

COMPILE: Sections = {"compile": {"enable": True}}
FLOAT8: Sections = {"model": {"converters": ["quantize.linear.float8"]}, **COMPILE}
SELECTIVE: Sections = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
NO_AC: Sections = {"activation_checkpoint": {"mode": "none"}}
FULL: Sections = {"activation_checkpoint": {"mode": "full"}}


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to train, and what torchtitan publishes for it: tokens/s per GPU of the whole 8B."""

    name: str
    sections: Sections
    published: str = ""
    whole: bool = False  # all layers, though memory is tight


VARIANTS = (
    Variant("bf16, selective AC", SELECTIVE, "5,762 (8 H100)"),
    Variant("bf16, selective AC, compile", SELECTIVE | COMPILE, "6,667 (8 H100)"),
    Variant("bf16, no AC, compile", NO_AC | COMPILE),
    Variant("float8, selective AC, compile", SELECTIVE | FLOAT8, "8,532 (8 H100), 10,938 (H200)"),
    Variant("bf16, full AC, compile, whole", FULL | COMPILE, whole=True),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a variant did."""

    seconds: float  # median of a step
    memory: int  # bytes, the most that was reserved
    loss: float  # of the last step: not finite would make the rest worthless


@dataclass(frozen=True, slots=True)
class Work:
    """What a step is made of."""

    shape: LlamaShape  # as cut
    vocabulary: int
    batch: int
    seq_len: int
    parameters: int
    flops: int  # per token, torchtitan's
    whole_flops: int  # the same of all layers

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.seq_len

    @property
    def causal_flops(self) -> int:
        """Per token, with attention counted by half."""
        features = self.shape.n_heads * self.shape.head_dim
        return self.flops - 6 * self.shape.n_layers * features * self.seq_len


def row(name: str, work: Work, floor: Floor, outcome: Outcome, peak: float | None) -> list[str]:
    """One row of the table."""
    rate = work.tokens / outcome.seconds
    ratios = [mfu(rate, flops, peak) for flops in (work.flops, work.causal_flops)]
    return [
        name,
        str(work.shape.n_layers),
        f"{outcome.seconds:.3f}",
        f"{rate:,.0f}",
        f"{rate * work.flops / work.whole_flops:,.0f}",
        *("-" if ratio is None else f"{ratio:.1%}" for ratio in ratios),
        f"{floor.total / outcome.seconds:.0%}",
        f"{outcome.memory / 2**30:.1f}",
    ]


HEADINGS = ["variant", "layers", "s/step", "tok/s", "as whole model", "MFU", "causal MFU"]
HEADINGS += ["of roofline", "GiB", "torchtitan, tok/s"]


def table(rows: list[list[str]]) -> str:
    """Rows with the columns of :data:`HEADINGS`, as Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def layers_that_fit(shape: LlamaShape, vocabulary: int, memory: int) -> int:
    """How many layers leave room for activations; at least 1, at most all."""

    def parameters(layers: int) -> int:
        return count_parameters(dataclasses.replace(shape, n_layers=layers), vocabulary)

    outside, both = parameters(1), parameters(2)
    room = int(memory * STATE_SHARE / STATE_BYTES) - outside
    return max(1, min(shape.n_layers, 1 + room // (both - outside)))


def count_parameters(shape: LlamaShape, vocabulary: int) -> int:
    """Of a model with this shape."""
    with torch.device("meta"):
        model = Llama3(dataclasses.replace(shape, vocab_size=vocabulary), seq_len=1)
    return sum(parameter.numel() for parameter in model.parameters())


def describe(shape: LlamaShape, whole: LlamaShape, vocabulary: int, options: Any) -> Work:
    """The work of a step of this shape."""

    def flops(of: LlamaShape) -> int:
        with torch.device("meta"):
            model = Llama3(dataclasses.replace(of, vocab_size=vocabulary), options.seq_len)
        return model.flops_per_token()

    parameters = count_parameters(shape, vocabulary)
    batch, seq_len = options.batch, options.seq_len
    return Work(shape, vocabulary, batch, seq_len, parameters, flops(shape), flops(whole))


@contextmanager
def cut_family(shape: LlamaShape) -> Iterator[None]:
    """Let the configuration name a Llama 3 of this shape."""

    def build(flavor: str, vocab_size: int, seq_len: int) -> Llama3:
        size = shape.vocab_size or vocab_size
        return Llama3(dataclasses.replace(shape, vocab_size=size), seq_len)

    FAMILIES[FAMILY] = build
    try:
        yield
    finally:
        del FAMILIES[FAMILY]


def configuration(variant: Variant, options: Any, folder: Path) -> RunConfig:
    """The run of a variant: real documents, no checkpoints, one report."""
    base: Sections = {
        "job": {"dump_folder": str(folder)},
        "model": {"name": FAMILY, "flavor": options.flavor, "hf_assets_path": options.tokenizer},
        "training": {
            "dataset": "jsonl",
            "dataset_path": str(folder / "documents.jsonl"),
            "local_batch_size": options.batch,
            "seq_len": options.seq_len,
            "steps": options.warm + options.steps,
        },
        "checkpoint": {"enable": False},
    }
    names = {*base, *variant.sections}
    return RunConfig.model_validate(
        {name: {**base.get(name, {}), **variant.sections.get(name, {})} for name in names}
    )


def measure(config: RunConfig, warm: int, steps: int) -> Outcome:
    """Take all steps; the first ``warm`` ones aren't counted."""
    with joined_world(config, Place()) as world:
        device = world.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer = build_trainer(config, world, Supervision(world.place))
        taken, loss = [], float("nan")
        for _ in range(warm + steps):
            data = fetch(trainer.machine.loader, unwatched)
            synchronize(device)
            started = time.perf_counter()
            report = run_step(trainer.machine, trainer.state, config.training, Order.NONE, data)
            synchronize(device)
            taken.append(time.perf_counter() - started)
            assert report is not None, "the data repeats for ever"
            loss = float(report.loss)
        trainer.machine.loader.close()
        memory = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
        return Outcome(statistics.median(taken[warm:]), memory, loss)


def write_documents(path: Path, words: int) -> None:
    """Documents of random words, enough for a few steps; the loader repeats them."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(5000)]
    with path.open("w") as file:
        for _ in range(-(-words // 500)):
            file.write(json.dumps({"text": " ".join(draw.choices(vocabulary, k=500))}) + "\n")


def run(options: Any, say: Callable[[str], None] = print) -> int:
    """Measure what the options ask for and print the table; the number of failed variants."""
    whole = FLAVORS[options.flavor]
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    # Without a GPU memory is no question: the flavor is small.
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 2**40
    say(f"{name}, torch {torch.__version__}, {options.flavor}, sequences of {options.seq_len}")
    vocabulary = whole.vocab_size or DEBUG_VOCABULARY
    fitting = options.layers or layers_that_fit(whole, vocabulary, memory)
    floors: dict[int, Floor] = {}
    rows, failed = [], 0
    cache = os.environ.get(CACHE_VARIABLE)
    for variant in VARIANTS:
        if not variant.name.startswith(options.only):
            continue
        layers = whole.n_layers if variant.whole else fitting
        shape = dataclasses.replace(whole, n_layers=layers)
        work = describe(shape, whole, vocabulary, options)
        try:
            if layers not in floors:
                floors[layers] = floor(
                    shape, vocabulary, work.batch, work.seq_len, work.parameters, device
                )
                release(device, cache)
            with tempfile.TemporaryDirectory() as folder, cut_family(shape):
                write_documents(Path(folder) / "documents.jsonl", 4 * work.tokens)
                config = configuration(variant, options, Path(folder))
                outcome = measure(config, options.warm, options.steps)
        except Exception as error:  # whatever it is, the other variants are worth their table
            if not isinstance(error, BadInputError | torch.OutOfMemoryError):
                traceback.print_exc()
            failed += 1
            words = str(error).split("\n")[0] or type(error).__name__
            rows.append([variant.name, str(layers), *["-"] * 7, words])
            continue
        finally:
            release(device, cache)
        say(f"{variant.name}: {outcome.seconds:.3f} s per step, loss {outcome.loss:.3f}")
        published = variant.published if options.flavor == "8B" else ""
        numbers = row(variant.name, work, floors[layers], outcome, peak_flops(name))
        rows.append([*numbers, published])
    say(table(rows))
    for layers, parts in floors.items():
        shares = ", ".join(
            f"{key} {value:.3f} s" for key, value in dataclasses.asdict(parts).items()
        )
        say(f"floor with {layers} layers: {parts.total:.3f} s per step ({shares})")
    return failed


def release(device: torch.device, cache: str | None) -> None:
    """Forget a variant's model, its memory, and its compiled code with the folder it was in."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.compiler.reset()
    if cache is None:
        os.environ.pop(CACHE_VARIABLE, None)
    else:
        os.environ[CACHE_VARIABLE] = cache
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a variant could not run."""
    parser = argparse.ArgumentParser(prog="bench-gpu", description="Measure training steps.")
    parser.add_argument("--flavor", choices=list(FLAVORS), default="8B")
    parser.add_argument("--layers", type=int, help="instead of as many as fit")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1, help="sequences per step (default: 1)")
    parser.add_argument("--warm", type=int, default=20, help="steps before (default: 20)")
    parser.add_argument("--steps", type=int, default=50, help="steps to take (default: 50)")
    parser.add_argument("--only", default="", metavar="NAME", help="variants that begin like this")
    parser.add_argument("--tokenizer", default=Model().hf_assets_path, metavar="FOLDER")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return 1 if run(parser.parse_args(arguments)) else 0


if __name__ == "__main__":
    sys.exit(main())
