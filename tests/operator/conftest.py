"""Fixtures of the operator's tests."""

import pytest

from pretrain_operator.testing import Bench


@pytest.fixture
def bench() -> Bench:
    """An in-memory cluster with an operator."""
    return Bench()
