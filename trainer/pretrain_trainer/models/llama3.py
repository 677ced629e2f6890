"""Llama 3.1: a decoder of grouped-query attention, rotary positions, SwiGLU and RMSNorm.

Written as mathematics on one device. Sharding, recomputation and compilation are put on from the
outside (:mod:`pretrain_trainer.parallel.parallelize`), block by block, which is why the model is a
dictionary of equal blocks between an embedding and an output. Parameters carry torchtitan's names.
Attention is causal over the packed sequence, as in torchtitan: documents that share a sequence see
their predecessors, unless ``model.attn_mask_type`` keeps them apart.

The rotary table travels from the model into every block as an argument, in float32 even when the
blocks compute in bfloat16: a position of 8,000 has no room in bfloat16's eight bits.
"""

import math
from dataclasses import asdict
from typing import cast

import torch
from torch import Tensor, nn

from pretrain_api.flavors.llama3 import LlamaShape, RopeScaling
from pretrain_api.flavors.moe import MoeShape
from pretrain_trainer.models.attention import Core, Documents, causal
from pretrain_trainer.models.base import Constant, Distribution, LanguageModel, Normal
from pretrain_trainer.models.feed_forward import FeedForward
from pretrain_trainer.models.moe import MoE, mixtures, moe_distributions

STD = 0.02  # of every projection's initial values, before scaling by depth
CUTOFF = 2.0  # absolute, so a hundred standard deviations: torchtitan's default, kept for parity


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Angular frequencies of the rotary pairs, stretched as Llama 3.1 does.

    Wavelengths much shorter than the original context stay, much longer ones are stretched by
    ``scaling.factor``, those between are blended.

    Returns:
        float32 [head_dim / 2], in radians per position.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    context = scaling.original_max_position_embeddings
    turns = context * frequencies / (2 * math.pi)  # full turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def rope_table(positions: int, frequencies: Tensor) -> Tensor:
    """Cosine and sine of every position's rotation: float32 [positions, head_dim / 2, 2]."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring pairs of features by their position's angle.

    Args:
        x: [batch, tokens, heads, head_dim], any float dtype.
        rope: float32 [tokens, head_dim / 2, 2] or [batch, tokens, head_dim / 2, 2].

    Returns:
        Shape and dtype of ``x``; computed in float32.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rope.unsqueeze(-3).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).type_as(x)


class Attention(nn.Module):
    """Attention in which groups of query heads share a key and value head."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.core: Core = causal
        self.head_dim = shape.head_dim
        self.wq = nn.Linear(shape.dim, shape.n_heads * shape.head_dim, bias=False)
        self.wk = nn.Linear(shape.dim, shape.n_kv_heads * shape.head_dim, bias=False)
        self.wv = nn.Linear(shape.dim, shape.n_kv_heads * shape.head_dim, bias=False)
        self.wo = nn.Linear(shape.n_heads * shape.head_dim, shape.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, documents: Tensor | None = None) -> Tensor:
        """[batch, tokens, dim] to the same; ``rope`` as in :func:`rotate`."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.wq, self.wk, self.wv)
        )
        query, key = rotate(query, rope), rotate(key, rope)
        return self.wo(self.core(query, key, value, documents).flatten(-2))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream.

    What feeds forward is called ``moe`` where it is a mixture of experts.
    """

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.has_experts = shape.moe is not None
        if shape.moe is None:
            self.feed_forward = FeedForward(shape.dim, shape.hidden_dim)
        else:
            self.moe = MoE(shape.dim, shape.moe)
        self.attention_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, documents: Tensor | None = None) -> Tensor:
        """[batch, tokens, dim] to the same; ``rope`` as in :func:`rotate`."""
        x = x + self.attention(self.attention_norm(x), rope, documents=documents)
        return x + (self.moe if self.has_experts else self.feed_forward)(self.ffn_norm(x))


