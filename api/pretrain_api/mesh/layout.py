"""Rules about a model on its mesh: which matrices, sequences and layers can be split how often.

Of a family whose shapes aren't known here (:mod:`pretrain_api.flavors`) only what needs no shape is
checked; the trainer's own checks see the rest.
"""

from collections.abc import Iterator
from math import gcd, lcm

from pretrain_api.config import Compile, Model, Parallelism, Sections
from pretrain_api.flavors import llama3
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_api.mesh.degrees import divisors
from pretrain_api.mesh.pipeline import pipeline_rules
from pretrain_api.mesh.refusal import Broken


def shape_of(model: Model) -> LlamaShape | None:
    """The shape of a configured model; None if the family isn't known here."""
    return llama3.FLAVORS.get(model.flavor) if model.name == "llama3" else None


def largest_tensor_degree(shape: LlamaShape) -> int:
    """Ranks the matrices can be split over at most; every divisor of it will do.

    Each rank has whole heads, of queries as of keys and values, and as many features of the
    feed-forward layer, or of each expert, as the others.
    """
    features = shape.hidden_dim if shape.moe is None else shape.moe.hidden_dim
    return gcd(shape.n_heads, shape.n_kv_heads, features)


def expert_count(shape: LlamaShape) -> int:
    """Experts of a layer, each of which is on one rank of its kind; 0 for a model without."""
    return 0 if shape.moe is None else shape.moe.num_experts


def layout_rules(config: Sections) -> Iterator[Broken]:
    """Broken rules that don't depend on the number of ranks; each assumes those before it hold."""
    parallelism, shape = config.parallelism, shape_of(config.model)
    if shape is not None:
        yield from _shape(parallelism, config.model, shape)
    yield from _async_tensor(parallelism, config.compile)
    yield from _sequence(parallelism, config.training.seq_len)
    layers = shape.n_layers if shape else None
    yield from pipeline_rules(parallelism, config.training.local_batch_size, layers)


def _shape(parallelism: Parallelism, model: Model, shape: LlamaShape) -> Iterator[Broken]:
    tp, most = parallelism.tensor_parallel_degree, largest_tensor_degree(shape)
    if most % tp:
        features = shape.hidden_dim if shape.moe is None else shape.moe.hidden_dim
        wrong = (
            f"{tp} doesn't divide the {shape.n_heads} heads, {shape.n_kv_heads} of keys and "
            f"values, and {features} features of {model.name} {model.flavor}"
        )
        yield Broken("parallelism.tensor_parallel_degree", wrong, divisors(most), near=tp)
    experts = expert_count(shape)
    if experts:
        ep = parallelism.expert_parallel_degree
        if experts % ep:
            wrong = f"{ep} doesn't divide the {experts} experts of {model.name} {model.flavor}"
            yield Broken("parallelism.expert_parallel_degree", wrong, divisors(experts), near=ep)
        return
    for name in ("expert_parallel_degree", "expert_tensor_parallel_degree"):
        degree = getattr(parallelism, name)
        if degree > 1:
            wrong = (
                f"{degree} ranks can't share the experts of {model.name} {model.flavor}, "
                "which has none"
            )
            yield Broken(f"parallelism.{name}", wrong, (1,))


def _async_tensor(parallelism: Parallelism, compiled: Compile) -> Iterator[Broken]:
    key = "parallelism.enable_async_tensor_parallel"
    if not parallelism.enable_async_tensor_parallel:
        return
    if parallelism.tensor_parallel_degree == 1:
        wrong = "there is no communication to overlap at tensor_parallel_degree 1"
        yield Broken(key, wrong, (False,))
    elif not (compiled.enable and "model" in compiled.components):
        wrong = "is the compiler's work, and needs compile.enable with model in compile.components"
        yield Broken(key, wrong, (False,))


def _sequence(parallelism: Parallelism, seq_len: int) -> Iterator[Broken]:
    """Sequences are cut for context parallelism, and a rank's part again between matrices.

    With context parallelism into twice as many pieces as ranks: each gets an early and a late one,
    because a late position attends to more.
    """
    cp, tp = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    pieces = cp * (lcm(tp, 2) if cp > 1 else tp)
    if seq_len % pieces:
        shares = [f"tensor_parallel_degree {tp}"] if tp > 1 else []
        if cp > 1:
            shares.append(f"context_parallel_degree {cp}, in two halves each")
        wrong = f"{seq_len} tokens can't be shared evenly by {' and '.join(shares)}"
        below = seq_len // pieces * pieces
        legal = tuple(n for n in (below, below + pieces) if n > 0)
        yield Broken("training.seq_len", f"{wrong}", legal, near=seq_len)
