"""What the planner says of memory is what the trainer's own model takes."""

import pytest

from pretrain_trainer.bench.memory import CASES, LAYERS, compared_apart, wrong


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.title for case in CASES])
def test_the_estimate_is_what_is_allocated(number: int) -> None:
    assert wrong(compared_apart(number, LAYERS)) == []
