"""``python -m pretrain_bench.scale.throughput``: see :mod:`pretrain_bench.scale`."""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pretrain_api import names
from pretrain_bench import machine, report
from pretrain_bench.client import BenchError, Client
from pretrain_bench.scale import kwok, workers
from pretrain_bench.scale.costs import Usage, count_requests_of, requests
from pretrain_bench.scale.podlog import Life, PodLog
from pretrain_demo.target import repository
from pretrain_devcluster import DevclusterError
from pretrain_devcluster.controlplane import CONTROLLERS, ControlPlane, control_plane, kubeconfig
from pretrain_devcluster.shell import Progress, wait_until

OPERATOR = "pretrain-operator"  # its user
MANAGER = "kube-controller-manager"
NAMESPACE = "many"
PODS_PER_JOB = 8
PATIENCE_SECONDS = 900.0
ANSWER_SECONDS = 120.0  # deleting a thousand jobs is one request
LOOK_SECONDS = 0.05
KILLED = 100  # pods at once, of as many jobs
AT_ONCE = 8  # requests of ours under way
QPS = 500
PAGE = "docs/benchmarks.md"
MARKER = "operator"
COMPLAINT = re.compile(r"\S+ \S+ (WARNING|ERROR|CRITICAL) ")  # after date and time
COMPLAINTS = 20  # shown

Body = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One controller's numbers; times in seconds."""

    name: str
    created: list[float]  # job -> its last pod created
    pods_per_second: float
    requests_per_pod: float
    replaced: list[float]  # pod killed -> its replacement created
    deleted: float  # all jobs deleted -> no pod left
    usage: Usage


@dataclass(frozen=True)
class Contender:
    """A controller of jobs, and how to ask it for one."""

    name: str
    collection: str
    body: Callable[[str], Body]
    user: str
    pid: int


def pretrain_job(name: str) -> Body:
    """A job of eight workers that needs no volume."""
    template = {"terminationGracePeriodSeconds": 30}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name},
        "spec": {
            "training": {"dataset": "text", "datasetPath": "/data", "steps": workers.STEPS},
            "workers": {"replicas": PODS_PER_JOB, "podTemplate": template},
        },
    }


