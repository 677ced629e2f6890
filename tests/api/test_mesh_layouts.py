"""Every layout the rules let through can be built, and every advice they give is legal itself."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_api.config import Parallelism, RunConfig
from pretrain_api.flavors.llama3 import FLAVORS
from pretrain_api.mesh import (
    SCHEDULES,
    Degrees,
    MeshError,
    batch_plan,
    blamed,
    legal_replicas,
    nearest_layouts,
    resolve,
    smallest_world,
    stage_count,
    stage_layers,
    stages_of_rank,
)


def run(
    parallelism: dict[str, Any] | None = None, flavor: str = "8B", **training: Any
) -> RunConfig:
    """A configuration whose parallelism may ask for what the trainer can't do yet."""
    base = RunConfig.model_validate(
        {"training": {"dataset": "c4", **training}, "model": {"flavor": flavor}}
    )
    return base.model_copy(update={"parallelism": Parallelism.model_validate(parallelism or {})})


def refusal(config: RunConfig, world: int) -> str:
    with pytest.raises(MeshError) as caught:
        batch_plan(config, world)
    return str(caught.value)


@pytest.mark.parametrize(
    ("parallelism", "world", "expected"),
    [
        (
            {"tensor_parallel_degree": 8},
            256,
            Degrees(dp_replicate=1, dp_shard=32, tp=8),
        ),
        (
            {"tensor_parallel_degree": 8, "pipeline_parallel_degree": 8},
            512,
            Degrees(dp_replicate=1, dp_shard=8, tp=8, pp=8),
        ),
        (
            {
                "tensor_parallel_degree": 2,
                "pipeline_parallel_degree": 2,
                "context_parallel_degree": 4,
                "data_parallel_replicate_degree": 2,
            },
            64,
            Degrees(dp_replicate=2, dp_shard=2, cp=4, tp=2, pp=2),
        ),
    ],
)
def test_degrees(parallelism: dict[str, Any], world: int, expected: Degrees) -> None:
    config = run(parallelism, local_batch_size=32, seq_len=8192)
    assert resolve(config.parallelism, world) == expected
    assert batch_plan(config, world).dp_degree == expected.dp
    assert expected.world_size == world


PIPELINE = {"pipeline_parallel_degree": 4}


