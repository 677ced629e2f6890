"""Attention over split sequences against torch's over whole ones, by mask, number and gradient."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain_api.config import ActivationCheckpoint, RunConfig
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_trainer.data.loader import Microbatch
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.init import initialise
from pretrain_trainer.loss import IGNORED
from pretrain_trainer.models.attention import Documents
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.parallel import context, kernels
from pretrain_trainer.parallel.context import attend_split, backward, forward
from pretrain_trainer.parallel.kernels import Tile
from pretrain_trainer.parallel.line import Fill, Line
from pretrain_trainer.precision.activation_checkpoint import checkpoint_activations
from pretrain_trainer.settings import Place
from pretrain_trainer.supervision import Supervision
from pretrain_trainer.trainer import build_trainer
from pretrain_trainer.world import joined_world

Ranks = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]


class Case(NamedTuple):
    """A whole problem, drawn from a seed."""

    degree: int
    batch: int
    chunk: int
    heads: int
    groups: int
    head_dim: int
    documents: tuple[tuple[int, ...], ...] | None  # numbers of every row
    seed: int

    @property
    def seq_len(self) -> int:
        return self.chunk * (2 * self.degree if self.degree > 1 else 1)

    def place(self, rank: int) -> Tensor:
        """Positions of a rank."""
        return context.own_chunks(torch.arange(self.seq_len), self.degree, rank)

    def ids(self) -> Tensor | None:
        return None if self.documents is None else torch.tensor(self.documents, dtype=torch.int32)

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Query, key, value and the gradient of the output."""
        draw = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.seq_len)
        return tuple(
            torch.randn(*shape, heads, self.head_dim, generator=draw, dtype=torch.float64).to(dtype)
            for heads in (self.heads, self.groups, self.groups, self.heads)
        )

    def visible(self) -> Tensor:
        """Which query sees which key: bool [batch, tokens, tokens]."""
        before = torch.ones(self.seq_len, self.seq_len, dtype=torch.bool).tril()
        ids = self.ids()
        if ids is None:
            return before.expand(self.batch, -1, -1)
        return before & (ids[:, :, None] == ids[:, None, :])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    degree, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    case = Case(
        degree=degree,
        batch=draw(st.integers(1, 3)),
        chunk=draw(st.integers(1, 5)),
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        head_dim=8,
        documents=None,
        seed=draw(st.integers(0, 2**20)),
    )
    if draw(st.booleans()):
        return case
    starts = st.lists(st.booleans(), min_size=case.seq_len, max_size=case.seq_len)
    rows = [tuple(np.cumsum(draw(starts)).tolist()) for _ in range(case.batch)]
    return case._replace(documents=tuple(rows))


def whole_attention(case: Case, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output and the three gradients, by torch's own attention."""
    *inputs, out_grad = tensors
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs)
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=case.visible()[:, None], enable_gqa=True
    ).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, inputs, out_grad)


@dataclass(frozen=True)
class Simulated(Line):
    """All ranks in one process: everybody's keys lie in a table, and so do sums for them."""

    everyone: dict[int, Tensor] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)

    def visit(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield self.rank, own
        yield from ((rank, kv) for rank, kv in self.everyone.items() if rank != self.rank)

    def collect(self, own: Tensor, fill: Fill) -> Tensor:
        for rank, part in self.visit(own):
            fill(rank, part, self.sums[rank])
        return self.sums[self.rank]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 7))
def test_ranks_share_positions_and_work_evenly(degree: int, chunk: int) -> None:
    seq_len = 2 * degree * chunk
    whole = torch.arange(seq_len)
    shares = [context.own_chunks(whole, degree, rank) for rank in range(degree)]
    assert sorted(torch.cat(shares).tolist()) == list(range(seq_len))
    assert all(torch.equal(share, share.sort().values) for share in shares)
    assert len({int((share + 1).sum()) for share in shares}) == 1  # keys seen by all its queries