def batch_job(name: str, pod: Body) -> Body:
    """An indexed Job of as many pods of the same shape."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": PODS_PER_JOB,
            "parallelism": PODS_PER_JOB,
            "backoffLimit": 100,
            "template": {"spec": pod},
        },
    }


def shape(pod: Body) -> Body:
    """The spec of a pod without what the cluster added to it."""
    added = {"nodeName", "serviceAccountName", "serviceAccount", "hostname", "subdomain"}
    return {key: value for key, value in pod["spec"].items() if key not in added}


def until(condition: Callable[[], bool], what: str) -> float:
    """Wait for it. Returns when it was so; raises DevclusterError if that never was."""
    wait_until(condition, what, PATIENCE_SECONDS, LOOK_SECONDS)
    return time.time()


@dataclass(frozen=True)
class Arena:
    """The control plane with everything around it."""

    client: Client
    pods: PodLog
    rng: random.Random
    progress: Progress

    def requests(self, user: str) -> int:
        """How many requests a user has made."""
        return requests(self.client.request("GET", "/metrics"), user)

    def run(self, contender: Contender, count: int) -> Result:
        """Create, kill and delete. Raises DevclusterError if something of it never happens."""
        say = self.progress.say
        jobs = [f"{contender.name}-{number}" for number in range(count)]
        say(f"{count} jobs of {contender.name}")
        before = self.requests(contender.user)
        asked = self._create(contender, jobs)
        wanted = count * PODS_PER_JOB
        until(lambda: self._running(jobs) >= wanted, f"{wanted} pods of {contender.name} run")
        made = self.pods.of(jobs)
        came = [life.came for lives in made.values() for life in lives]
        spent = self.requests(contender.user) - before
        say("their pods run; killing some")
        replaced = self._kill(jobs)
        say("replaced; deleting all")
        deleted = self._delete(contender, jobs)
        return Result(
            name=contender.name,
            created=[max(life.came for life in made[job]) - asked[job] for job in jobs],
            pods_per_second=len(came) / (max(came) - min(asked.values())),
            requests_per_pod=spent / wanted,
            replaced=replaced,
            deleted=deleted,
            usage=Usage.of(contender.pid),
        )

    def first(self, contender: Contender) -> Body:
        """A job that comes and goes, so that nothing is cold. Returns a pod of it.

        The garbage collector too needs to have heard of a kind before it deletes what is owned.
        """
        self._create(contender, ["first"])
        until(lambda: self._running(["first"]) == PODS_PER_JOB, "the pods of a first job run")
        name = self.pods.of(["first"])["first"][0].name
        pod = self.client.get(f"/api/v1/namespaces/{NAMESPACE}/pods/{name}")
        self._delete(contender, ["first"])
        return pod

    def _create(self, contender: Contender, jobs: Sequence[str]) -> dict[str, float]:
        def ask(job: str) -> float:
            at = time.time()
            self.client.request("POST", contender.collection, contender.body(job))
            return at

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(jobs, pool.map(ask, jobs), strict=True))

    def _running(self, jobs: Sequence[str]) -> int:
        """Pods with an address."""
        lives = self.pods.of(jobs).values()
        return sum(bool(life.address and life.went is None) for each in lives for life in each)

    def _kill(self, jobs: Sequence[str]) -> list[float]:
        """One pod each of some jobs, without grace, all at once. Returns seconds to the next one.

        A pretended node may yet delete a pod's successor by its name, so the grace is none.
        """
        before = self.pods.of(self.rng.sample(jobs, min(KILLED, len(jobs))))
        victims = {job: self.rng.choice(lives) for job, lives in before.items()}

        def kill(life: Life) -> float:
            at = time.time()
            path = f"/api/v1/namespaces/{NAMESPACE}/pods/{life.name}"
            self.client.request("DELETE", path, {"gracePeriodSeconds": 0})
            return at

        with ThreadPoolExecutor(AT_ONCE) as pool:
            killed = dict(zip(victims, pool.map(kill, victims.values()), strict=True))
        until(
            lambda: all(
                len(lives) > len(before[job]) for job, lives in self.pods.of(before).items()
            ),
            "every killed pod has a replacement",
        )
        return [
            min(life.came for life in lives if life.came > killed[job]) - killed[job]
            for job, lives in self.pods.of(before).items()
        ]

    def _delete(self, contender: Contender, jobs: Sequence[str]) -> float:
        at = time.time()
        self.client.request("DELETE", contender.collection, {"propagationPolicy": "Background"})
        mine = set(jobs)
        gone = until(
            lambda: not any(life.job in mine for life in self.pods.present()),
            f"no pod of {contender.name} is left",
        )
        return gone - at


@contextmanager
def operator(plane: ControlPlane, folder: Path) -> Iterator[int]:
    """The operator of this tree, as a process. Yields its process id.

    What it warned of is told in the end: numbers that surprise have their reason there.
    """
    config = folder / "operator-kubeconfig"
    config.write_text(kubeconfig(plane.url, OPERATOR, plane.authority))
    prefix = "PRETRAIN_OPERATOR_"
    environment = {key: v for key, v in os.environ.items() if not key.startswith(prefix)} | {
        "KUBECONFIG": str(config),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        f"{prefix}LEASE_NAMESPACE": "default",
        f"{prefix}HEALTH_PORT": "0",
        f"{prefix}METRICS_PORT": "0",
    }
    told = folder / "operator.log"
    with told.open("wb") as log:
        argv = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "pretrain_operator"]
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
        for line in complaints(told.read_text()):
            print(line, file=sys.stderr)


def complaints(log: str) -> list[str]:
    """The first warnings and errors of an operator's log."""
    return [line for line in log.splitlines() if COMPLAINT.match(line)][:COMPLAINTS]


