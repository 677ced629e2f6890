"""The devcluster with the operator of this tree, and a namespace on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain_bench.client import Client
from pretrain_bench.jobs import Jobs
from pretrain_demo.console import Console
from pretrain_demo.install import ensure_namespace, install
from pretrain_demo.target import Target, devcluster
from pretrain_devcluster import Cluster
from pretrain_devcluster.layout import Layout


def installed() -> tuple[Target, Cluster]:
    """The cluster of this machine, brought up if need be, with images and operator of this tree."""
    target, cluster = devcluster(os.environ, Layout.default()), Cluster.up()
    cluster.kubectl("uncordon", *cluster.ready_nodes())  # after a run that was killed
    install(target, Console())
    return target, cluster


@contextmanager
def fresh_namespace(target: Target, cluster: Cluster, name: str) -> Iterator[Jobs]:
    """A namespace that admits restricted pods only, empty at first and deleted in the end."""
    target.kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=120s")
    ensure_namespace(target, name)
    yield Jobs(target, name, cluster.layout.volumes, Client.of(cluster.kubeconfig))
    target.kubectl("delete", "namespace", name, "--wait=false")