def within(area: Tensor, tile: Tile, causal: bool) -> Tensor:
    """Of a tile's [rows, queries, keys] what is seen."""
    if not causal:
        return area
    ends = torch.tensor(
        tile.ends or range(area.shape[1], area.shape[:2].numel() + 1, area.shape[1])
    )
    assert ends[-1] == area.shape[:2].numel()
    square = torch.bucketize(torch.arange(int(ends[-1])), ends, right=True).view(area.shape[:2])
    return area.tril() * (square[:, :, None] == square[:, None, :])


@settings(deadline=None)
@given(cases())
def test_tiles_are_exactly_what_is_visible(case: Case) -> None:
    times = torch.zeros(case.batch, case.seq_len, case.seq_len, dtype=torch.int64)
    places = [case.place(r) for r in range(case.degree)]
    for rank, other in itertools.product(range(case.degree), repeat=2):
        line = Simulated(None, rank, case.degree)
        tiles, causal = context.Sight(line, len(places[rank]), case.ids())(other)
        for tile in tiles:
            mine, theirs = places[rank][tile.queries], places[other][tile.keys]
            rows = len(times[tile.rows])
            assert rows * len(mine) * len(theirs)
            area = torch.ones(rows, len(mine), len(theirs), dtype=torch.int64)
            times[tile.rows][:, mine[:, None], theirs] += within(area, tile, causal)
    assert torch.equal(times, case.visible().long())


@settings(deadline=None)
@given(cases())
def test_parts_put_together_are_the_whole(case: Case) -> None:
    tensors = case.tensors()
    expected = whole_attention(case, tensors)
    places = [case.place(r) for r in range(case.degree)]
    shares = [tuple(tensor[:, place] for tensor in tensors) for place in places]
    kvs = {rank: torch.cat(share[1:3], dim=-1) for rank, share in enumerate(shares)}
    sums = {rank: torch.zeros_like(kv) for rank, kv in kvs.items()}
    found = [torch.empty_like(tensor) for tensor in expected]
    for rank, (query, key, value, out_grad) in enumerate(shares):
        line = Simulated(None, rank, case.degree, kvs, sums)
        outputs = forward(query, key, value, case.ids(), line)
        inputs = (query, key, value)
        query_grad, *_ = backward(out_grad, inputs, outputs, case.ids(), line)
        found[0][:, places[rank]], found[1][:, places[rank]] = outputs[0], query_grad
    for rank, total in sums.items():
        found[2][:, places[rank]], found[3][:, places[rank]] = total.chunk(2, dim=-1)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def attend_together(
    values: tuple[Any, ...], rotates: bool, dtype: torch.dtype
) -> tuple[np.ndarray[Any, Any], ...]:
    """This rank's part of output and gradients, through the operator and autograd."""
    import torch.distributed as dist

    case = Case(*values)  # ranks can't import this file by name
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    place = case.place(dist.get_rank())
    *inputs, out_grad = (tensor[:, place] for tensor in case.tensors(dtype))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    core = partial(attend_split, group=group.group_name, rotates=rotates, within=True)
    ids = case.ids()
    if ids is None:
        core = partial(core, within=False)
    out = core(*inputs, ids)
    found = (out.detach(), *torch.autograd.grad(out, inputs, out_grad))
    assert all(tensor.dtype == dtype for tensor in found)
    return tuple(tensor.double().numpy() for tensor in found)


LONG = ((0,) * 20 + (1,) * 44, (0,) * 3 + (1,) * 5 + (2,) * 30 + (3,) * 26)  # of 64 tokens


