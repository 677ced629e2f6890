"""Jobs on the real cluster: one installation per session, one namespace per test module."""

import random
from collections.abc import Callable, Iterator

import pytest

from pretrain_bench import setup
from pretrain_bench.faults import Scene
from pretrain_bench.jobs import Jobs
from pretrain_demo.target import Target
from pretrain_devcluster import Cluster


@pytest.fixture(scope="session")
def installation() -> tuple[Target, Cluster]:
    return setup.installed()


@pytest.fixture(scope="session")
def target(installation: tuple[Target, Cluster]) -> Target:
    """The cluster of this machine, with both images as they are in the tree and the operator."""
    return installation[0]


@pytest.fixture(scope="session")
def cluster(installation: tuple[Target, Cluster]) -> Cluster:
    return installation[1]


@pytest.fixture(scope="module")
def jobs(target: Target, cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Jobs]:
    """A namespace of the module's own."""
    name = request.module.__name__.rpartition(".")[2].replace("_", "-")
    with setup.fresh_namespace(target, cluster, name) as made:
        yield made


@pytest.fixture(scope="module")
def scene(jobs: Jobs, cluster: Cluster) -> Callable[[str], Scene]:
    """What can be broken under a job of the module's namespace."""
    return lambda job: Scene(jobs, cluster, job, random.Random(job))
