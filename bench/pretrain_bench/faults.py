"""What can break, each as a function that breaks it for real and says how to mend it.

Processes are hit by signals from the machine, pods through the API server, nodes by their power and
their cable. A node that dies takes no operator along: an operator that is gone for minutes is
another story than a worker that is, and each is told by a fault of its own.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain_api import names
from pretrain_bench import processes
from pretrain_bench.client import ApiError, BenchError, pods_path
from pretrain_bench.jobs import Jobs
from pretrain_bench.memory import MemoryGroup
from pretrain_demo.job import Snapshot
from pretrain_devcluster import Cluster
from pretrain_devcluster.shell import CommandError, wait_until

SYSTEM_NAMESPACE = "pretrain-system"
OPERATOR_LABEL = "app.kubernetes.io/name=pretrain-operator"
NODE_SECONDS = 90.0  # for a node that boots, or is plugged in again, to be Ready
PATIENCE_SECONDS = 120.0

Pod = dict[str, Any]
Mend = Callable[[], object]


def nothing() -> None:
    """What there is to mend after most faults."""


def unprepared(_: "Scene") -> None:
    """What most faults need."""


@dataclass(frozen=True)
class Injury:
    """A fault that has happened."""

    at: float  # seconds since the epoch
    mend: Mend = nothing


@dataclass(frozen=True)
class Scene:
    """A job and all that can be broken under it; ``rng`` picks victims."""

    jobs: Jobs
    cluster: Cluster
    job: str
    rng: random.Random

    def size(self) -> int:
        """How many workers the job has now."""
        assignment = self.jobs.read(self.job).status.assignment
        return len(assignment.workers) if assignment else 0

    def worker(self, index: int) -> Pod:
        """The pod of a worker."""
        return self.jobs.worker(self.job, index)

    def any_worker(self) -> Pod:
        """The pod of some worker."""
        return self.worker(self.rng.randrange(self.size()))

    def running(self) -> list[Pod]:
        """The job's pods that have not ended."""
        pods = self.jobs.pods(self.job)
        return [pod for pod in pods if pod["status"].get("phase") not in ("Failed", "Succeeded")]

    def operator(self) -> Pod:
        """The operator's pod. Raises BenchError if there is none."""
        pods = self.jobs.client.get(pods_path(SYSTEM_NAMESPACE, OPERATOR_LABEL))["items"]
        alive = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        if not alive:
            raise BenchError("there is no operator")
        return alive[0]

    def exposed_worker(self) -> Pod:
        """A worker on a node that the operator isn't on. Raises BenchError if there is none."""
        operator = self.operator()["spec"].get("nodeName")
        workers = [self.worker(index) for index in range(self.size())]
        found = [pod for pod in workers if pod["spec"].get("nodeName") != operator]
        if not found:
            raise BenchError(f"every worker of {self.job} is on {operator}, where the operator is")
        return self.rng.choice(found)

    def expose(self) -> None:
        """Move a worker away from the operator's node, if all are there."""
        operator = self.operator()["spec"]["nodeName"]
        workers = [self.worker(index) for index in range(self.size())]
        if all(pod["spec"].get("nodeName") == operator for pod in workers):
            self._move(workers[-1], operator)

    def _move(self, pod: Pod, node: str) -> None:
        """Replace a worker while its node takes no pods."""
        generation = self.jobs.read(self.job).generation
        self.cluster.kubectl("cordon", node)
        try:
            delete(self, pod)
            self.jobs.wait_heard(
                self.job,
                lambda job: job.generation > generation and trains(job),
                PATIENCE_SECONDS,
                f"training away from {node}",
            )
        finally:
            self.cluster.kubectl("uncordon", node)

    def wait_for_nodes(self) -> None:
        """Until all nodes are Ready."""
        every = {node.name for node in self.cluster.nodes}
        wait_until(lambda: self.cluster.ready_nodes() >= every, "all nodes are Ready", NODE_SECONDS)


def trains(job: Snapshot) -> bool:
    """Whether the ranks have ended a step since their newest start."""
    timeline = job.leader.timeline if job.leader else None
    return timeline is not None and timeline.trained is not None


def uid(pod: Pod) -> str:
    """UID of a pod."""
    return pod["metadata"]["uid"]


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal; a process that is gone already is fine."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _hit(pid: int, number: signal.Signals, mend: Mend = nothing) -> Injury:
    at = time.time()
    os.kill(pid, number)
    return Injury(at, mend)


# -- processes ----------------------------------------------------------------------------------


def rank_of(scene: Scene, pod: Pod) -> int:
    """Process id of some rank of a worker."""
    return scene.rng.choice(processes.ranks(processes.of_pod(uid(pod))))


