"""Cutting a model into parts: nothing lost, nothing empty, no cut with a smaller largest part."""

from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_api.split import balanced

PIECES = st.lists(st.integers(0, 50), min_size=1, max_size=9)


def parts_of(costs: list[int], edges: tuple[int, ...]) -> list[int]:
    """Cost of each part, from the edges between parts."""
    return [sum(costs[start:end]) for start, end in pairwise((0, *edges, len(costs)))]


def worth(parts: list[int]) -> tuple[int, int]:
    """The smaller, the better."""
    return max(parts), sum(cost**2 for cost in parts)


@given(PIECES, st.data())
def test_every_piece_is_in_one_part_and_no_cut_is_better(
    costs: list[int], data: st.DataObject
) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    sizes = balanced(costs, parts)
    assert len(sizes) == parts
    assert min(sizes) >= 1
    assert sum(sizes) == len(costs)
    every_cut = combinations(range(1, len(costs)), parts - 1)
    ours = parts_of(costs, tuple(accumulate(sizes))[:-1])
    assert worth(ours) == min(worth(parts_of(costs, cut)) for cut in every_cut)


def test_equal_layers_beside_a_heavy_output() -> None:
    # The embedding costs nothing, the output as much as two layers.
    assert balanced([0, *[10] * 8, 20], 2) == (6, 4)
    assert balanced([0, *[10] * 8, 20], 5) == (3, 2, 2, 2, 1)


@pytest.mark.parametrize("parts", [0, 3])
def test_more_parts_than_pieces_are_refused(parts: int) -> None:
    with pytest.raises(ValueError, match="can't make"):
        balanced([1, 1], parts)


def test_the_largest_model_is_cut_at_once() -> None:
    assert balanced([0, *[3_000] * 126, 2_000], 64) == (2,) * 64
