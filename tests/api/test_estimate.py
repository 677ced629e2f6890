"""The planner's arithmetic: what must hold of it whatever the numbers are.

That memory is right is shown beside the trainer's own model, in tests/trainer/core/test_memory.py.
"""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_api.config import Parallelism, RunConfig
from pretrain_api.estimate.gpus import GPUS, gpu_of_product, peak_flops
from pretrain_api.estimate.memory import memory, parts
from pretrain_api.estimate.plan import layout, ranked, room, too_large
from pretrain_api.flavors.llama3 import FLAVORS
from pretrain_api.mesh import batch_plan, blamed, resolve

VOCABULARY = 2048
FULL = {"mode": "full"}


def run(
    flavor: str = "8B",
    parallelism: dict[str, Any] | None = None,
    recompute: dict[str, Any] | None = None,
    **training: Any,
) -> RunConfig:
    base = RunConfig.model_validate({
        "model": {"flavor": flavor},
        "training": {"dataset": "c4", "seq_len": 8192, "local_batch_size": 1} | training,
        "activation_checkpoint": recompute or {},
    })  # fmt: skip
    return base.model_copy(update={"parallelism": Parallelism.model_validate(parallelism or {})})


DEGREE = st.sampled_from((1, 2, 4, 8))


@settings(max_examples=200, deadline=None)
@given(
    flavor=st.sampled_from(("8B", "70B", "405B")),
    pp=DEGREE,
    tp=DEGREE,
    cp=DEGREE,
    replicate=DEGREE,
    schedule=st.sampled_from(("1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble")),
)
def test_ranks_hold_the_whole_model_together(
    flavor: str, pp: int, tp: int, cp: int, replicate: int, schedule: str
) -> None:
    config = run(
        flavor,
        {
            "pipeline_parallel_degree": pp,
            "tensor_parallel_degree": tp,
            "context_parallel_degree": cp,
            "data_parallel_replicate_degree": replicate,
            "pipeline_parallel_schedule": schedule,
        },
        FULL,
        local_batch_size=32,
    )
    world = 2 * pp * tp * cp * replicate
    if blamed(config, world) is not None:
        return
    shape, degrees = FLAVORS[flavor], resolve(config.parallelism, world)
    held = parts(config, shape, VOCABULARY)
    assert sum(part.layers for part in held) == shape.n_layers
    assert sum(part.has_embedding for part in held) == sum(part.has_head for part in held) == 1
    each = memory(config, shape, degrees, VOCABULARY)
    d, f, kv = shape.dim, shape.hidden_dim, shape.n_kv_heads * shape.head_dim
    assert shape.vocab_size is not None
    whole = shape.n_layers * (2 * d * d + 2 * d * kv + 3 * d * f + 2 * d) + d
    whole += 2 * shape.vocab_size * d
    together = sum(one.parameters for one in each) * tp * degrees.fsdp // 4
    # Norms are whole on every tensor-parallel rank, and shards are rounded up.
    assert whole <= together <= 1.02 * whole
    for one in each:
        assert one.parameters + one.optimizer <= one.peak
        assert one.kept <= one.peak


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (run(recompute=FULL), run(recompute={"mode": "selective", "selective_ac_option": "op"})),
        (
            run(recompute={"mode": "selective", "selective_ac_option": "op"}),
            run(recompute={"mode": "none"}),
        ),
        (run(recompute=FULL), run(recompute=FULL, local_batch_size=2)),
        (run(), run(seq_len=16_384)),
        (run(dtype="bfloat16"), run()),
        (run(), run(mixed_precision_param="float32")),
        (run(enable_cpu_offload=True), run()),
        (run(parallelism={"tensor_parallel_degree": 2}), run()),
        (run(), run(parallelism={"data_parallel_replicate_degree": 8})),
        (run(), run(global_batch_size=64)),
    ],
)
def test_what_takes_less_memory(less: RunConfig, more: RunConfig) -> None:
    def peak(config: RunConfig) -> int:
        plan = batch_plan(config, 8)
        degrees = resolve(config.parallelism, 8)
        (one,) = memory(config, FLAVORS["8B"], degrees, VOCABULARY, plan.accumulation_steps)
        return one.peak

    assert peak(less) < peak(more)