@pytest.mark.parametrize("rotates", [False, True], ids=["allgather", "alltoall"])
@pytest.mark.parametrize("documents", [None, LONG], ids=["causal", "within documents"])
@pytest.mark.parametrize(
    ("degree", "dtype", "tolerance"),
    [(2, torch.float64, 1e-12), (4, torch.float64, 1e-12), (4, torch.bfloat16, 2e-2)],
)
def test_ranks_attend_together(
    ranks: Ranks,
    degree: int,
    dtype: torch.dtype,
    tolerance: float,
    documents: tuple[tuple[int, ...], ...] | None,
    rotates: bool,
) -> None:
    case = Case(degree, 2, 32 // degree, 4, 2, 16, documents, seed=5)
    expected = whole_attention(case, tuple(t.double() for t in case.tensors(dtype)))
    for rank, found in enumerate(ranks(degree, attend_together, tuple(case), rotates, dtype)):
        place = case.place(rank)
        for ours, theirs in zip(found, expected, strict=True):
            part = theirs[:, place].numpy()
            limit = tolerance * float(np.abs(part).max())
            np.testing.assert_allclose(ours, part, rtol=0, atol=limit)


SHAPE = LlamaShape(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32)
WITHIN = partial(attend_split, group="", rotates=False, within=True)


@pytest.fixture
def model() -> Llama3:
    model = Llama3(SHAPE, seq_len=24)
    initialise(model, 0, torch.device("cpu"))
    for block in model.layers.values():
        block.attention.core = WITHIN
    return model


def batch() -> tuple[Tensor, Documents]:
    ids = torch.tensor([[0] * 9 + [1] * 15, [0] * 20 + [1] * 4], dtype=torch.int32)
    return torch.arange(48).view(2, 24), Documents(ids)


def gradients(model: Llama3) -> list[Tensor]:
    tokens, documents = batch()
    model(tokens, documents=documents).float().logsumexp(-1).mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


class Calls(TorchDispatchMode):
    """Counts calls of the operator."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func == context.SPLIT_ATTENTION
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_costly_attention_is_kept_and_recomputed_exactly(
    model: Llama3, mode: Any, times: int
) -> None:
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    config = ActivationCheckpoint(mode=mode, selective_ac_option="op")
    checkpoint_activations(model, config)
    with Calls() as calls:
        found = gradients(model)
    assert calls.number == times * SHAPE.n_layers
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_blocks_compile_whole(model: Llama3) -> None:
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    for block in model.layers.values():
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_documents_are_needed_to_stay_within_them(model: Llama3) -> None:
    with pytest.raises(ValueError, match="needs to know them"):
        model(torch.arange(24).view(1, 24))


def test_a_number_format_without_a_kernel_is_refused(run_config: MakeConfig, model: Llama3) -> None:
    config = run_config(model={"attn_mask_type": "block_causal"})
    mesh: Any = SimpleNamespace(cp=None, dense=SimpleNamespace(device_type="cuda"))
    with pytest.raises(BadInputError, match=r"mixed_precision_param: .* use bfloat16"):
        context.split(model, config, mesh)


def packed_forward(*args: Any) -> tuple[Tensor, ...]:
    """The flash kernel for packed sequences, as torch documents it, sequence by sequence."""
    query, key, value, q_ends, k_ends, _, _, _, causal, _ = args
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0])
    for q, k in zip(spans(q_ends), spans(k_ends), strict=True):
        parts = (query[None, q], key[None, k], value[None, k])
        seen = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(part.transpose(1, 2) for part in parts), 0.0, causal
        )
        out[q], lse[:, q] = seen[0][0].transpose(0, 1), seen[1][0]
    return out, lse, out, out, out


def packed_backward(*args: Any) -> tuple[Tensor, ...]:
    out_grad, query, key, value, out, lse, q_ends, k_ends, _, _, _, causal, *_ = args
    found = [torch.empty_like(tensor) for tensor in (query, key, value)]
    for q, k in zip(spans(q_ends), spans(k_ends), strict=True):
        parts = (out_grad[None, q], query[None, q], key[None, k], value[None, k], out[None, q])
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(part.transpose(1, 2) for part in parts), lse[None, :, q], 0.0, causal
        )
        for tensor, where, grad in zip(found, (q, k, k), grads, strict=True):
            tensor[where] = grad[0].transpose(0, 1)
    return tuple(found)


def spans(ends: Tensor) -> list[slice]:
    assert ends.dtype == torch.int32
    return [slice(a, b) for a, b in itertools.pairwise(ends.tolist())]


@settings(deadline=None)
@given(cases(), st.data())
def test_packing_for_a_gpu_computes_the_same_tiles(case: Case, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, case.degree - 1))
    other = data.draw(st.integers(0, case.degree - 1))
    line = Simulated(None, rank, case.degree)
    place = case.place(rank)
    query, key, value, out_grad = (tensor[:, place] for tensor in case.tensors())
    tiles, causal = context.Sight(line, len(place), case.ids())(other)
    if not tiles:
        return
    draw = torch.Generator().manual_seed(case.seed)  # a softmax over other keys as well
    lse = torch.rand(query.shape[:-1], generator=draw, dtype=query.dtype).transpose(1, 2) + 3
    outputs = (torch.randn(query.shape, generator=draw, dtype=query.dtype), lse)
    aten = SimpleNamespace(
        _flash_attention_forward=packed_forward, _flash_attention_backward=packed_backward
    )
    expected = kernels.attend(query, key, value, tiles, causal=causal)
    grads = kernels.attend_backward(out_grad, (query, key, value), outputs, tiles, causal=causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "aten", aten)
        packed = kernels._attend_packed(query, key, value, tiles, causal)
        packed_grads = kernels._packed_backward(
            out_grad, (query, key, value), outputs, tiles, causal
        )
    for ours, theirs in zip(packed + packed_grads, expected + grads, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none")
@pytest.mark.parametrize("documents", [None, LONG], ids=["causal", "within documents"])
def test_the_kernel_of_a_gpu(documents: tuple[tuple[int, ...], ...] | None) -> None:
    case = Case(1, 2, 64, 4, 2, 64, documents, seed=5)
    tensors = case.tensors(torch.bfloat16)
    expected = whole_attention(case, tuple(tensor.double() for tensor in tensors))
    *inputs, out_grad = (tensor.cuda() for tensor in tensors)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = attend_split(*inputs, case.ids(), group="", rotates=False, within=documents is not None)
    for ours, theirs in zip(
        (out, *torch.autograd.grad(out, inputs, out_grad)), expected, strict=True
    ):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=2e-2, atol=2e-2)


def of_the_middle_document(config: RunConfig, others: int) -> tuple[list[bytes], list[bytes]]:
    """Logits and gradients of one document, between two that are made of the token ``others``."""
    with joined_world(config, Place.from_environment(os.environ)) as world:
        machine = build_trainer(config, world, Supervision(world.place)).machine
        ids = torch.tensor([[0] * 5 + [1] * 18 + [2] * 9], dtype=torch.int32)
        mine = ids == 1
        tokens = torch.where(mine, torch.arange(32), others)
        labels = torch.where(mine, tokens + 1, IGNORED)
        whole = Microbatch(tokens, labels, torch.zeros_like(ids), ids)
        own = context.own_part(whole, world.mesh)
        documents = Documents(ids)
        logits = machine.parts[0](own.tokens, own.positions, documents=documents)
        machine.parts[0](own.tokens, own.positions, own.labels, documents).backward()
        grads = [
            getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
            for p in machine.parts[0].parameters()
        ]
        seen = logits[own.labels != IGNORED].detach()
        assert any(grad.any() for grad in grads)
        return [seen.numpy().tobytes()], [grad.numpy().tobytes() for grad in grads]


@pytest.mark.parametrize("degree", [1, 2])
def test_other_documents_change_nothing_not_even_bits(
    ranks: Ranks, run_config: MakeConfig, degree: int
) -> None:
    def seen(mask: str, others: int) -> Any:
        config = run_config(
            model={"attn_mask_type": mask},
            parallelism={"context_parallel_degree": degree},
            checkpoint={"enable": False},
        )
        return ranks(degree, of_the_middle_document, config, others)

    assert seen("block_causal", others=40) == seen("block_causal", others=50)
    assert seen("causal", others=40) != seen("causal", others=50)
