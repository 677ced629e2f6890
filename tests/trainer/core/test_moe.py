"""A mixture of experts on one device: what is routed where, computed, and balanced."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pretrain_api.flavors.moe import MoeShape
from pretrain_trainer.models.moe import MoE, answer, count, permute

SHAPE = MoeShape(num_experts=6, top_k=2, hidden_dim=16, route_scale=1.5)
DIM = 8
SUMS: dict[str, Any] = {
    "rtol": 1e-4,
    "atol": 1e-4,
}  # float32 sums of a dozen numbers near 10, in another order


def mixture(shape: MoeShape = SHAPE) -> MoE:
    moe = MoE(DIM, shape)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.5, generator=draw)
    moe.init_buffers()
    return moe


def stream(seed: int = 1, batch: int = 3) -> Tensor:
    return torch.randn(batch, 5, DIM, generator=torch.Generator().manual_seed(seed))


def token_by_token(moe: MoE, x: Tensor) -> Tensor:
    """The definition: every token asks its experts one after another."""
    shape, result = moe.shape, torch.zeros_like(x)
    for place in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])):
        token = x[tuple(place)]
        logits = moe.router.gate(token)
        scores = logits.sigmoid() if shape.score_func == "sigmoid" else logits.softmax(-1)
        chosen = (scores + moe.expert_bias).topk(shape.top_k).indices
        weights = scores[chosen] / (scores[chosen].sum() if shape.route_norm else 1)
        for weight, expert in zip(weights * shape.route_scale, chosen, strict=True):
            w1, w2, w3 = (w[expert] for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3))
            hidden = functional.silu(w1 @ token) * (w3 @ token)
            result[tuple(place)] += weight * (w2 @ hidden)
    return result if moe.shared_experts is None else result + moe.shared_experts(x)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score_func": "softmax"},
        {"route_norm": True},
        {"num_shared_experts": 2},
        {"top_k": 1},
        {"top_k": 6},
    ],
)
def test_a_mixture_is_what_its_tokens_experts_say(changes: dict[str, Any]) -> None:
    moe, x = mixture(dataclasses.replace(SHAPE, **changes)), stream()
    moe.expert_bias.copy_(torch.tensor([0.3, -0.3, 0.0, 0.1, -0.1, 0.2]))
    expected = token_by_token(moe, x)
    wanted = torch.autograd.grad(expected.square().sum(), list(moe.parameters()))
    got = moe(x)
    found = torch.autograd.grad(got.square().sum(), list(moe.parameters()))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(found, wanted, **SUMS)
    assert int(moe.pass_load.sum()) == 15 * moe.shape.top_k  # every token, all its experts


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5), st.sampled_from(["float32", "bfloat16"])
)
def test_grouped_products_are_those_of_each_expert(counts: list[int], dtype: str) -> None:
    draw, experts, kind = torch.Generator().manual_seed(0), len(counts), getattr(torch, dtype)
    shapes = ((experts, 16, DIM), (experts, DIM, 16), (experts, 16, DIM), (sum(counts), DIM))
    tensors = [torch.randn(s, generator=draw).to(kind).requires_grad_() for s in shapes]
    w1, w2, w3, rows = tensors
    got = answer(rows, torch.tensor(counts), w1, w2, w3)
    parts = rows.split(counts)
    expected = torch.cat([
        (functional.silu(part @ w1[i].T) * (part @ w3[i].T)) @ w2[i].T
        for i, part in enumerate(parts)
    ])  # fmt: skip
    loose: dict[str, Any] = {"rtol": 2e-2, "atol": 5e-1} if dtype == "bfloat16" else SUMS
    torch.testing.assert_close(got, expected, **loose)
    found, wanted = (
        torch.autograd.grad(y.float().square().sum(), tensors) for y in (got, expected)
    )
    torch.testing.assert_close(found, wanted, **loose)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_a_permutation_of_copies_goes_back_exactly(rows: int, copies: int, seed: int) -> None:
    order = torch.randperm(rows * copies, generator=torch.Generator().manual_seed(seed))
    inverse = order.argsort()
    x = torch.arange(rows * 2, dtype=torch.float32).view(rows, 2).requires_grad_()
    there = permute(x, order, inverse, copies)
    back = permute(there, inverse, order)
    assert torch.equal(back, x.repeat_interleave(copies, 0))
    weights = torch.arange(rows * copies * 2, dtype=torch.float32).view(-1, 2)
    (grad,) = torch.autograd.grad((back * weights).sum(), x)
    assert torch.equal(grad, weights.unflatten(0, (rows, copies)).sum(1))


@given(st.lists(st.integers(0, 5), max_size=20))
def test_counts(experts: list[int]) -> None:
    found = count(torch.tensor(sorted(experts), dtype=torch.int64), 6)
    assert found.tolist() == [experts.count(n) for n in range(6)]


def test_a_bias_chooses_but_does_not_weigh() -> None:
    moe, x = mixture(dataclasses.replace(SHAPE, top_k=6)), stream()
    plain = moe(x)
    moe.expert_bias.copy_(torch.linspace(-1, 1, 6))
    torch.testing.assert_close(moe(x), plain)  # all are chosen anyway
    one = mixture(dataclasses.replace(SHAPE, top_k=1))
    one.expert_bias[4] = 10.0
    one(x)
    assert one.pass_load.tolist() == [0, 0, 0, 0, 15, 0]


def test_rebalancing_moves_every_bias_by_one_step_towards_the_mean() -> None:
    moe = mixture()
    moe.rebalance(torch.tensor([10, 0, 5, 5, 6, 4]))
    rate = SHAPE.load_balance_coeff
    expected = torch.tensor([-1, 1, 0, 0, -1, 1]) * rate
    assert torch.equal(moe.expert_bias, expected)
    # Counted in other units nothing changes.
    twin = mixture()
    twin.rebalance(2 * torch.tensor([10, 0, 5, 5, 6, 4]))
    assert torch.equal(twin.expert_bias, moe.expert_bias)


def test_rebalancing_makes_experts_equally_busy() -> None:
    moe, x = mixture(dataclasses.replace(SHAPE, load_balance_coeff=0.01)), stream(batch=64)
    moe.expert_bias.copy_(torch.linspace(-0.3, 0.3, 6))
    loads = []
    with torch.no_grad():
        for _ in range(100):
            moe(x)
            loads.append(moe.pass_load.tolist())
            moe.rebalance(moe.pass_load)
    mean = 64 * 5 * 2 / 6
    before, after = (max(abs(n - mean) for n in load) for load in (loads[0], loads[-1]))
    assert before > 0.5 * mean
    assert after < 0.1 * mean


def test_a_forced_balance_takes_experts_in_turn() -> None:
    moe, x = mixture(), stream()
    moe.router.round_robin = True
    moe.expert_bias[0] = 10.0
    moe(x).sum().backward()
    assert moe.pass_load.tolist() == [5] * 6
    weights, chosen = moe.router(x.flatten(0, 1), moe.expert_bias)
    assert chosen[:3].tolist() == [[0, 1], [2, 3], [4, 5]]
    scores = moe.router.gate(x.flatten(0, 1)).sigmoid()
    torch.testing.assert_close(weights, 1.5 * scores.gather(1, chosen))
