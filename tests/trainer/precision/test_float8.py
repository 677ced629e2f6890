"""Float8 is exact about what it emulates, near the truth, and unknown to checkpoints.

Emulation casts to float8 and multiplies what comes out in float32, so sharding must not change a
number beyond the order of sums: a weight's scale is that of the whole weight. Against float32 the
noise of all gradients together is measured in decibels.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pretrain_api.config import RunConfig
from pretrain_api.flavors.llama3 import FLAVORS, LlamaShape
from pretrain_trainer.checkpoint.digest import digests
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.precision import ao
from pretrain_trainer.precision.convert import convert
from pretrain_trainer.precision.float8 import eight_bit_flops

from ..core.watched import Array, watched_steps, watched_steps_in_real_float8
from .measures import decibels

Ranks = Callable[..., Any]
Run = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]
Seen = tuple[dict[str, Array], list[float]]

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
ALL_GATHER = {"enable_fsdp_float8_all_gather": True}
PRECOMPUTED = {**ALL_GATHER, "precompute_float8_dynamic_scale_for_fsdp": True}

LOSS, GRADIENT = 1e-6, 2e-5  # as in the matrix of layouts
REAL_DECIBELS = 40  # to the emulation: tensorwise 136, rowwise 46.8, with gradients in full 56.9
LEAST_DECIBELS = 22  # measured: tensorwise 25.2, rowwise 27.0, with gradients in full 29.5


def float8(**options: Any) -> dict[str, Any]:
    """Sections that switch it on, emulated."""
    return {
        "model": {"converters": ["quantize.linear.float8"]},
        "quantize": {"linear": {"float8": {"emulate": True, **options}}},
        "checkpoint": {"enable": False},
        "training": {"steps": 1},
    }


def observe(ranks: Ranks, size: int, config: RunConfig) -> Seen:
    """Whole gradients of the first step, and losses."""
    seen = ranks(size, watched_steps, config)
    gradients = {name: value for found, _ in seen for name, value in found.items()}
    return gradients, np.sum([losses for _, losses in seen], axis=0).tolist()


def assert_same(found: Seen, expected: Seen) -> None:
    """Equal but for the order of sums."""
    assert found[1] == pytest.approx(expected[1], rel=LOSS)
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        room = GRADIENT * float(np.abs(value).max())
        np.testing.assert_allclose(found[0][name], value, rtol=0, atol=room, err_msg=name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_layouts_compute_what_one_process_does(
    ranks: Ranks, run_config: MakeConfig, recipe: str
) -> None:
    options = float8(recipe_name=recipe)
    split = {"parallelism": {"tensor_parallel_degree": 2}}
    expected = observe(ranks, 1, run_config(**options))
    assert_same(observe(ranks, 2, run_config(**options)), expected)
    assert_same(observe(ranks, 2, run_config(**options, **split)), expected)

    plain = {"checkpoint": {"enable": False}, "training": {"steps": 1}}
    truth = observe(ranks, 1, run_config(**plain))
    measured = decibels(truth[0], expected[0])
    print(f"{recipe}: {measured:.1f} dB, loss {expected[1][0]} instead of {truth[1][0]}")
    assert LEAST_DECIBELS < measured < 60  # no noise at all would mean that nothing was cast
    assert expected[1] == pytest.approx(truth[1], rel=1e-4)


@pytest.mark.parametrize("degree", [1, 2])
def test_gathering_in_float8_changes_nothing(
    ranks: Ranks, run_config: MakeConfig, degree: int
) -> None:
    layout = {"parallelism": {"tensor_parallel_degree": degree}, "training": {"steps": 3}}
    variants = [
        observe(ranks, 2 * degree, run_config(**{**float8(**options), **layout}))
        for options in ({}, ALL_GATHER, PRECOMPUTED)
    ]
    (gradients, losses), *others = variants
    for found, same in others:
        assert same == losses
        assert all(np.array_equal(found[name], value) for name, value in gradients.items())
    assert len(set(losses)) == 3


def test_checkpoints_know_nothing_of_float8(
    run: Run, run_config: MakeConfig, saved: Callable[..., Any]
) -> None:
    keep = {"checkpoint": {"enable": True, "interval": 2, "last_save_model_only": False}}

    def config(name: str, steps: int, sections: dict[str, Any]) -> RunConfig:
        job = {"dump_folder": run_config().job.dump_folder + name}
        return run_config(**{**sections, **keep, "training": {"steps": steps}, "job": job})

    low, high = float8(**PRECOMPUTED), {"model": {}}
    run(2, config("low", 2, low))
    run(2, config("high", 2, high))
    in_low, in_high = saved(config("low", 2, low), 2), saved(config("high", 2, high), 2)
    assert {n: (t.shape, t.dtype) for n, t in in_low.items()} == {
        n: (t.shape, t.dtype) for n, t in in_high.items()
    }
    # Each goes on from the other's, on another number of ranks.
    assert list(run(1, config("low", 4, high)).losses) == [3, 4]
    assert list(run(1, config("high", 4, low)).losses) == [3, 4]


def test_a_float8_run_resumes_bitwise(
    run: Run, run_until_killed: Run, run_config: MakeConfig
) -> None:
    keep = {"checkpoint": {"enable": True}, "training": {"steps": 4}}
    there = {"job": {"dump_folder": run_config().job.dump_folder + "-undisturbed"}}
    config = run_config(**{**float8(**PRECOMPUTED), **keep})
    undisturbed = run_config(**{**float8(**PRECOMPUTED), **keep, **there})
    expected = run(2, undisturbed)
    run_until_killed(2, config, kill_at=4)
    assert run(2, config).losses == {step: expected.losses[step] for step in (3, 4)}
    folders = [f"{c.job.dump_folder}/{c.checkpoint.folder}/step-4" for c in (config, undisturbed)]
    assert digests(folders[0]) == digests(folders[1])


def meta(shape: LlamaShape) -> Llama3:
    with torch.device("meta"):
        return Llama3(shape, seq_len=64)


def converted(make: MakeConfig, shape: LlamaShape, **options: Any) -> tuple[Llama3, set[str]]:
    model = meta(shape)
    convert(model, make(**float8(**options)), torch.device("cpu"))
    modules = model.named_modules()
    return model, {name for name, module in modules if isinstance(module, ao.Float8Linear)}


SMALL = LlamaShape(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32)


def test_names_stay_and_the_output_layer_is_left_alone(run_config: MakeConfig) -> None:
    model, names = converted(run_config, SMALL)
    assert list(model.state_dict()) == list(meta(SMALL).state_dict())
    assert len(names) == 7 * SMALL.n_layers
    assert "output" not in names


def test_layers_are_filtered_by_name_and_by_size(run_config: MakeConfig) -> None:
    _, names = converted(run_config, SMALL, filter_fqns=["attention.wk", "layers.1", "output"])
    kept = "attention.wq attention.wv attention.wo feed_forward.w1 feed_forward.w2 feed_forward.w3"
    assert names == {f"layers.0.{name}" for name in kept.split()}
    odd = dataclasses.replace(SMALL, n_heads=8, n_kv_heads=1)  # keys and values of 8 features
    _, names = converted(run_config, odd)
    assert not any(name.endswith(("wk", "wv")) for name in names)
    assert len(names) == 5 * SMALL.n_layers


def test_small_layers_can_be_left_alone_together(run_config: MakeConfig) -> None:
    shape = dataclasses.replace(FLAVORS["8B"], vocab_size=128)
    _, names = converted(run_config, shape, filter_fqns=["auto_filter_small_kn"])
    assert len(names) == 5 * shape.n_layers  # keys and values of 1024 features gain nothing
    assert not any(name.endswith(("wk", "wv")) for name in names)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"filter_fqns": ["wqq"]}, "filter_fqns: no linear layer of this model has 'wqq' in its"),
        ({"filter_fqns": ["layers"]}, "filter_fqns: no layer is left to convert; "),
        ({"emulate": False}, "needs a GPU of compute capability 8.9 or newer and there is no GPU;"),
    ],
)
def test_what_would_do_nothing_is_refused(
    run_config: MakeConfig, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInputError) as caught:
        converted(run_config, SMALL, **options)
    assert sentence in str(caught.value)
    assert "quantize.linear.float8" in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"training": {"seq_len": 24, "local_batch_size": 1}},
            "training.seq_len: 24 tokens go through a layer at once, and float8 needs a multiple",
        ),
        (
            {
                "training": {"seq_len": 48, "local_batch_size": 8},
                "parallelism": {"pipeline_parallel_degree": 2, "context_parallel_degree": 2},
            },
            "training.seq_len: 24 tokens",
        ),
        (
            {"parallelism": {"fsdp_reshard_after_forward": 2}, "float8": ALL_GATHER},
            "fsdp_reshard_after_forward: a number of ranks can't be combined with quantize.linear.",
        ),
        (
            {"training": {"enable_cpu_offload": True}, "float8": PRECOMPUTED},
            "training.enable_cpu_offload: scales of weights that are computed ahead don't travel",
        ),
    ],
    ids=["tokens", "tokens of a microbatch", "partly resharded", "offloaded"],
)
def test_what_only_a_gpu_would_trip_over_is_refused(
    run_config: MakeConfig, sections: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    options = {"emulate": False, **sections.get("float8", {})}
    chosen = {name: value for name, value in sections.items() if name != "float8"}
    config = run_config(**(float8(**options) | chosen))
    with pytest.raises(BadInputError) as caught:
        convert(meta(SMALL), config, torch.device("cuda"))
    assert sentence in str(caught.value)
    # Gradients of weights in high precision are sums over any number of tokens.
    if "float8" not in sections:
        free = run_config(**(float8(emulate=False, recipe_name="rowwise_with_gw_hp") | chosen))
        convert(meta(SMALL), free, torch.device("cuda"))


def test_the_router_of_experts_stays_as_it_is(run_config: MakeConfig) -> None:
    many = dataclasses.replace(FLAVORS["tiny_moe"], vocab_size=64, moe=dataclasses.replace(
        FLAVORS["tiny_moe"].moe, num_experts=16))  # fmt: skip
    model, names = converted(run_config, many)
    assert not any("router" in name for name in names)
    assert any("router" in name for name, _ in model.named_modules())


def test_the_gpu_decides(run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(**float8(emulate=False))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(BadInputError, match=r"NVIDIA A100, of 8\.0; set .*float8\.emulate"):
        convert(meta(SMALL), config, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    model = meta(SMALL)
    convert(model, config, torch.device("cuda"))
    blocks = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.dim() == 2)
    assert eight_bit_flops(model) == 6 * blocks
    careful = run_config(**float8(emulate=False, recipe_name="rowwise_with_gw_hp"))
    model = meta(SMALL)
    convert(model, careful, torch.device("cuda"))
    assert eight_bit_flops(model) == 4 * blocks  # gradients of weights are not in float8


def test_the_model_is_printed_and_emulation_counts_as_no_float8(
    run_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    sections = float8()
    sections["model"]["print_after_conversion"] = True
    model = meta(SMALL)
    with caplog.at_level(logging.INFO, logger="pretrain_trainer"):
        convert(model, run_config(**sections), torch.device("cpu"))
    assert caplog.text.count("Float8Linear(") == 7 * SMALL.n_layers
    assert eight_bit_flops(model) == 0


# torch has real products for CPUs too, slow ones: only the kernels are others than on a GPU.


@pytest.mark.parametrize("recipe", RECIPES)
def test_real_products_are_those_that_are_emulated(
    ranks: Ranks, run_config: MakeConfig, recipe: str
) -> None:
    emulated = observe(ranks, 1, run_config(**float8(recipe_name=recipe)))
    real = run_config(**float8(recipe_name=recipe, emulate=False))
    ((alone, losses),) = ranks(1, watched_steps_in_real_float8, real)
    sharded = ranks(2, watched_steps_in_real_float8, real)
    measured = {
        "emulated": decibels(emulated[0], alone),
        "fsdp 2": decibels(alone, sharded[0][0]),
    }
    print(f"real products, {recipe}: {measured}")
    assert losses == pytest.approx(emulated[1], rel=1e-4)
    assert measured["emulated"] > REAL_DECIBELS
    assert measured["fsdp 2"] > 100  # but for the order of sums


def test_real_products_of_split_and_gathered_weights_are_those_of_whole_ones(
    ranks: Ranks, run_config: MakeConfig
) -> None:
    real = float8(emulate=False)
    real["model"]["flavor"] = "debugmodel"  # its layers are wide enough also when split
    ((alone, _),) = ranks(1, watched_steps_in_real_float8, run_config(**real))
    real["quantize"]["linear"]["float8"] |= ALL_GATHER
    split = run_config(**real, parallelism={"tensor_parallel_degree": 2})
    seen = ranks(4, watched_steps_in_real_float8, split)
    found = {name: value for gradients, _ in seen for name, value in gradients.items()}
    measured = decibels(alone, found)
    print(f"real products, fsdp 2 x tp 2, float8 all-gather: {measured:.1f} dB")
    assert measured > REAL_DECIBELS
