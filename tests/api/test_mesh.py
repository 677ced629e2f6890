"""Degrees and batches come out even, or the sentence says what would."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_api.config import RunConfig
from pretrain_api.mesh import (
    BatchPlan,
    Degrees,
    MeshError,
    batch_plan,
    legal_replicas,
    resized,
    resolve,
)


def run(parallelism: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"training": {"dataset": "c4", **training}, "parallelism": parallelism or {}}
    )


@pytest.mark.parametrize(
    ("parallelism", "world", "expected"),
    [
        ({}, 1, Degrees(dp_replicate=1, dp_shard=1)),
        ({}, 8, Degrees(dp_replicate=1, dp_shard=8)),
        ({"data_parallel_shard_degree": 8}, 8, Degrees(dp_replicate=1, dp_shard=8)),
        ({"data_parallel_replicate_degree": 2}, 8, Degrees(dp_replicate=2, dp_shard=4)),
        ({"data_parallel_replicate_degree": 8}, 8, Degrees(dp_replicate=8, dp_shard=1)),
        (
            {"data_parallel_replicate_degree": 4, "data_parallel_shard_degree": 2},
            8,
            Degrees(dp_replicate=4, dp_shard=2),
        ),
    ],
)
def test_degrees(parallelism: dict[str, Any], world: int, expected: Degrees) -> None:
    degrees = resolve(run(parallelism).parallelism, world)
    assert degrees == expected
    assert degrees.world_size == world


@pytest.mark.parametrize(
    ("parallelism", "training", "world", "sentence"),
    [
        (
            {"data_parallel_replicate_degree": 3},
            {},
            8,
            "parallelism.data_parallel_replicate_degree: 3 doesn't divide 8 ranks; "
            "use one of 1, 2, 4, 8",
        ),
        (
            {"data_parallel_shard_degree": 4},
            {},
            8,
            "parallelism.data_parallel_shard_degree: 4 doesn't fill 8 ranks; use -1 or 8",
        ),
        (
            {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 8},
            {},
            8,
            "parallelism.data_parallel_shard_degree: 8 doesn't fill the 4 of 8 ranks that the "
            "other degrees leave; use -1 or 4",
        ),
        (
            {"data_parallel_shard_degree": 2},
            {},
            1,
            "parallelism.data_parallel_shard_degree: 2 doesn't fill 1 rank; use -1 or 1",
        ),
        (
            {"fsdp_reshard_after_forward": 3},
            {},
            8,
            "parallelism.fsdp_reshard_after_forward: 3 doesn't divide the sharding degree 8; "
            "use one of 1, 2, 4, 8",
        ),
        (
            {},
            {"local_batch_size": 2, "global_batch_size": 30},
            8,
            "training.global_batch_size: 30 is no multiple of local_batch_size 2 x data-parallel "
            "degree 8; use -1 or 16 or 32",
        ),
        (
            {},
            {"local_batch_size": 2, "global_batch_size": 3},
            8,
            "training.global_batch_size: 3 is no multiple of local_batch_size 2 x data-parallel "
            "degree 8; use -1 or 16",
        ),
        (
            {},
            {"local_batch_size": 2, "data_streams": 3},
            4,
            "training.data_streams: 3 must divide the global batch size 8 and be a multiple of "
            "the data-parallel degree 4; use one of 4, 8",
        ),
    ],
)
def test_sentences(
    parallelism: dict[str, Any], training: dict[str, Any], world: int, sentence: str
) -> None:
    with pytest.raises(MeshError) as caught:
        batch_plan(run(parallelism, **training), world)
    assert str(caught.value) == sentence
    assert sentence == f"{caught.value.key}: {caught.value.message}"


@pytest.mark.parametrize(
    ("training", "world", "expected"),
    [
        ({"local_batch_size": 2}, 4, BatchPlan(8, 2, 1, 4, 8)),
        ({"local_batch_size": 2, "global_batch_size": 32}, 4, BatchPlan(32, 2, 4, 4, 32)),
        ({"local_batch_size": 1, "global_batch_size": 8}, 1, BatchPlan(8, 1, 8, 1, 8)),
        (
            {"local_batch_size": 2, "global_batch_size": 32, "data_streams": 8},
            4,
            BatchPlan(32, 2, 4, 4, 8),
        ),
    ],
)
def test_batches(training: dict[str, Any], world: int, expected: BatchPlan) -> None:
    assert batch_plan(run(**training), world) == expected


DEGREE = st.integers(1, 12)


@given(replicate=DEGREE, shard=st.one_of(st.just(-1), DEGREE), world=st.integers(1, 64))
def test_degrees_fill_the_world_or_are_refused(replicate: int, shard: int, world: int) -> None:
    parallelism = run(
        {"data_parallel_replicate_degree": replicate, "data_parallel_shard_degree": shard}
    ).parallelism
    possible = world % replicate == 0 and shard in (-1, world // replicate)
    try:
        degrees = resolve(parallelism, world)
    except MeshError:
        assert not possible
    else:
        assert possible
        assert degrees.world_size == world
        assert degrees.dp_replicate == replicate


@given(
    local=st.integers(1, 8),
    total=st.one_of(st.just(-1), st.integers(1, 256)),
    world=st.integers(1, 16),
)
def test_a_batch_is_all_its_passes(local: int, total: int, world: int) -> None:
    try:
        plan = batch_plan(run(local_batch_size=local, global_batch_size=total), world)
    except MeshError as error:
        assert total % (local * world) != 0
        # What the sentence offers is legal.
        *_, offers = error.message.partition("use -1 or ")[2].split(" or ")
        batch_plan(run(local_batch_size=local, global_batch_size=int(offers)), world)
    else:
        assert plan.global_batch_size == local * plan.dp_degree * plan.accumulation_steps
        assert total in (-1, plan.global_batch_size)


@given(total=st.integers(1, 64), streams=st.integers(1, 64), world=st.integers(1, 8))
def test_streams_are_whole_on_every_rank(total: int, streams: int, world: int) -> None:
    config = run(local_batch_size=1, global_batch_size=total, data_streams=streams)
    try:
        plan = batch_plan(config, world)
    except MeshError:
        assert total % world or total % streams or streams % world
    else:
        assert plan.global_batch_size % plan.streams == 0
        assert plan.streams % plan.dp_degree == 0


@pytest.mark.parametrize(
    ("parallelism", "training", "processes", "largest", "expected"),
    [
        ({}, {"local_batch_size": 1}, 1, 6, (1, 2, 3, 6)),
        ({}, {"local_batch_size": 1}, 4, 6, (1, 2, 3, 6)),
        # The batch has room for sizes that don't divide the largest.
        ({}, {"local_batch_size": 1, "global_batch_size": 24}, 1, 6, (1, 2, 3, 4, 6)),
        ({}, {"local_batch_size": 1, "data_streams": 4, "global_batch_size": 8}, 1, 4, (1, 2, 4)),
        ({"data_parallel_replicate_degree": 2}, {}, 1, 8, (2, 4, 8)),
        ({"data_parallel_replicate_degree": 2}, {}, 2, 8, (1, 2, 4, 8)),
        ({"data_parallel_shard_degree": 4}, {}, 1, 4, (4,)),
        ({"fsdp_reshard_after_forward": 2}, {}, 1, 4, (2, 4)),
        ({}, {"global_batch_size": 7}, 1, 4, ()),
    ],
)
def test_legal_replicas(
    parallelism: dict[str, Any],
    training: dict[str, Any],
    processes: int,
    largest: int,
    expected: tuple[int, ...],
) -> None:
    assert legal_replicas(run(parallelism, **training), processes, largest) == expected


@given(
    local=st.integers(1, 4),
    passes=st.integers(1, 6),
    replicate=st.integers(1, 3),
    processes=st.integers(1, 4),
    largest=st.integers(1, 12),
)
def test_a_legal_size_trains_the_same_batch_and_no_other_does(
    local: int, passes: int, replicate: int, processes: int, largest: int
) -> None:
    total = local * passes * largest * processes
    config = run(
        {"data_parallel_replicate_degree": replicate},
        local_batch_size=local,
        global_batch_size=total,
    )
    legal = legal_replicas(config, processes, largest)
    if not legal:
        assert largest * processes % replicate
        return
    full = batch_plan(config, largest * processes)
    fixed = config.model_copy(update={"training": resized(config.training, full)})
    for size in range(1, largest + 1):
        try:
            plan = batch_plan(fixed, size * processes)
        except MeshError:
            assert size not in legal
        else:
            assert size in legal
            assert (plan.global_batch_size, plan.streams) == (total, full.streams)
