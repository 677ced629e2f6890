"""The pool of ranks itself: what goes wrong in it is said, not waited for."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest


def nothing() -> None:
    """What the ranks would run."""


def test_a_rank_that_dies_before_it_connects_is_reported(
    ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool_of = type(ranks)
    monkeypatch.setattr(sys.modules[pool_of.__module__], "FORK_SECONDS", 0.1)
    with tempfile.TemporaryDirectory() as folder:
        pool = pool_of(Path(folder))
        # reads the orders, and forks nobody
        pool._server = subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        with pytest.raises(AssertionError, match=r"ranks \[0, 1\] were forked"):
            pool(2, nothing)
        pool.close()
