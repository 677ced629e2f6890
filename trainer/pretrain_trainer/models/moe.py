"""A mixture of experts: each token goes through a few of many feed-forward layers.

A router scores all experts for a token and the best ``top_k`` take it; none ever turns one down, so
no token is dropped and an expert's rows are as many as they are. All experts are one stacked
parameter, and their products one grouped product over rows that lie in the order of experts.

Experts are kept equally busy without a term in the loss (Wang et al. 2024, "Auxiliary-Loss-Free
Load Balancing Strategy for Mixture-of-Experts", algorithm 1): each expert has a bias that is added
to its scores when experts are chosen, and nowhere else. After a step an expert that had more than
its share sinks by a fixed amount, one that had less rises. The bias is no parameter, but what a
token computes depends on it, so it is in the checkpoint.

Written for one device, as all models are. Where the experts live is put on from the outside
(:mod:`pretrain_trainer.parallel.expert`): rows and counts in, rows out is all that
:class:`Experts` promises.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain_api.flavors.moe import MoeShape
from pretrain_trainer.models.base import Distribution
from pretrain_trainer.models.feed_forward import FeedForward


class Router(nn.Module):
    """Chooses experts for tokens, and says how much each one's answer counts."""

    def __init__(self, dim: int, shape: MoeShape) -> None:
        super().__init__()
        self.shape = shape
        self.round_robin = False  # choose experts in turn instead: for measuring, not for learning
        self.gate = nn.Linear(dim, shape.num_experts, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts of each token.

        Args:
            x: [rows, dim].
            bias: float32 [experts], added to scores for the choice alone.

        Returns:
            float32 [rows, top_k] and int64 [rows, top_k], no expert twice in a row.
        """
        shape = self.shape
        logits = self.gate(x).float()
        scores = logits.sigmoid() if shape.score_func == "sigmoid" else logits.softmax(-1)
        if self.round_robin:
            turns = torch.arange(x.shape[0] * shape.top_k, device=x.device)
            chosen = (turns % shape.num_experts).unflatten(0, (-1, shape.top_k))
        else:
            chosen = (scores + bias).topk(shape.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if shape.route_norm:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * shape.route_scale, chosen


class Experts(nn.Module):
    """All experts, each a SwiGLU, stacked."""

    def __init__(self, dim: int, shape: MoeShape) -> None:
        super().__init__()
        experts, hidden = shape.num_experts, shape.hidden_dim
        self.w1 = nn.Parameter(torch.empty(experts, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(experts, hidden, dim))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Answers of experts to their rows, as :func:`answer` gives them."""
        return answer(rows, counts, self.w1, self.w2, self.w3)


class MoE(nn.Module):
    """Router, experts and what every token goes through besides.

    Attributes:
        expert_bias: float32 [experts], added to scores when experts are chosen.
        pass_load: int64 [experts], rows of each in the last pass.
        step_load: the same of all passes that trained since the biases last moved.
    """

    expert_bias: Tensor
    pass_load: Tensor
    step_load: Tensor

    def __init__(self, dim: int, shape: MoeShape) -> None:
        super().__init__()
        self.shape = shape
        self.router = Router(dim, shape)
        self.experts = Experts(dim, shape)
        shared = shape.num_shared_experts * shape.hidden_dim
        self.shared_experts = FeedForward(dim, shared) if shared else None
        # float32 whatever the parameters are: the steps it takes are a thousandth of it.
        self.register_buffer("expert_bias", torch.empty(shape.num_experts, dtype=torch.float32))
        load = torch.empty(shape.num_experts, dtype=torch.int64)
        self.register_buffer("pass_load", load, persistent=False)
        self.register_buffer("step_load", load.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] to the same."""
        routed = self.routed(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    def routed(self, x: Tensor) -> Tensor:
        """What the chosen experts make of [batch, tokens, dim]: the same shape."""
        rows = x.flatten(0, -2)
        weights, chosen = self.router(rows, self.expert_bias)
        order = chosen.flatten().argsort(stable=True)
        inverse = order.argsort()
        counts = count(chosen.flatten()[order], self.shape.num_experts)
        # Not a sum: a pass that is computed again for its gradients says the same again.
        self.pass_load.copy_(counts)
        answers = self.experts(permute(rows, order, inverse, self.shape.top_k), counts)
        answers = permute(answers, inverse, order).unflatten(0, chosen.shape)
        mixed = (answers.float() * weights.unsqueeze(-1)).sum(1)
        return mixed.type_as(x).view_as(x)

    def init_buffers(self) -> None:
        """No expert is preferred yet, and none had any rows."""
        for buffer in (self.expert_bias, self.pass_load, self.step_load):
            buffer.zero_()

    def idle_parameters(self) -> int:
        """Those of the experts that a token doesn't go to."""
        shape = self.shape
        whole = sum(weight.numel() for weight in self.experts.parameters())
        return whole // shape.num_experts * (shape.num_experts - shape.top_k)

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """Move every expert's bias by one step towards an equal load.

        Args:
            load: integer [experts], rows since the last time, in any unit.
        """
        # In integers, so that the sign is exact and the same on every layout.
        short = torch.sign(load.sum() - load * self.shape.num_experts)
        self.expert_bias.add_(short * self.shape.load_balance_coeff)


def mixtures(model: nn.Module) -> list[MoE]:
    """All mixtures of experts within a model, in its order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def answer(rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """SwiGLU of each row by the expert it lies with.

    Args:
        rows: [rows, dim], those of the first expert first.
        counts: integer [experts], rows of each; they add up to all.
        w1: [experts, hidden, dim].
        w2: [experts, dim, hidden].
        w3: [experts, hidden, dim].

    Returns:
        [rows, dim].
    """
    ends = counts.cumsum(0).to(torch.int32)
    gate = functional.grouped_mm(rows, w1.mT, offs=ends)
    hidden = functional.silu(gate) * functional.grouped_mm(rows, w3.mT, offs=ends)
    return functional.grouped_mm(hidden, w2.mT, offs=ends)


def count(ascending: Tensor, experts: int) -> Tensor:
    """How often each of so many experts occurs in int64 [rows], ascending: int64 [experts].

    Without a histogram, which on a GPU either waits for the device or isn't deterministic.
    """
    each = torch.arange(experts, device=ascending.device)
    ends = torch.searchsorted(ascending, each, right=True)
    return ends.diff(prepend=ends.new_zeros(1))


def permute(rows: Tensor, order: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
    """So many copies of every row, in another order.

    Args:
        rows: [rows, dim].
        order: int64 [rows x copies], a permutation: the copy (row x copies + its number) to take.
        inverse: of the permutation.
        copies: of each row.

    Returns:
        [rows x copies, dim].
    """
    return cast(Tensor, _Permute.apply(rows, order, inverse, copies))


class _Permute(torch.autograd.Function):
    """Autograd would scatter gradients by addition, not knowing that it goes back by reading."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return rows[order // copies] if copies > 1 else rows[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0][inverse]
        if ctx.copies > 1:
            grad = grad.unflatten(0, (-1, ctx.copies)).sum(1)
        return grad, None, None, None


def moe_distributions(
    shape: MoeShape, inner: Distribution, outer: Distribution
) -> dict[str, Distribution]:
    """Initial distributions by name within a :class:`MoE`, as in torchtitan.

    Args:
        shape: says whether experts are shared.
        inner: of the projections that read the stream.
        outer: of those that write into it, and of the router.
    """
    routed = {
        "router.gate.weight": outer,
        "experts.w1": inner,
        **dict.fromkeys(("experts.w2", "experts.w3"), outer),
    }
    shared = {
        "shared_experts.w1.weight": inner,
        **dict.fromkeys(("shared_experts.w2.weight", "shared_experts.w3.weight"), outer),
    }
    return routed | shared if shape.num_shared_experts else routed
