"""The shortest time a training step could take, from what this device was measured to do.

A data sheet's peak is reached by no product of real numbers, so a fraction of it says little about
the trainer. Here every distinct product of the model is timed alone, on random numbers, as are
attention and a copy; a step can't be faster than their sum (the parts of a step hardly overlap on
one device). What is left out makes the floor lower than the truth: launches, the loss's softmax,
clipping.

The model's step on T tokens: for each layer its seven products and for the output one more, each
forward and twice backward (once for the input, once for the weight); causal attention forward and
backward; the elementwise work as bytes; AdamW as bytes.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pretrain_api.flavors.llama3 import LlamaShape

REPEATS = 20
# Bytes that AdamW moves per parameter: reads weight, gradient and two moments, writes all but the
# gradient; float32.
OPTIMIZER_BYTES = 28


class Product(NamedTuple):
    """A matrix product [m, k] x [k, n], and how often a step has it."""

    m: int
    k: int
    n: int
    times: int

    @property
    def flops(self) -> int:
        """Of all of them."""
        return 2 * self.m * self.k * self.n * self.times


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that a step takes at least, by what takes them."""

    products: float
    attention: float
    elementwise: float
    optimizer: float

    @property
    def total(self) -> float:
        """Of the whole step."""
        return self.products + self.attention + self.elementwise + self.optimizer


def products(shape: LlamaShape, vocabulary: int, tokens: int) -> Iterator[Product]:
    """All products of a step: forward, for the input's gradient and for the weight's."""
    heads, kv_heads = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    layers = shape.n_layers
    matrices = [
        (shape.dim, heads, layers),  # wq
        (shape.dim, kv_heads, 2 * layers),  # wk, wv
        (heads, shape.dim, layers),  # wo
        (shape.dim, shape.hidden_dim, 2 * layers),  # w1, w3
        (shape.hidden_dim, shape.dim, layers),  # w2
        (shape.dim, vocabulary, 1),  # output
    ]
    for rows, columns, count in matrices:
        yield Product(tokens, rows, columns, count)
        yield Product(tokens, columns, rows, count)
        yield Product(columns, tokens, rows, count)


def elementwise_bytes(shape: LlamaShape, tokens: int, width: int = 2) -> int:
    """Bytes that elementwise work moves at least, if every chain of it is one kernel.

    Per layer and token, forward: two norms read and write the stream, two sums read two streams and
    write one (10 dim); rotation reads and writes queries and keys; SwiGLU reads two and writes one
    hidden vector. The backward pass moves about twice that: each also reads what it saved.

    Args:
        shape: of the model.
        tokens: in the step.
        width: bytes of an element.
    """
    rotated = (shape.n_heads + shape.n_kv_heads) * shape.head_dim
    forward = 10 * shape.dim + 2 * rotated + 3 * shape.hidden_dim
    return 3 * forward * shape.n_layers * tokens * width


def floor(
    shape: LlamaShape, vocabulary: int, batch: int, seq_len: int, parameters: int, on: torch.device
) -> Floor:
    """Measure the parts alone and add them up, for bfloat16 without recomputation."""
    tokens = batch * seq_len
    bandwidth = copy_bandwidth(on)
    return Floor(
        products=sum(p.times * product_seconds(p, on) for p in products(shape, vocabulary, tokens)),
        attention=shape.n_layers * attention_seconds(shape, batch, seq_len, on),
        elementwise=elementwise_bytes(shape, tokens) / bandwidth,
        optimizer=OPTIMIZER_BYTES * parameters / bandwidth,
    )


def product_seconds(product: Product, device: torch.device) -> float:
    """One such product in bfloat16. Random numbers: zeros would draw less power and run faster."""
    left = torch.randn(product.m, product.k, dtype=torch.bfloat16, device=device)
    right = torch.randn(product.n, product.k, dtype=torch.bfloat16, device=device)
    return seconds(lambda: left @ right.t(), device)


def attention_seconds(shape: LlamaShape, batch: int, seq_len: int, device: torch.device) -> float:
    """Causal attention of one layer, forward and backward, in bfloat16."""

    def heads(count: int) -> Tensor:
        size = (batch, count, seq_len, shape.head_dim)
        return torch.randn(size, dtype=torch.bfloat16, device=device, requires_grad=True)

    query, key, value = heads(shape.n_heads), heads(shape.n_kv_heads), heads(shape.n_kv_heads)
    direction = torch.randn_like(query)

    def both() -> None:
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=shape.n_heads != shape.n_kv_heads
        )
        torch.autograd.grad(out, (query, key, value), direction)

    return seconds(both, device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy on the device, reads and writes both counted."""
    size = 2**30 if device.type == "cuda" else 2**26  # beyond any cache
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of ``work`` on the device, once warm."""
    taken = []
    for number in range(REPEATS + 3):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        if number >= 3:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
