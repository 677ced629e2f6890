"""What the planner says of memory is what the trainer's own model takes."""

import pytest

from pretrain_trainer.bench.memory import CASES, LAYERS, Case, compared_apart, wrong


def brings(case: Case) -> set[str]:
    return {case.flavor, *case.parallelism, case.recompute["mode"]}


def chosen() -> list[int]:
    """The fewest cases with every model, degree and kind of recomputation.

    `make check-memory` goes through all.
    """
    picked: list[int] = []
    for number in reversed(range(len(CASES))):  # those that combine most come last
        if not brings(CASES[number]) <= set().union(*(brings(CASES[each]) for each in picked)):
            picked.append(number)
    return picked


@pytest.mark.slow
@pytest.mark.parametrize("number", chosen(), ids=lambda number: CASES[number].title)
def test_the_estimate_is_what_is_allocated(number: int) -> None:
    assert wrong(compared_apart(number, LAYERS)) == []
