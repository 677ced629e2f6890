"""The promise: whatever happens on the way, the end is the one of an undisturbed run.

One job goes through all faults in turn, and its next checkpoint after each one is noted. Then a run
that nothing happens to trains as far. It must have the same checkpoints at these steps: weights,
optimizer, data position and ledger, bit for bit.
"""

import hashlib
import json
import random
import time
from dataclasses import dataclass, replace

import pytest

from pretrain_api import names
from pretrain_api.wire import Order
from pretrain_bench import faults
from pretrain_bench.faults import CATALOGUE, Fault, Scene
from pretrain_bench.jobs import SPEC, Jobs
from pretrain_bench.recorder import Recorder
from pretrain_bench.soak import blows, draw
from pretrain_bench.trial import measure, newest_start, passed, strike, training
from pretrain_demo.job import Snapshot
from pretrain_devcluster import Cluster

pytestmark = pytest.mark.cluster

REFERENCE_SECONDS = 600.0
HANG_SECONDS = 8  # a step takes a fraction of a second, also on two busy cores
INTERVAL = SPEC["checkpoint"]["interval"]
SOAK_FAULTS, SOAK_SEED, SOAK_SECONDS = 6, 3, 240.0


def fault(name: str) -> Fault:
    return next(each for each in CATALOGUE if each.name == name)


@dataclass(frozen=True)
class Storm(Scene):
    """The job that all faults hit. It never ends, and keeps all its checkpoints."""

    noted: dict[int, str]  # step of the first checkpoint after a fault, and which fault that was

    def note(self, fault: str, after: int) -> None:
        """Wait for the next checkpoint behind a step, and note it for the comparison."""
        self.jobs.wait(self.job, lambda _: self.later(after), what=f"a save after step {after}")
        self.noted[min(self.later(after))] = fault

    def later(self, after: int) -> list[int]:
        """Steps of the checkpoints behind a step that an undisturbed run has as well."""
        return [n for n in self.jobs.saved(self.job) if n > after and n % INTERVAL == 0]


@pytest.fixture(scope="module")
def storm(jobs: Jobs, cluster: Cluster) -> Storm:
    jobs.apply(
        "storm",
        training={"steps": 1_000_000},
        checkpoint={"keepLatestK": 0},
        recovery={"maxRestarts": 100, "hang": {"stepSeconds": HANG_SECONDS}},
    )
    return Storm(jobs, cluster, "storm", random.Random(0), {})


def suspend(scene: Storm) -> int:
    """Suspend the job and return the step that its workers saved before they left."""
    before = passed(scene, scene.jobs.hear(scene.job).step)
    faults.suspend(scene)
    job = scene.jobs.read(scene.job)
    saved = scene.jobs.saved(scene.job)[-1]
    assert saved >= before.step
    assert (job.step, job.checkpoint.step) == (saved, saved)
    assert job.status.assignment.order is Order.NONE
    return saved


def resume(scene: Storm) -> Snapshot:
    """Resume the job and return it when it has trained a step."""
    scene.jobs.patch(scene.job, {"suspend": False})
    return training(scene)


@pytest.mark.parametrize("name", ["rank frozen", "fork server killed"])
def test_ranks_start_again_in_their_pods(storm: Storm, name: str) -> None:
    training(storm)
    pods = {faults.uid(pod) for pod in storm.running()}
    before, injury, after = strike(storm, fault(name))
    injury.mend()
    assert after.generation == before.generation
    assert {faults.uid(pod) for pod in storm.running()} == pods
    storm.note(name, before.step)


def test_a_frozen_rank_is_named_with_its_stack(storm: Storm) -> None:
    folders = [*storm.jobs.checkpoints(storm.job).parent.glob("stacks/generation-*/rank-*.txt")]
    assert len(folders) >= 2  # of both ranks, of the one that stood and the one that waited
    assert any("step" in file.read_text() for file in folders)


@pytest.mark.parametrize(
    ("name", "reason", "charged"),
    [
        ("worker killed", "WorkerFailed", True),
        ("pod force-deleted", "PodDeleted", False),
        ("pod evicted", "EvictionByEvictionAPI", False),
        ("operator killed in a recovery", "WorkerFailed", True),
    ],
)
def test_a_lost_pod_is_replaced(storm: Storm, name: str, reason: str, charged: bool) -> None:
    before, _, after = strike(storm, fault(name))
    assert after.generation == before.generation + 1
    attempt = after.status.attempts[-1]
    assert (attempt.generation, attempt.reason) == (before.generation, reason)
    assert attempt.charged is charged
    storm.note(name, before.step)