class Llama3(LanguageModel):
    """The whole model: tokens in, logits out.

    Args:
        shape: sizes; its ``vocab_size`` must be set.
        seq_len: longest sequence, which is the length of the rotary table.
    """

    def __init__(self, shape: LlamaShape, seq_len: int) -> None:
        super().__init__()
        if shape.vocab_size is None:
            raise ValueError("a model needs a vocabulary size")
        self.shape = shape
        self.seq_len = seq_len
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleDict({str(i): Block(shape) for i in range(shape.n_layers)})
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        # Derived from the shape, so not part of a checkpoint; computed by init_buffers().
        table = torch.empty(seq_len, shape.head_dim // 2, 2, dtype=torch.float32)
        self.register_buffer("rope", table, persistent=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Logits of the next token, or their loss; of a part without output, the stream.

        Args:
            tokens: int64 [batch, tokens]; for a part without embedding the stream, [batch, tokens,
                dim], which ranks of a tensor-parallel group may have split by position.
            positions: integer [tokens] or [batch, tokens]; None counts from 0 in every sequence,
                which is as long as the rotary table where it came as a stream.
            labels: int64 [batch, tokens]; only where the output was taught to make the loss of
                them (:func:`pretrain_trainer.parallel.head.fuse_loss`).
            documents: which of them tokens belong to; attention may stay within them.

        Returns:
            [batch, tokens, vocab_size] in the blocks' dtype; with labels what the output makes of
            them.
        """
        rope = cast(Tensor, self.rope)
        if positions is not None:
            rope = rope[positions]
        elif self.tok_embeddings is not None:  # the length of a stream would tell nothing
            rope = rope[: tokens.shape[1]]
        ids = None if documents is None else documents.ids
        x = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        for block in self.layers.values():
            x = block(x, rope, ids)
        if self.norm is not None:
            x = self.norm(x)
        if self.output is None:
            return x
        return self.output(x) if labels is None else self.output(x, labels)

    def init_buffers(self) -> None:
        """Compute the rotary table and start experts' biases, on whatever device they lie."""
        shape = self.shape
        frequencies = rope_frequencies(shape.head_dim, shape.rope_theta, shape.rope_scaling)
        cast(Tensor, self.rope).copy_(rope_table(self.seq_len, frequencies))
        for moe in mixtures(self):
            moe.init_buffers()

    def distributions(self) -> dict[str, Distribution]:
        """Initial distribution of every parameter, as in torchtitan.

        Projections that write into the stream start smaller the deeper they lie, so that the
        stream's variance doesn't grow with depth.
        """
        width = self.shape.dim**-0.5
        rules: dict[str, Distribution] = {
            "tok_embeddings.weight": Normal(1.0),
            "norm.weight": Constant(1.0),
            "output.weight": Normal(width, cutoff=3 * width),
        }
        for index in range(self.shape.n_layers):
            depth = index + 1 if self.shape.depth_init else self.shape.n_layers
            inner, outer = Normal(STD, CUTOFF), Normal(STD / math.sqrt(2 * depth), CUTOFF)
            rules |= {
                f"layers.{index}.{name}": rule
                for name, rule in {
                    **dict.fromkeys(("attention.wq.weight", "attention.wk.weight"), inner),
                    "attention.wv.weight": inner,
                    "attention.wo.weight": outer,
                    **_onward(self.shape.moe, inner, outer),
                    **dict.fromkeys(("attention_norm.weight", "ffn_norm.weight"), Constant(1.0)),
                }.items()
            }
        return rules

    def meaning(self) -> dict[str, str]:
        """How features divide into heads, the constants of norms and positions, and routing."""
        shape = self.shape
        numbers = {
            "n_heads": shape.n_heads,
            "n_kv_heads": shape.n_kv_heads,
            "norm_eps": shape.norm_eps,
            "rope_theta": shape.rope_theta,
            **{f"rope_scaling.{k}": v for k, v in asdict(shape.rope_scaling).items()},
            **({} if shape.moe is None else {f"moe.{k}": v for k, v in asdict(shape.moe).items()}),
        }
        return {"family": "llama3", **{name: str(number) for name, number in numbers.items()}}

    def costs(self) -> dict[str, int]:
        """Model FLOPs of one trained token by torchtitan's formula, for each unit.

        6 per parameter outside the input embedding (2 forward, 4 backward), and 12 per layer,
        feature and token of the sequence for attention, causality not discounted. Recomputation
        doesn't count, nor do experts that a token doesn't go to.
        """
        attention = 12 * self.shape.n_heads * self.shape.head_dim * self.seq_len
        blocks = {f"layers.{key}": block for key, block in self.layers.items()}
        return {
            "tok_embeddings": 0,
            **{name: _products(block) + attention for name, block in blocks.items()},
            "norm": _products(self.norm),
            "output": _products(self.output),
        }


def _products(module: nn.Module | None) -> int:
    """FLOPs of a module's parameters for one trained token."""
    if module is None:
        return 0
    idle = sum(moe.idle_parameters() for moe in mixtures(module))
    return 6 * (sum(p.numel() for p in module.parameters()) - idle)


def _onward(
    moe: MoeShape | None, inner: Distribution, outer: Distribution
) -> dict[str, Distribution]:
    """Initial distributions of what feeds forward in a block, by name within the block."""
    if moe is not None:
        return {f"moe.{name}": rule for name, rule in moe_distributions(moe, inner, outer).items()}
    return {
        "feed_forward.w1.weight": inner,
        **dict.fromkeys(("feed_forward.w2.weight", "feed_forward.w3.weight"), outer),
    }
