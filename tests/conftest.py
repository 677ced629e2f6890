"""What all tests share: one thread per process, and the slow, real cluster at the very end.

Two cores run everything. A test process that lets torch open a thread per core only slows its
neighbours, and a test that starts ranks inherits the setting. Tests on the cluster come last, so
that a mistake in plain code is reported within a minute and the cluster can be built meanwhile.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine must not fail a test for being slow; pytest's timeout still ends one that hangs.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CLUSTER_TIMEOUT = 1800  # seconds; the first test on the cluster also waits for it to be built


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cluster") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(CLUSTER_TIMEOUT))
    items.sort(key=lambda item: item.get_closest_marker("cluster") is not None)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return Path(__file__).resolve().parent.parent
