"""Jobs on the real cluster: one installation per session, one namespace per test module."""

import hashlib
import json
import os
import random
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain_bench import setup
from pretrain_bench.faults import Scene
from pretrain_bench.jobs import Jobs
from pretrain_demo.install import SYSTEM_NAMESPACE
from pretrain_demo.target import Target, repository
from pretrain_devcluster import Cluster, images
from pretrain_devcluster.layout import REGISTRY_ENDPOINT

from .shell import Shell


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


@pytest.fixture(scope="session")
def registry(target: Target) -> str:
    """Where this session's images would be pushed by hand: a place that held no others before.

    A node that has an image of a tag doesn't ask whether the tag has moved.
    """
    deployment = target.kubectl(
        f"--namespace={SYSTEM_NAMESPACE}", "get", "deployment", "-o", "jsonpath={..image} {..env}"
    )
    return f"{REGISTRY_ENDPOINT}/{hashlib.sha256(deployment.encode()).hexdigest()[:12]}"


@pytest.fixture(scope="module")
def shell(
    jobs: Jobs, cluster: Cluster, registry: str, tmp_path_factory: pytest.TempPathFactory
) -> Shell:
    """A terminal in the repository, with what the pages ask for: REGISTRY, and docker.

    Its kubeconfig's namespace is the module's, and docker is played by what builds images here.
    """
    folder = tmp_path_factory.mktemp("terminal")
    document = json.loads(cluster.kubeconfig.read_text())
    document["contexts"][0]["context"]["namespace"] = jobs.namespace
    (folder / "config").write_text(json.dumps(document))
    script = "#!/bin/bash\ncase $1 in\n"
    for verb, words in (
        ("build", images.build_command(cluster.layout)),
        ("push", images.push_command(cluster.layout)),
    ):
        script += f'{verb}) exec {shlex.join(words)} "${{@:2}}" ;;\n'
    (folder / "docker").write_text(f"{script}esac\n")
    (folder / "docker").chmod(0o755)
    path = [str(folder), str(Path(sys.executable).parent), jobs.target.environment["PATH"]]
    environment = {
        **os.environ, **jobs.target.environment, "PATH": os.pathsep.join(path),
        "KUBECONFIG": str(folder / "config"), "REGISTRY": registry,
    }  # fmt: skip
    return Shell(repository(), environment)