def kill_rank(scene: Scene) -> Injury:
    """SIGKILL a rank."""
    return _hit(rank_of(scene, scene.any_worker()), signal.SIGKILL)


def freeze_rank(scene: Scene) -> Injury:
    """SIGSTOP a rank; mending thaws it, if it is still there."""
    pid = rank_of(scene, scene.any_worker())
    return _hit(pid, signal.SIGSTOP, lambda: send(pid, signal.SIGCONT))


def exhaust_memory(scene: Scene) -> Injury:
    """Leave a worker's container without one more page of memory; the kernel kills a rank."""
    pid = rank_of(scene, scene.any_worker())
    # The largest process would be chosen, and a fork server may be as large as its ranks.
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    return Injury(MemoryGroup.of(pid).exhaust())


def kill_fork_server(scene: Scene) -> Injury:
    """SIGKILL what ranks are forked from."""
    found = processes.of_pod(uid(scene.any_worker()))
    return _hit(processes.fork_server(found), signal.SIGKILL)


def kill_agent(scene: Scene, pod: Pod) -> Injury:
    """SIGKILL PID 1 of a worker, which ends its container."""
    pid = processes.pid_one(processes.of_pod(uid(pod)), processes.AGENT)
    return _hit(pid, signal.SIGKILL)


def kill_leader(scene: Scene) -> Injury:
    """SIGKILL PID 1 of the worker that hosts the meeting point."""
    return kill_agent(scene, scene.worker(0))


def kill_follower(scene: Scene) -> Injury:
    """SIGKILL PID 1 of the last worker."""
    return kill_agent(scene, scene.worker(scene.size() - 1))


# -- pods ---------------------------------------------------------------------------------------


def delete(scene: Scene, pod: Pod, grace_seconds: int | None = None) -> Injury:
    """Delete a pod; 0 seconds of grace is by force, None is the pod's own."""
    at = time.time()
    path = f"{pods_path(scene.jobs.namespace)}/{pod['metadata']['name']}"
    body = None if grace_seconds is None else {"gracePeriodSeconds": grace_seconds}
    scene.jobs.client.request("DELETE", path, body)
    return Injury(at)


def delete_pod(scene: Scene) -> Injury:
    """`kubectl delete pod`: SIGTERM, and time to save."""
    return delete(scene, scene.any_worker())


def force_delete_pod(scene: Scene) -> Injury:
    """`kubectl delete pod --force`: gone from the API server at once, its processes soon after."""
    return delete(scene, scene.any_worker(), 0)


def evict_pod(scene: Scene) -> Injury:
    """Evict a pod through the API, as drains and autoscalers do."""
    at, name = time.time(), scene.any_worker()["metadata"]["name"]
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": name, "namespace": scene.jobs.namespace},
    }
    path = f"{pods_path(scene.jobs.namespace)}/{name}/eviction"
    scene.jobs.client.request("POST", path, body)
    return Injury(at)


# -- nodes --------------------------------------------------------------------------------------


def drain_node(scene: Scene) -> Injury:
    """`kubectl drain` of a worker's node, for this job's pods; mending uncordons it."""
    node = scene.exposed_worker()["spec"]["nodeName"]
    selector = f"--pod-selector={names.LABEL_JOB}={scene.job}"
    at = time.time()
    flags = ("--delete-emptydir-data", "--ignore-daemonsets", "--timeout=60s")
    try:
        scene.cluster.kubectl("drain", node, selector, *flags)
    except CommandError:
        scene.cluster.kubectl("uncordon", node)
        raise
    return Injury(at, lambda: scene.cluster.kubectl("uncordon", node))


def lose_node(scene: Scene) -> Injury:
    """Take a worker's node's power away; mending boots it."""
    node = scene.cluster.node(scene.exposed_worker()["spec"]["nodeName"])
    at = time.time()
    node.kill()

    def boot() -> None:
        node.start()
        scene.wait_for_nodes()

    return Injury(at, boot)


def cut_node(scene: Scene) -> Injury:
    """Pull the cable of a worker's node, on which all runs on; mending plugs it in."""
    node = scene.cluster.node(scene.exposed_worker()["spec"]["nodeName"])
    at = time.time()
    node.cut()

    def heal() -> None:
        node.heal()
        scene.wait_for_nodes()

    return Injury(at, heal)


# -- the operator -------------------------------------------------------------------------------


def operator_process(scene: Scene) -> int:
    """Process id of the operator."""
    return processes.pid_one(processes.of_pod(uid(scene.operator())), processes.OPERATOR)


def kill_operator(scene: Scene) -> Injury:
    """SIGKILL the operator."""
    return _hit(operator_process(scene), signal.SIGKILL)


def freeze_operator(scene: Scene) -> Injury:
    """SIGSTOP the operator; mending lets it run again."""
    pid = operator_process(scene)
    return _hit(pid, signal.SIGSTOP, lambda: send(pid, signal.SIGCONT))