def test_a_recovery_is_split_into_stages(storm: Storm) -> None:
    training(storm)
    with Recorder(storm.jobs, storm.job) as recorder:
        recovery = measure(storm, recorder, fault("leader killed"))
    assert [stage for stage, value in recovery.stages.items() if value is None] == []
    assert sum(recovery.stages.values()) == pytest.approx(recovery.total, abs=0.01)
    assert recovery.repeated <= INTERVAL
    storm.note(recovery.fault, recovery.step)


def test_training_needs_no_operator(storm: Storm) -> None:
    before, _, after = strike(storm, fault("operator killed"))
    assert newest_start(after) == before.start
    storm.note("operator killed", before.step)


def test_a_drained_node_costs_nothing(storm: Storm) -> None:
    before, injury, after = strike(storm, fault("node drained"))
    injury.mend()
    assert after.generation == before.generation + 1
    assert after.status.attempts[-1].charged is False
    # It left with a checkpoint of the step it was at; at most one more was begun when we looked.
    assert after.resumed_from >= before.step
    storm.note("node drained", before.step)


@pytest.mark.parametrize("name", ["node lost", "node cut off"])
def test_a_lost_node_costs_nothing(storm: Storm, name: str) -> None:
    before, injury, after = strike(storm, fault(name))
    try:
        assert after.generation == before.generation + 1
        attempt = after.status.attempts[-1]
        assert attempt.reason in ("Unreachable", "NodeLost")
        assert attempt.charged is False
        storm.note(name, before.step)
        saved = suspend(storm)
    finally:
        injury.mend()
    # What came back with the node is not taken for a worker, and the job goes on where it was.
    assert storm.jobs.read(storm.job).generation == after.generation
    assert resume(storm).resumed_from == saved
    storm.note(f"suspended after {name}", saved)


def test_a_damaged_checkpoint_is_passed_over(storm: Storm) -> None:
    jobs = storm.jobs
    saved = suspend(storm)
    file = next((jobs.checkpoints(storm.job) / f"step-{saved}").glob("__1_*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    job = resume(storm)
    assert job.resumed_from < saved
    assert saved in [each.step for each in job.leader.progress.skipped]
    storm.note("checkpoint damaged", saved)


def test_a_rank_out_of_memory_is_told_apart_from_a_killed_one(storm: Storm) -> None:
    """Late, because containerd says OOMKilled of whatever ends that container from then on."""
    said: list[str] = []
    for name in ("rank out of memory", "rank killed"):
        training(storm)
        before, _, after = strike(storm, fault(name))
        assert after.generation == before.generation
        said.append(after.leader.last_failure.reason)
        storm.note(name, before.step)
    assert said == ["OOMKilled", "RankFailed"]


def test_a_short_soak(storm: Storm) -> None:
    rng = random.Random(SOAK_SEED)
    soaked = replace(storm, rng=rng)
    done = blows(soaked, draw(rng, SOAK_FAULTS), time.monotonic() + SOAK_SECONDS)
    assert len(done) == SOAK_FAULTS
    storm.note("soak", done[-1].step)


def ledger_section(ledger: str) -> str:
    """Digest of the section of a checkpoint that holds the ledger which a status tells."""
    tensor = json.dumps(["digest", "torch.uint8", [len(ledger) // 2]]).encode()
    return hashlib.sha256(tensor + bytes.fromhex(ledger)).hexdigest()


def test_every_end_is_the_one_of_an_undisturbed_run(storm: Storm) -> None:
    jobs, steps = storm.jobs, max(storm.noted)
    faults.suspend(storm)
    jobs.apply("undisturbed", training={"steps": steps}, checkpoint={"keepLatestK": 0})
    job = jobs.complete("undisturbed", REFERENCE_SECONDS)
    ours = {step: jobs.digests(storm.job, step) for step in storm.noted}
    theirs = {step: jobs.digests("undisturbed", step) for step in storm.noted}
    different = [storm.noted[step] for step in sorted(ours) if ours[step] != theirs[step]]
    assert different == []
    progress = job.status.progress
    assert (job.step, job.steps, job.restarts) == (steps, steps, 0)
    assert job.checkpoint.step == steps
    assert ledger_section(progress.ledger) == ours[steps]["ledger"]
    assert progress.first_loss > progress.loss > 0
    row = jobs.kubectl("get", "ptj", "undisturbed", "--no-headers")
    assert "Complete" in row
    assert f"{steps}/{steps}" in row
    events = jobs.kubectl("get", "events", "-o", "jsonpath={.items[*].reason}")
    for reason in ("Created", "Training", "Completed"):
        assert reason in events


def test_deleting_a_job_leaves_nothing_behind(jobs: Jobs) -> None:
    jobs.apply("gone")
    jobs.wait("gone", lambda _: bool(jobs.pods("gone")))
    jobs.delete("gone")
    selector = f"--selector={names.LABEL_JOB}=gone"
    jobs.kubectl("wait", "pods,configmaps,pvc", selector, "--for=delete", "--timeout=90s")