@pytest.mark.parametrize(
    ("parallelism", "training", "world", "sentence"),
    [
        (
            {"tensor_parallel_degree": 16},
            {},
            16,
            "parallelism.tensor_parallel_degree: 16 doesn't divide the 32 heads, 8 of keys and "
            "values, and 14336 features of llama3 8B; use one of 1, 2, 4, 8",
        ),
        (
            {"tensor_parallel_degree": 4, "context_parallel_degree": 2},
            {"seq_len": 2047},
            8,
            "training.seq_len: 2047 tokens can't be shared evenly by tensor_parallel_degree 4 and "
            "context_parallel_degree 2, in two halves each; use one of 2040, 2048",
        ),
        (
            {"context_parallel_degree": 2},
            {"seq_len": 1026},
            2,
            "training.seq_len: 1026 tokens can't be shared evenly by context_parallel_degree 2, in "
            "two halves each; use one of 1024, 1028",
        ),
        (
            {"enable_async_tensor_parallel": True},
            {},
            1,
            "parallelism.enable_async_tensor_parallel: there is no communication to overlap at "
            "tensor_parallel_degree 1; use false",
        ),
        (
            {"enable_async_tensor_parallel": True, "tensor_parallel_degree": 2},
            {},
            2,
            "parallelism.enable_async_tensor_parallel: is the compiler's work, and needs "
            "compile.enable with model in compile.components; use false",
        ),
        (
            {**PIPELINE, "pipeline_parallel_schedule": "1f1b"},
            {},
            4,
            "parallelism.pipeline_parallel_schedule: there is no schedule 1f1b; use one of GPipe, "
            "1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble, DualPipeV",
        ),
        (
            PIPELINE,
            {"local_batch_size": 3},
            4,
            "training.local_batch_size: 3 in microbatches of 1 makes 3, but 1F1B needs one for "
            "each of 4 ranks; use one of 4, 5, 6",
        ),
        (
            {**PIPELINE, "pipeline_parallel_schedule": "GPipe"},
            {"local_batch_size": 2},
            4,
            "training.local_batch_size: 2 in microbatches of 1 makes 2, but GPipe needs one for "
            "each of 4 ranks; use one of 4, 5",
        ),
        (
            {**PIPELINE, "pipeline_parallel_schedule": "DualPipeV"},
            {"local_batch_size": 6},
            4,
            "training.local_batch_size: 6 in microbatches of 1 makes 6, but DualPipeV needs one "
            "for each of 8 stages; use one of 8, 9, 10, 11, 12, 13",
        ),
        (
            {**PIPELINE, "pipeline_parallel_schedule_csv": "order.csv"},
            {"local_batch_size": 3},
            4,
            "training.local_batch_size: 3 in microbatches of 1 makes 3, but the schedule of the "
            "file needs one for each of 4 ranks; use one of 4, 5, 6",
        ),
        (
            {**PIPELINE, "pipeline_parallel_microbatch_size": 3},
            {"local_batch_size": 16},
            4,
            "parallelism.pipeline_parallel_microbatch_size: 3 doesn't divide local_batch_size 16; "
            "use one of 1, 2, 4",
        ),
        (
            {**PIPELINE, "pipeline_parallel_schedule": "Interleaved1F1B"},
            {"local_batch_size": 9},
            4,
            "training.local_batch_size: 9 in microbatches of 1 makes 9, which Interleaved1F1B "
            "can't deal out in even rounds over 4 ranks; use one of 4, 5, 6, 7, 8, 10, 12, 15",
        ),
        (
            {"pipeline_parallel_degree": 64},
            {"local_batch_size": 64},
            64,
            "parallelism.pipeline_parallel_degree: 64 makes 64 stages of 32 layers; use one of 1, "
            "2, 4, 8, 16, 32",
        ),
        (
            {**PIPELINE, "pipeline_parallel_layers_per_stage": 4},
            {},
            4,
            "parallelism.pipeline_parallel_layers_per_stage: 4 makes 9 stages, but 1F1B wants "
            "exactly 1 stage on each of 4 ranks; use one of 9, 10, 11",
        ),
        (
            {**PIPELINE, "module_fqns_per_model_part": [["a"], ["b"], ["c"]]},
            {},
            4,
            "parallelism.module_fqns_per_model_part: these are the modules of 3 stages, but 1F1B "
            "wants exactly 1 stage on each of 4 ranks; name the modules of 4 stages, or leave it "
            "out",
        ),
        (
            {**PIPELINE, "pipeline_parallel_first_stage_less_layers": 20},
            {},
            4,
            "parallelism.pipeline_parallel_first_stage_less_layers: 20 is more than the 13 layers "
            "of a stage; use one of 4, 5, 6, 7, 8, 9, 10, 11",
        ),
        (
            {"expert_parallel_degree": 2},
            {},
            2,
            "parallelism.expert_parallel_degree: 2 ranks can't share the experts of llama3 8B, "
            "which has none; use 1",
        ),
        (
            {"context_parallel_degree": 2, "fsdp_reshard_after_forward": 3},
            {},
            8,
            "parallelism.fsdp_reshard_after_forward: 3 doesn't divide the sharding degree 8 (4 x "
            "context_parallel_degree 2); use one of 1, 2, 4, 8",
        ),
        (
            {"tensor_parallel_degree": 2, "fsdp_reshard_after_forward": 2},
            {},
            8,
            "parallelism.fsdp_reshard_after_forward: 2 ranks can't be grouped beside tensor, "
            "pipeline or expert parallelism; use one of default, always, never",
        ),
        (
            {"tensor_parallel_degree": 3, "context_parallel_degree": 2},
            {"seq_len": 2046},
            8,
            "parallelism.tensor_parallel_degree: 3 doesn't divide 4 ranks; legal layouts near it: "
            "tensor 2, data_parallel_shard 4; data_parallel_shard 8; data_parallel_replicate 2, "
            "tensor 2, data_parallel_shard 2",
        ),
    ],
)
def test_sentences(
    parallelism: dict[str, Any], training: dict[str, Any], world: int, sentence: str
) -> None:
    assert refusal(run(parallelism, **training), world) == sentence


