"""The model against an independent implementation, and its shapes against the published ones."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pretrain_api.config import Model
from pretrain_api.flavors.llama3 import LlamaShape, RopeScaling
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.models.registry import build_model

SHAPE = LlamaShape(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=96,
    multiple_of=32,
    rope_theta=10_000.0,
    # An original context this short makes the test see stretched, blended and kept frequencies.
    rope_scaling=RopeScaling(original_max_position_embeddings=64),
)


def halves_first(weight: Tensor, heads: int) -> Tensor:
    """Rows for a rotation of pairs (i, i + d/2) reordered for one of pairs (2i, 2i + 1)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def from_transformers(source: dict[str, Tensor], shape: LlamaShape) -> dict[str, Tensor]:
    result = {
        "tok_embeddings.weight": source["model.embed_tokens.weight"],
        "norm.weight": source["model.norm.weight"],
        "output.weight": source["lm_head.weight"],
    }
    names = {
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for i in range(shape.n_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        for our_name, their_name in names.items():
            result[f"{ours}.{our_name}.weight"] = source[f"{theirs}.{their_name}.weight"]
        for letter, heads in (("q", shape.n_heads), ("k", shape.n_kv_heads)):
            weight = source[f"{theirs}.self_attn.{letter}_proj.weight"]
            result[f"{ours}.attention.w{letter}.weight"] = halves_first(weight, heads)
    return result


def reference(shape: LlamaShape) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden_dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        rms_norm_eps=shape.norm_eps,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": shape.rope_theta,
            **dataclasses.asdict(shape.rope_scaling),
        },
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_logits_equal_those_of_transformers() -> None:
    theirs, ours = reference(SHAPE), Llama3(SHAPE, seq_len=128)
    ours.load_state_dict(from_transformers(theirs.state_dict(), SHAPE))
    ours.init_buffers()
    tokens = torch.randint(0, 96, (2, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_given_positions_count_for_rotation() -> None:
    model = Llama3(SHAPE, seq_len=16)
    model.init_buffers()
    tokens = torch.arange(16).expand(2, 16)
    shifted = torch.arange(16).flip(0).expand(2, 16)
    with torch.no_grad():
        plain = model(tokens)
        assert torch.equal(model(tokens, torch.arange(16).expand(2, 16)), plain)
        assert not torch.allclose(model(tokens, shifted), plain)


@pytest.mark.parametrize(
    ("flavor", "parameters"),
    [("8B", 8_030_261_248), ("70B", 70_553_706_496), ("405B", 405_853_388_800)],
)
def test_published_sizes(flavor: str, parameters: int) -> None:
    model = build_model(Model(flavor=flavor), 128_256, 8192, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_flops_formula_counts_what_a_flop_counter_counts() -> None:
    model = Llama3(SHAPE, seq_len=64)
    model.init_buffers()
    tokens = torch.zeros(3, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    # The formula counts norms as if they were matrices; a flop counter counts only products.
    expected = (model.flops_per_token() - 6 * norms) * tokens.numel()
    counted = counter.get_total_flops()
    # The flash backward recomputes the scores: 5 products where the formula has 4.
    recomputed = 2 * SHAPE.n_layers * SHAPE.n_heads * SHAPE.head_dim * 64 * tokens.numel()
    assert counted in (expected, expected + recomputed)


def test_unknown_models_are_named() -> None:
    with pytest.raises(BadInputError, match="no model 'llama9'; there is llama3"):
        build_model(Model(name="llama9"), 100, 8, torch.float32)


def test_limits_of_a_flavor() -> None:
    with pytest.raises(BadInputError, match=r"tokenizer has 200000 tokens.* room for 128256"):
        build_model(Model(flavor="8B"), 200_000, 8, torch.float32)
    with pytest.raises(BadInputError, match="seq_len: 131073 is beyond"):
        build_model(Model(flavor="8B"), 100, 131_073, torch.float32)
    assert build_model(Model(flavor="tiny"), 123, 8, torch.float32).output.out_features == 123