def renew_operator(scene: Scene) -> None:
    """Replace the operator's pod and wait until the new one is ready.

    The kubelet waits ever longer before it starts a container again, up to five minutes, unless it
    lasted for ten. What is measured is the first restart, not how often tests were run before.
    """
    where = (f"--namespace={SYSTEM_NAMESPACE}", "--timeout=120s")
    scene.cluster.kubectl("delete", "pod", scene.operator()["metadata"]["name"], *where)
    scene.cluster.kubectl("rollout", "status", "deployment/pretrain-operator", *where)


def kill_operator_in_recovery(scene: Scene) -> Injury:
    """SIGKILL a worker, and the operator as soon as it has decided what to do about it."""
    generation = scene.jobs.read(scene.job).generation
    injury = kill_follower(scene)
    scene.jobs.wait(
        scene.job, lambda job: job.generation > generation, PATIENCE_SECONDS, "a new generation"
    )
    kill_operator(scene)
    return injury


# -- wishes -------------------------------------------------------------------------------------


def suspend(scene: Scene) -> None:
    """Suspend the job and wait until none of its pods runs; those that failed are kept.

    One that was lost with its node may seem to run for as long as the node is away.
    """

    def is_quiet(job: Snapshot) -> bool:
        assignment = job.status.assignment
        lost = assignment.written_off if assignment else ()
        running = [pod for pod in scene.running() if uid(pod) not in lost]
        return job.holds(names.SUSPENDED) and job.pod(0) is None and not running

    scene.jobs.patch(scene.job, {"suspend": True})
    scene.jobs.wait(scene.job, is_quiet, PATIENCE_SECONDS, "its suspension")


def suspend_and_resume(scene: Scene) -> Injury:
    """Suspend the job, and resume it as soon as it is; the clock starts with the resumption."""
    suspend(scene)
    at = time.time()
    scene.jobs.patch(scene.job, {"suspend": False})
    return Injury(at)


def scale(scene: Scene, replicas: int) -> Injury:
    """Change the number of workers through the scale subresource."""
    at = time.time()
    path = f"{scene.jobs.path(scene.job)}/scale"
    kind = "application/merge-patch+json"
    scene.jobs.client.request("PATCH", path, {"spec": {"replicas": replicas}}, kind)
    return Injury(at)


def alive(scene: Scene, pod: Pod) -> bool:
    """Whether a pod still exists in the API server."""
    path = f"{pods_path(scene.jobs.namespace)}/{pod['metadata']['name']}"
    try:
        return uid(scene.jobs.client.get(path)) == uid(pod)
    except ApiError as error:
        if error.status == 404:
            return False
        raise


@dataclass(frozen=True)
class Fault:
    """An entry of the catalogue.

    Attributes:
        name: short and unique, as in tables.
        inject: breaks it.
        weight: how often it comes in a soak, relative to the others; 0 is never.
        heals: training goes on by itself, without a restart.
        aim_seconds: the median that is aimed at, from the fault to the first step after it.
        prepare: makes it possible, before the clock starts; the job trains again afterwards.
    """

    name: str
    inject: Callable[[Scene], Injury]
    weight: int
    heals: bool = False
    aim_seconds: float | None = None
    prepare: Callable[[Scene], None] = unprepared

    @property
    def what(self) -> str:
        """One line of explanation."""
        return (self.inject.__doc__ or "").partition("\n")[0]


CATALOGUE = (
    Fault("rank killed", kill_rank, 40, aim_seconds=2),
    Fault("rank frozen", freeze_rank, 6),
    Fault("rank out of memory", exhaust_memory, 4, aim_seconds=2),
    Fault("fork server killed", kill_fork_server, 6, aim_seconds=10),
    Fault("worker killed", kill_follower, 14, aim_seconds=10),
    Fault("leader killed", kill_leader, 14, aim_seconds=10),
    Fault("pod deleted", delete_pod, 8, aim_seconds=10),
    Fault("pod force-deleted", force_delete_pod, 8, aim_seconds=10),
    Fault("pod evicted", evict_pod, 6, aim_seconds=10),
    Fault("node drained", drain_node, 3, aim_seconds=10, prepare=Scene.expose),
    Fault("node lost", lose_node, 1, aim_seconds=40, prepare=Scene.expose),
    Fault("node cut off", cut_node, 1, aim_seconds=40, prepare=Scene.expose),
    Fault("operator killed in a recovery", kill_operator_in_recovery, 2, prepare=renew_operator),
    Fault("operator killed", kill_operator, 2, heals=True, prepare=renew_operator),
    Fault("suspended and resumed", suspend_and_resume, 3, aim_seconds=10),
)