def test_experts_borrow_ranks() -> None:
    """What isn't known to be without experts may split them over dp_shard x cp, and tp if lent."""

    def legal(**degrees: int) -> bool:
        config = run({f"{name}_degree": n for name, n in degrees.items()}, seq_len=2048)
        mine = config.model.model_copy(update={"name": "mine"})
        return blamed(config.model_copy(update={"model": mine}), 8) is None

    assert legal(expert_parallel=8)
    assert legal(expert_parallel=8, tensor_parallel=2)
    assert legal(expert_parallel=4, tensor_parallel=2, expert_tensor_parallel=2)
    assert not legal(expert_parallel=8, tensor_parallel=2, expert_tensor_parallel=2)
    assert not legal(expert_parallel=2, tensor_parallel=4, expert_tensor_parallel=2)
    assert not legal(expert_parallel=3)
    assert legal(expert_parallel=4, context_parallel=2, data_parallel_replicate=2)
    assert not legal(expert_parallel=8, context_parallel=2, data_parallel_replicate=2)


def test_experts_decide_the_legal_numbers_of_workers() -> None:
    config = run({"expert_parallel_degree": 4}, local_batch_size=1)
    mine = config.model.model_copy(update={"name": "mine"})
    assert legal_replicas(config.model_copy(update={"model": mine}), 1, 8) == (4, 8)