def prepare(client: Client, client_folder: Path) -> None:
    """Definition, namespace, and counters for those whose requests are counted."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    for file in client_folder.glob("*.yaml"):
        client.request("POST", path, yaml.safe_load(file.read_text()))
    client.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    for user in (OPERATOR, MANAGER):
        count_requests_of(client, user)


def compare(count: int, nodes: int) -> list[Result]:
    """The operator, then the Job controller with pods of the same shape."""
    controllers = (*CONTROLLERS, "job-controller", "taint-eviction-controller")
    with (
        tempfile.TemporaryDirectory(prefix="pretrain-scale-") as name,
        control_plane(
            controllers, users=[OPERATOR], requests_per_second=QPS, scheduler=True
        ) as plane,
    ):
        folder = Path(name)
        client = Client.by_token(plane.url, plane.tls(), plane.token, ANSWER_SECONDS)
        prepare(client, repository() / "manifests" / "base" / "crds")
        with (
            kwok.nodes(plane, client, nodes, folder),
            PodLog(client) as pods,
            workers.answering(pods),
            operator(plane, folder) as pid,
        ):
            arena = Arena(client, pods, random.Random(0), Progress())
            group = f"/apis/{names.API_VERSION}/namespaces/{NAMESPACE}/{names.PLURAL}"
            mine = Contender("operator", group, pretrain_job, OPERATOR, pid)
            pod = shape(arena.first(mine))
            results = [arena.run(mine, count)]
            batch = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
            theirs = partial(batch_job, pod=pod)
            manager = Contender("job-controller", batch, theirs, MANAGER, plane.pids[MANAGER])
            results.append(arena.run(manager, count))
            return results


def tables(results: Sequence[Result], command: str) -> str:
    """What goes into the page: both beside each other, and the ratio that matters."""
    rows = [
        ["job → last pod, p50 / p99", *(_spread(each.created) for each in results)],
        ["pods per second", *(f"{each.pods_per_second:.0f}" for each in results)],
        ["API requests per pod", *(f"{each.requests_per_pod:.2f}" for each in results)],
        ["pod killed → replacement, p50 / p99", *(_spread(each.replaced) for each in results)],
        ["all deleted → no pod left", *(f"{each.deleted:.1f}" for each in results)],
        ["memory at its peak, MiB", *(f"{each.usage.peak_mib:.0f}" for each in results)],
        ["processor time", *(f"{each.usage.cpu_seconds:.1f}" for each in results)],
    ]
    ratio = results[0].pods_per_second / results[1].pods_per_second
    return (
        f"`{command}` on {machine.describe()}. Seconds. The Job controller's memory and processor "
        "time are those of the controller manager, which also collects the garbage of both.\n\n"
        f"{report.table(['', *(each.name for each in results)], rows)}\n"
        f"Pods per second of the operator: {ratio:.0%} of the Job controller's.\n"
    )


def _spread(values: Sequence[float]) -> str:
    ordered = sorted(values)
    at = (len(ordered) // 2, min(len(ordered) - 1, len(ordered) * 99 // 100))
    return " / ".join(f"{ordered[index]:.1f}" for index in at)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write the page if asked to; a failure is told on stderr."""
    parser = argparse.ArgumentParser(prog="pretrain_bench.scale.throughput", description=__doc__)
    parser.add_argument("--jobs", type=int, default=200, help="of eight pods each (200)")
    parser.add_argument("--nodes", type=int, default=64, help="pretended ones (64)")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE}")
    chosen = parser.parse_args(arguments)
    try:
        results = compare(chosen.jobs, chosen.nodes)
    except (BenchError, DevclusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    words = f"python -m pretrain_bench.scale.throughput --jobs {chosen.jobs} --nodes {chosen.nodes}"
    text = tables(results, words)
    print(text)
    if chosen.write:
        page = repository() / PAGE
        page.write_text(report.replace_between(page.read_text(), MARKER, text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
