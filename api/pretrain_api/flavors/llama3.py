"""Llama 3.1: the published sizes and some that fit a laptop.

The numbers are the architecture of the published weights; the debug sizes follow torchtitan's
habit of a family having a tiny twin with the same structure. Debug flavors have no vocabulary of
their own: they take the tokenizer's, so that any tokenizer can be tried with them.
"""

from dataclasses import dataclass
from types import MappingProxyType

from pretrain_api.flavors.moe import MoeShape


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3.1's stretching of low rotary frequencies, which makes long contexts usable."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Everything that fixes the parameters of a Llama 3 and their meaning."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None = 128_256  # None: the tokenizer's
    ffn_dim_multiplier: float | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_seq_len: int = 131_072
    depth_init: bool = True  # initial scale of a block's outputs by its own depth
    moe: MoeShape | None = None  # experts in place of every block's feed-forward layer

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer: two thirds of 4 x dim, stretched, rounded up."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of


FLAVORS = MappingProxyType(
    {
        # Seconds per hundred steps on one CPU core: for tests.
        "tiny": LlamaShape(
            dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=None, multiple_of=32
        ),
        # The same with enough layers for several stages on each rank of a pipeline.
        "tiny8": LlamaShape(
            dim=32, n_layers=8, n_heads=4, n_kv_heads=2, vocab_size=None, multiple_of=32
        ),
        # No published model: what experts do to a layout, tried on the same tiny blocks.
        "tiny_moe": LlamaShape(
            dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=None,
            moe=MoeShape(
                num_experts=4, top_k=2, hidden_dim=32, num_shared_experts=1, route_norm=True,
            ),
        ),
        "debugmodel": LlamaShape(
            dim=256, n_layers=6, n_heads=16, n_kv_heads=16, vocab_size=None
        ),
        "8B": LlamaShape(
            dim=4096, n_layers=32, n_heads=32, n_kv_heads=8,
            ffn_dim_multiplier=1.3, multiple_of=1024,
        ),
        "70B": LlamaShape(
            dim=8192, n_layers=80, n_heads=64, n_kv_heads=8,
            ffn_dim_multiplier=1.3, multiple_of=4096,
        ),
        "405B": LlamaShape(
            dim=16384, n_layers=126, n_heads=128, n_kv_heads=8,
            ffn_dim_multiplier=1.2, multiple_of=4096,
        ),
    }
)  # fmt: skip