@pytest.mark.parametrize(
    ("config", "world", "published"),
    [
        (run(recompute={"mode": "selective", "selective_ac_option": "op"}, local_batch_size=2), 8,
         6667),
        (run("70B", {"tensor_parallel_degree": 8}, FULL, local_batch_size=16), 256, 597),
    ],
)  # fmt: skip
def test_speed_is_near_what_was_published(config: RunConfig, world: int, published: int) -> None:
    shape = FLAVORS[config.model.flavor]
    one = layout(config, shape, GPUS["h100-80"], world)
    assert one.speed.tokens_per_second == pytest.approx(published, rel=0.2)


@pytest.mark.parametrize(("flavor", "world"), [("8B", 8), ("70B", 256), ("405B", 512)])
def test_layouts_are_legal_and_those_that_fit_come_first(flavor: str, world: int) -> None:
    config, gpu = run(flavor, recompute=FULL, local_batch_size=8), GPUS["h100-80"]
    found = ranked(config, FLAVORS[flavor], gpu, world)
    assert found
    assert len({one.degrees for one in found}) == len(found)
    assert all(one.degrees.world_size == world for one in found)
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    assert all(one.fits == (one.memory.peak <= room(gpu)) for one in found)
    assert found[0].fits


def test_a_pipeline_idles_less_with_more_microbatches_and_stages() -> None:
    def bubble(schedule: str, batch: int) -> float:
        degrees = {"pipeline_parallel_degree": 8, "pipeline_parallel_schedule": schedule}
        config = run("70B", degrees, FULL, local_batch_size=batch)
        speed = layout(config, FLAVORS["70B"], GPUS["h200"], 64).speed
        return speed.bubble / speed.seconds

    assert bubble("1F1B", 32) < bubble("1F1B", 8)
    assert bubble("Interleaved1F1B", 8) < bubble("1F1B", 8)


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA-H100-80GB-HBM3", "h100-80"),
        ("NVIDIA-H200", "h200"),
        ("NVIDIA-A100-SXM4-40GB", "a100-40"),
        ("NVIDIA-A100-SXM4-80GB", "a100-80"),
        ("NVIDIA-B200", "b200"),
        ("NVIDIA-L40S", "l40s"),
        ("AMD_Instinct_MI300X_OAM", "mi300x"),
        ("NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", None),
        ("NVIDIA-GB200", None),
        ("NVIDIA-H100-NVL", None),
        ("Tesla-T4", None),
        ("", None),
    ],
)
def test_gpus_are_known_by_their_labels(product: str, name: str | None) -> None:
    assert gpu_of_product(product) == name


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_of_a_device(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak


LABEL = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}


def test_only_a_job_that_says_its_gpu_and_cannot_fit_is_warned() -> None:
    huge = run("405B", recompute={"mode": "none"})
    sentence = too_large(huge, 8, LABEL)
    assert sentence is not None
    assert "has room for 73" in sentence
    assert "activationCheckpoint.mode full" in sentence
    assert too_large(huge, 8, {}) is None
    assert too_large(huge, 8, {"nvidia.com/gpu.product": "Tesla-T4"}) is None
    assert too_large(run(recompute=FULL), 8, LABEL) is None
    mine = huge.model_copy(update={"model": huge.model.model_copy(update={"name": "mine"})})
    assert too_large(mine, 8, LABEL) is None


def test_shapes_without_a_vocabulary_take_the_tokenizers() -> None:
    config = run("debugmodel", recompute=FULL)
    degrees = resolve(config.parallelism, 1)
    small, large = (memory(config, FLAVORS["debugmodel"], degrees, n)[0] for n in (1000, 2000))
    width = replace(FLAVORS["debugmodel"]).dim
    assert large.parameters - small.parameters == 4 * 2 * 1000 * width
