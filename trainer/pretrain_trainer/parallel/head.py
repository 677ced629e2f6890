"""Output layer and loss in one piece, so that logits never exist whole.

A sequence of 8,192 tokens has four gigabytes of float32 logits over Llama 3's vocabulary, and the
loss would keep as much again for the backward pass. So positions go through in portions: logits of
a portion, their loss and their gradients are computed together, and only the gradients, which have
the size of the input and of the weight, are kept. Nothing is computed twice.

With tensor parallelism each rank has the logits of its share of the vocabulary, and the loss is
computed from there with three small reductions per portion (loss parallel, torch's own); unless
``parallelism.disable_loss_parallel`` asks to gather them first.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional

from pretrain_api.config import RunConfig
from pretrain_trainer.loss import cross_entropy_sum
from pretrain_trainer.parallel.layout import local
from pretrain_trainer.precision.compile import compile_loss

PORTION_BYTES = 2**30  # of a portion's logits in float32, on one rank

# From [positions, dim], [vocabulary, dim] and int64 [positions] to the sum of losses.
PortionLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def fuse_loss(output: nn.Linear, config: RunConfig, tp: DeviceMesh | None) -> None:
    """Teach an output layer to return the loss, in place, when it is called with labels.

    Called with [batch, tokens, dim] alone it still returns logits. With int64 labels
    [batch, tokens] as well, it returns the sum of cross entropies over valid positions, float32
    scalar, the same on all ranks of ``tp``.
    """
    vocabulary = output.out_features

    def portion_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_sum(functional.linear(x, weight), labels)

    def split_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        assert tp is not None
        logits = _whole_vocabulary(functional.linear(x, weight), tp, vocabulary)
        if config.parallelism.disable_loss_parallel:
            return cross_entropy_sum(logits.full_tensor(), labels)
        return cast(DTensor, cross_entropy_sum(logits, labels)).full_tensor()

    loss = compile_loss(portion_loss, config.compile) if tp is None else split_loss

    def forward(x: Tensor, labels: Tensor | None = None) -> Tensor:
        weight = local(output.weight)
        if isinstance(x, DTensor):  # each rank's gradient comes from its part of the vocabulary
            x = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        if labels is None:
            logits = functional.linear(x, weight)
            return logits if tp is None else _whole_vocabulary(logits, tp, vocabulary).full_tensor()
        with nullcontext() if tp is None else loss_parallel():
            return cast(Tensor, _InPortions.apply(x.flatten(0, 1), weight, labels.flatten(), loss))

    output.forward = forward  # pyright: ignore[reportAttributeAccessIssue]  # takes labels too


class _InPortions(torch.autograd.Function):
    """The loss over all positions, and its gradients, a portion at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, loss: PortionLoss) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        wanted = any(ctx.needs_input_grad)
        size = portion(x.shape[0], weight.shape[0])
        x_grads: list[Tensor] = []
        # A sum over many portions in bfloat16 would lose what the last ones add.
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        for part, targets in zip(x.split(size), labels.split(size), strict=True):
            if weight_grad is None:
                total += loss(part, weight, targets)
                continue
            with torch.enable_grad():
                inputs = (part.detach().requires_grad_(), weight.detach().requires_grad_())
                value = loss(*inputs, targets)
            x_grad, more = torch.autograd.grad(value, inputs)
            x_grads.append(x_grad)
            weight_grad += more
            total += value.detach()
        if weight_grad is not None:
            ctx.save_for_backward(torch.cat(x_grads), weight_grad.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad = ctx.saved_tensors
        return (
            (x_grad * grads[0]).to(x_grad.dtype),
            (weight_grad * grads[0]).to(weight_grad.dtype),
            None,
            None,
        )


def portion(positions: int, vocabulary: int) -> int:
    """Positions that go through at once: as equal portions as :data:`PORTION_BYTES` allows."""
    portions = -(-positions * vocabulary * 4 // PORTION_BYTES)
    return max(1, -(-positions // portions))


def _whole_vocabulary(logits: Tensor, tp: DeviceMesh, vocabulary: int) -> DTensor:
    """A rank's [..., part of the vocabulary] as its share of [..., vocabulary]."""
    shape = torch.Size((*logits.shape[:-1], vocabulary))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        logits, tp, [Shard(logits.dim() - 1)], run_check=False, shape=shape, stride=stride
    )