def test_matrices_and_stages_decide_the_legal_numbers_of_workers() -> None:
    config = run({"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2}, local_batch_size=4)
    assert legal_replicas(config, 2, 8) == (2, 4, 8)


@pytest.mark.parametrize(
    ("parallelism", "fewest"),
    [
        ({}, 1),
        ({"tensor_parallel_degree": 4}, 4),
        ({"fsdp_reshard_after_forward": 4}, 4),
        ({"fsdp_reshard_after_forward": 4, "context_parallel_degree": 2}, 4),
        ({"expert_parallel_degree": 8, "tensor_parallel_degree": 2}, 8),
        ({"data_parallel_shard_degree": 6, "data_parallel_replicate_degree": 2}, 12),
    ],
)
def test_the_smallest_world(parallelism: dict[str, Any], fewest: int) -> None:
    assert smallest_world(run(parallelism).parallelism) == fewest


def layouts() -> st.SearchStrategy[dict[str, Any]]:
    """Degrees and what refines pipelines, legal or not."""
    small = st.sampled_from((1, 2, 3, 4, 8))
    return st.fixed_dictionaries(
        {},
        optional={
            "data_parallel_replicate_degree": small,
            "data_parallel_shard_degree": st.sampled_from((-1, 1, 2, 4)),
            "context_parallel_degree": small,
            "tensor_parallel_degree": small,
            "pipeline_parallel_degree": small,
            "expert_parallel_degree": st.sampled_from((1, 2)),
            "fsdp_reshard_after_forward": st.sampled_from(("always", 1, 2, 3, 4)),
            "enable_async_tensor_parallel": st.booleans(),
            "pipeline_parallel_schedule": st.sampled_from((*SCHEDULES, "2F2B")),
            "pipeline_parallel_schedule_csv": st.sampled_from(("", "order.csv")),
            "pipeline_parallel_layers_per_stage": st.sampled_from((1, 2, 4, 8)),
            "pipeline_parallel_microbatch_size": st.sampled_from((1, 2, 3)),
            "pipeline_parallel_first_stage_less_layers": st.sampled_from((0, 1, 3, 40)),
        },
    )


CONFIGS = st.builds(
    run,
    layouts(),
    st.sampled_from(tuple(FLAVORS)),
    local_batch_size=st.sampled_from((1, 2, 3, 8, 16, 32)),
    global_batch_size=st.sampled_from((-1, -1, 7, 64)),
    seq_len=st.sampled_from((2048, 2047, 48)),
)
WORLDS = st.sampled_from((1, 2, 4, 8, 16, 24, 64, 512))


def offers(message: str) -> Iterator[int | str | bool]:
    """Values a sentence tells to use."""
    _, _, advice = message.rpartition("; use ")
    for text in re.split(r", | or ", advice.removeprefix("one of ")):
        yield {"true": True, "false": False}.get(text, int(text) if text[-1].isdecimal() else text)


@settings(max_examples=400, deadline=None)
@given(config=CONFIGS, world=WORLDS)
def test_a_legal_layout_fills_the_world(config: RunConfig, world: int) -> None:
    if blamed(config, world) is not None:
        return
    plan, degrees = batch_plan(config, world), resolve(config.parallelism, world)
    assert degrees.world_size == world
    assert plan.dp_degree * degrees.cp * degrees.tp * degrees.pp == world
    assert config.training.seq_len % (degrees.cp * degrees.tp) == 0


@settings(max_examples=400, deadline=None)
@given(config=CONFIGS, world=WORLDS)
def test_advice_is_legal(config: RunConfig, world: int) -> None:
    key = blamed(config, world)
    if key is None:
        return
    sentence = refusal(config, world)
    assert sentence.startswith(f"{key}: ")
    if "; use " not in sentence:
        return
    section, name = key.split(".")
    changed = [
        config.model_copy(
            update={section: getattr(config, section).model_copy(update={name: value})}
        )
        for value in offers(sentence)
    ]
    left = {blamed(other, world) for other in changed}
    # Where something else is wrong as well, no value alone can help.
    assert left == {None} or (None not in left and key not in left)


@settings(max_examples=200, deadline=None)
@given(config=CONFIGS, world=WORLDS)
def test_layouts_named_are_legal(config: RunConfig, world: int) -> None:
    for degrees in nearest_layouts(config, world):
        assert degrees.world_size == world
        parallelism = config.parallelism.model_copy(
            update={
                "data_parallel_replicate_degree": degrees.dp_replicate,
                "data_parallel_shard_degree": degrees.dp_shard,
                "context_parallel_degree": degrees.cp,
                "tensor_parallel_degree": degrees.tp,
                "pipeline_parallel_degree": degrees.pp,
            }
        )
        assert blamed(config.model_copy(update={"parallelism": parallelism}), world) is None


@settings(max_examples=300, deadline=None)
@given(
    ranks=st.integers(2, 16),
    schedule=st.sampled_from(tuple(SCHEDULES)),
    flavor=st.sampled_from(("debugmodel", "8B", "70B", "405B")),
    first=st.integers(0, 3),
    last=st.integers(0, 3),
    each=st.one_of(st.none(), st.integers(1, 20)),
)
def test_layers_and_stages_are_dealt_out_once(
    ranks: int, schedule: str, flavor: str, first: int, last: int, each: int | None
) -> None:
    config = run(
        {
            "pipeline_parallel_degree": ranks,
            "pipeline_parallel_schedule": schedule,
            "pipeline_parallel_first_stage_less_layers": first,
            "pipeline_parallel_last_stage_less_layers": last,
            "pipeline_parallel_layers_per_stage": each,
        },
        flavor,
        local_batch_size=240,
    )
    parallelism, layers = config.parallelism, FLAVORS[flavor].n_layers
    if blamed(config, ranks) is not None:
        return
    count = stage_count(parallelism, layers)
    assert count is not None
    dealt = stage_layers(parallelism, count, layers)
    assert len(dealt) == count
    assert sum(dealt) == layers
    assert min(dealt[1:-1], default=1) > 0
    assert min(dealt) >= 0
    held = [stages_of_rank(parallelism, count, rank) for rank in range(ranks)]
    assert sorted(stage for stages in held for stage in stages) == list(range(count))
    assert len({len(stages) for stages in held}) == 1
