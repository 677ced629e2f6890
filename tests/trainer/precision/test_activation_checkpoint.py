"""Recomputation changes memory and time, never the numbers."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pretrain_api.config import ActivationCheckpoint, RunConfig
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.init import initialise
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.precision.activation_checkpoint import check_names, checkpoint_activations
from pretrain_trainer.precision.convert import convert

FORCED = "per_op_sac_force_recompute_mm_shapes_by_fqns"
SHAPE = LlamaShape(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32)
CPU = torch.device("cpu")


def op(**options: object) -> ActivationCheckpoint:
    return ActivationCheckpoint.model_validate(
        {"mode": "selective", "selective_ac_option": "op", **options}
    )


MODES = {
    "none": ActivationCheckpoint(mode="none"),
    "every second layer": ActivationCheckpoint(mode="selective", selective_ac_option="2"),
    "costly operations": op(),
    "full": ActivationCheckpoint(mode="full"),
    "full, early stop": ActivationCheckpoint(mode="full", early_stop=True),
    "costly operations, early stop": op(early_stop=True),
    "costly operations but w2": op(**{FORCED: ["feed_forward.w2"]}),
}


def trained_once(model: Llama3, config: ActivationCheckpoint) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients and FLOPs of one step on a copy of ``model``."""
    model = copy.deepcopy(model)
    checkpoint_activations(model, config)
    tokens = torch.arange(48).view(2, 24)
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens).float().logsumexp(-1).mean()
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.detach(), gradients, counter.get_total_flops()


def built(recipe: str | None) -> Llama3:
    """A model in float32, or in emulated float8."""
    model = Llama3(SHAPE, seq_len=24)
    if recipe:
        float8 = {"emulate": True, "recipe_name": recipe}
        config = {
            "training": {"dataset": "c4"},
            "model": {"converters": ["quantize.linear.float8"]},
            "quantize": {"linear": {"float8": float8}},
        }
        convert(model, RunConfig.model_validate(config), CPU)
    initialise(model, 0, CPU)
    return model


@pytest.fixture(scope="module")
def model() -> Llama3:
    return built(None)


@pytest.mark.parametrize("recipe", [None, "tensorwise", "rowwise"])
def test_recomputation_is_exact(recipe: str | None) -> None:
    model = built(recipe)
    loss, gradients, _ = trained_once(model, MODES["none"])
    for mode, config in MODES.items():
        same_loss, same_gradients, _ = trained_once(model, config)
        assert torch.equal(same_loss, loss), mode
        assert len(gradients) == len(same_gradients) == len(list(model.parameters()))
        pairs = zip(gradients, same_gradients, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), mode


def test_modes_recompute_as_much_as_they_say(model: Llama3) -> None:
    flops = {mode: trained_once(model, config)[2] for mode, config in MODES.items()}
    none, every_second, costly, full, full_early, costly_early, _ = flops.values()
    blocks_forward = full - none  # all blocks once more
    assert blocks_forward > 0
    assert every_second - none == blocks_forward // 2
    # Of a block's seven products every second is kept, and attention is.
    assert 0 < costly - none < blocks_forward * 0.6
    # Nobody asks for a block's result again, so its last product needn't be repeated.
    last_product = 2 * 48 * SHAPE.dim * SHAPE.hidden_dim
    assert full_early == full - SHAPE.n_layers * last_product
    assert costly_early <= costly


def test_products_of_named_layers_are_recomputed_and_not_counted(model: Llama3) -> None:
    def recomputed(**options: object) -> int:
        return trained_once(model, op(**options))[2] - trained_once(model, MODES["none"])[2]

    # In order: wq, wk, wv, wo, w1, w3, w2; the first, third and so on are kept.
    square, narrow, wide = (
        2 * 48 * SHAPE.dim * n * SHAPE.n_layers
        for n in (SHAPE.dim, SHAPE.dim // 2, SHAPE.hidden_dim)
    )
    assert recomputed() == narrow + square + wide  # wk, wo, w3
    # wk and wv have one shape; without them wq, w1 and w2 are kept.
    assert recomputed(**{FORCED: ["attention.wk"]}) == 2 * narrow + square + wide
    # w1 and w3 have one as well; wq, wv and w2 are kept.
    assert recomputed(**{FORCED: ["layers.0.feed_forward.w1"]}) == narrow + square + 2 * wide


def test_a_name_that_no_layer_has_is_refused(model: Llama3) -> None:
    check_names(model, op(**{FORCED: ["moe.router.gate", "attention.wk"]}))
    with pytest.raises(BadInputError, match=rf"{FORCED}: no linear layer of this model has 'w9'"):
        check_names(model, op(**{FORCED: ["attention.wk", "w9"]}))


def test_parameter_names_stay(model: Llama3) -> None:
    wrapped = copy.deepcopy(model)
    checkpoint_activations(wrapped, MODES["costly operations"])
    assert list(wrapped.state_dict()) == list(model.state_dict())
