"""What users do and what befalls their jobs, from the submission to an end that can be compared.

Training waits wherever a user steps in, so that the step at which it happens is always the same.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from pretrain_api.wire import ExitCode

from .api import Body
from .lab import Lab, manifest, workers
from .world import Deed, Fail, Lose, Wait

COMPLETE, FAILED, SUSPENDED, GONE = "Complete", "Failed", "Suspended", None


async def watch_on(lab: Lab) -> None:
    """Nobody steps in."""


async def delete_leader(lab: Lab) -> None:
    """A user deletes the leader's pod, which saves and leaves."""
    await lab.until_standing()
    leader = lab.kubelet.of(0)
    path = f"/api/v1/namespaces/{lab.namespace}/pods/{leader.name}"
    await lab.api.delete(path, leader.uid)
    await lab.until_true(lambda: leader.over, "the leader has left")
    lab.kubelet.go_on()


async def suspend_and_resume(lab: Lab) -> None:
    """A user suspends the job and resumes it once all is quiet."""
    await lab.until_standing()
    before = list(lab.kubelet.workers.values())
    await lab.change(suspend=True)
    await lab.until_phase(SUSPENDED)
    await lab.until_true(lambda: all(worker.over for worker in before), "all workers have left")
    lab.kubelet.go_on()
    await lab.change(suspend=False)


async def resize(lab: Lab) -> None:
    """A user goes down to one worker and up to two again."""
    for replicas in (1, 2):
        await lab.until_standing()
        await lab.change(workers={"replicas": replicas})
        await lab.until_true(lambda n=replicas: lab.kubelet.training == n, f"{replicas} train")
        lab.kubelet.go_on()


@dataclass(frozen=True)
class Workflow:
    """One job's life, and what it comes to.

    ``blurred`` are fields of the assignment and the attempts that depend on what was seen last of a
    leader that went.
    """

    name: str
    ends: str | None = COMPLETE  # the phase; GONE is a job that was deleted
    script: dict[int, Deed] = field(default_factory=dict)
    spec: Body = field(default_factory=dict)
    drive: Callable[[Lab], Awaitable[None]] = watch_on
    pods: int = 2  # that are ever created
    restarts: dict[str, int] = field(default_factory=dict)
    attempts: tuple[str, ...] = ()
    blurred: frozenset[str] = frozenset()

    async def run(self, lab: Lab) -> None:
        """From the submission to the end. Raises AssertionError if that doesn't come."""
        await lab.submit(manifest(**self.spec))
        await self.drive(lab)
        await lab.until_phase(self.ends)
        if self.ends is GONE:
            await lab.until(lambda: childless(lab), "the garbage collector has cleared up")


async def childless(lab: Lab) -> bool:
    """Whether nothing is left of a job."""
    return not any((await lab.children()).values())


APPLY = Workflow("apply")
WORKER_FAILS = Workflow(
    "worker fails",
    script={15: Fail(1, 1)},
    pods=3,
    restarts={"RankFailed": 1},
    attempts=("RankFailed",),
)
LEADER_FAILS = Workflow(
    "leader fails",
    script={15: Fail(0, 1)},
    pods=3,
    restarts={"RankFailed": 1},
    attempts=("RankFailed",),
)
LEADER_DELETED = Workflow(
    "leader deleted",
    script={15: Wait()},
    drive=delete_leader,
    pods=3,
    restarts={"PodDeleted": 1},
    attempts=("PodDeleted",),
    # An operator that is back only after the pod is gone doesn't know what that left behind.
    blurred=frozenset(
        {
            "step",
            "startStep",
            "checkpointStep",
            "savedStep",
            "lostSeconds",
            "exitCode",
            "message",
        }
    ),
)
SUSPEND = Workflow(
    "suspend and resume",
    script={15: Wait()},
    drive=suspend_and_resume,
    pods=4,
    attempts=("Suspended",),
)
FOR_GOOD = Workflow(
    "failure for good",
    FAILED,
    {15: Fail(1, ExitCode.CONFIG)},
    attempts=("InvalidConfiguration",),
)
BUDGET = Workflow(
    "budget used up",
    FAILED,
    {15: Fail(1, 1), 16: Fail(0, 1)},
    {"recovery": {"maxRestarts": 1, "backoffSeconds": 1}},
    pods=3,
    restarts={"RankFailed": 1},
    attempts=("RankFailed", "RankFailed"),
)
TTL = Workflow("deleted after its time", GONE, spec={"ttlSecondsAfterFinished": 1})
NODE_LOST = Workflow(
    "node lost",
    script={15: Lose(1)},
    pods=3,
    restarts={"NodeLost": 1},
    attempts=("NodeLost",),
)
RESIZE = Workflow(
    "resize 2 to 1 to 2",
    script={15: Wait(), 25: Wait()},
    spec={"workers": workers(2, maxReplicas=2)},
    drive=resize,
    pods=3,
    restarts={"Resized": 2},
    attempts=("Resized", "Resized"),
)

WORKFLOWS = (
    APPLY,
    WORKER_FAILS,
    LEADER_FAILS,
    LEADER_DELETED,
    SUSPEND,
    FOR_GOOD,
    BUDGET,
    TTL,
    NODE_LOST,
    RESIZE,
)
