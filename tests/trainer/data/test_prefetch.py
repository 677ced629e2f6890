"""Results arrive in order and in bounded number; errors arrive where they belong."""

import threading
from itertools import count

import pytest

from pretrain_trainer.data import prefetch
from pretrain_trainer.data.prefetch import Prefetcher

DEADLINE = 20  # seconds


def test_results_come_in_order() -> None:
    numbers = count()
    prefetcher = Prefetcher(lambda: next(numbers), depth=3)
    assert [prefetcher.get() for _ in range(50)] == list(range(50))
    prefetcher.close()


def test_no_more_than_depth_results_are_kept_ready() -> None:
    numbers = count()
    made = threading.Semaphore(0)

    def produce() -> int:
        number = next(numbers)
        made.release()
        return number

    prefetcher = Prefetcher(produce, depth=2)
    assert all(made.acquire(timeout=DEADLINE) for _ in range(2))
    assert not made.acquire(timeout=0.2)
    prefetcher.get()
    assert made.acquire(timeout=DEADLINE)
    prefetcher.close()


def test_an_error_is_raised_after_the_results_before_it_and_then_always() -> None:
    results = iter([1, 2])

    def produce() -> int:
        try:
            return next(results)
        except StopIteration:
            raise ValueError("broken") from None

    prefetcher = Prefetcher(produce, depth=5)
    assert [prefetcher.get(), prefetcher.get()] == [1, 2]
    for _ in range(3):
        with pytest.raises(ValueError, match="broken"):
            prefetcher.get()
    prefetcher.close()


def test_closing_ends_the_thread_though_results_are_waiting() -> None:
    before = threading.active_count()
    prefetcher = Prefetcher(lambda: 1, depth=1)
    prefetcher.get()
    prefetcher.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        prefetcher.get()


def test_closing_does_not_wait_for_a_call_that_is_stuck() -> None:
    entered, network = threading.Event(), threading.Event()

    def produce() -> int:
        entered.set()
        assert network.wait(DEADLINE)
        return 1

    prefetcher = Prefetcher(produce, depth=1)
    assert entered.wait(DEADLINE)
    closing = threading.Thread(target=prefetcher.close, daemon=True)
    closing.start()
    closing.join(DEADLINE / 2)
    try:
        assert not closing.is_alive()
    finally:
        network.set()


def test_signs_of_life_follow_the_thread_and_not_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the thread stands still nothing is said, however often the waiting side looks."""
    monkeypatch.setattr(prefetch, "LOOK_SECONDS", 0.01)
    moved, go_on = threading.Event(), threading.Semaphore(0)
    signs: list[int] = []

    def produce() -> int:
        for _ in range(3):
            moved.set()
            assert go_on.acquire(timeout=DEADLINE)
        return 1

    def alive() -> None:
        assert not moved.is_set()
        signs.append(len(signs))
        go_on.release()

    prefetcher = Prefetcher(produce, 1, moved)
    assert prefetcher.get(alive) == 1
    assert signs == [0, 1, 2]
    go_on.release(3)  # of the next result, which nobody waits for
    prefetcher.close()
