"""The shuffle is a bijection, and dealing it out covers every epoch exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_trainer.data.order import Order, permute

sizes = st.integers(1, 700)
seeds = st.integers(0, 2**53)
epochs = st.integers(0, 2**31)


@given(size=sizes, seed=seeds, epoch=epochs)
def test_an_epoch_visits_every_document_once(size: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(size), size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))


@given(size=st.integers(1, 2**62), seed=seeds, picks=st.sets(st.floats(0, 1), min_size=1))
def test_any_size_is_mapped_into_itself_without_collision(
    size: int, seed: int, picks: set[float]
) -> None:
    positions = {min(int(pick * size), size - 1) for pick in picks}
    mapped = permute(np.array(sorted(positions)), size, seed, 0)
    assert ((mapped >= 0) & (mapped < size)).all()
    assert len(set(mapped.tolist())) == len(positions)


@settings(max_examples=40)
@given(
    documents=st.integers(1, 90),
    streams=st.integers(1, 20),
    seed=seeds,
    epochs=st.integers(1, 3),
    block=st.integers(5, 50),
)
def test_streams_share_out_all_epochs_without_gap_or_overlap(
    documents: int, streams: int, seed: int, epochs: int, block: int
) -> None:
    order = Order(documents, streams, seed, epochs)
    seen: list[tuple[int, int]] = []
    lengths = []
    for stream in range(streams):
        places, first = [], 0
        while found := order.places(stream, first, block):
            places += found
            first += block
        assert places == order.places(stream, 0, epochs * documents)
        seen += places
        lengths.append(len(places))
    assert sorted(seen) == [(e, d) for e in range(epochs) for d in range(documents)]
    assert max(lengths) - min(lengths) <= 1


@given(documents=sizes, stream=st.integers(0, 5), first=st.integers(0, 5000))
def test_a_place_is_a_pure_function(documents: int, stream: int, first: int) -> None:
    order = Order(documents, 6, seed=7)
    together = order.places(stream, first, 10)
    assert together == [order.places(stream, first + i, 1)[0] for i in range(10)]


def test_epochs_and_seeds_differ() -> None:
    base = permute(np.arange(100), 100, seed=0, epoch=0)
    for seed, epoch in [(0, 1), (1, 0), (1, 1)]:
        assert (permute(np.arange(100), 100, seed, epoch) == base).sum() < 10


def test_each_epoch_of_an_order_is_shuffled_anew() -> None:
    places = Order(documents=100, streams=1, seed=0).places(stream=0, first=0, count=300)
    first, second, third = ([p.document for p in places[n : n + 100]] for n in (0, 100, 200))
    assert sorted(first) == sorted(second) == sorted(third)
    assert len({tuple(first), tuple(second), tuple(third), tuple(range(100))}) == 4


def test_the_order_never_changes_between_releases() -> None:
    """Cursors in checkpoints point into this order: changing it needs new RULES in loader.py."""
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [7, 0, 5, 9, 4, 3, 6, 8, 1, 2]


@pytest.mark.parametrize("size", [3, 8, 31])
def test_every_document_comes_equally_often_at_every_position(size: int) -> None:
    trials = 1000
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), permute(np.arange(size), size, seed, 0)] += 1
    expected = trials / size
    # Five standard deviations of a binomial count.
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * (1 - 1 / size))
