"""The promise: whatever happens on the way, the end is the one of an undisturbed run."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain_api import names

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def undisturbed(jobs: Any) -> dict[str, Any]:
    """The run all others are compared with: its digests, its ledger and its losses."""
    jobs.apply("undisturbed")
    job = jobs.complete("undisturbed")
    progress = job.status.progress
    assert (job.step, job.steps, job.restarts) == (60, 60, 0)
    assert job.checkpoint is not None
    assert job.checkpoint.step == 60
    assert progress.first_loss > progress.loss > 0
    return {"digests": jobs.digests("undisturbed"), "ledger": progress.ledger}


def same_end(jobs: Any, name: str, undisturbed: dict[str, Any]) -> None:
    job = jobs.complete(name)
    assert job.step == 60
    assert job.status.progress.ledger == undisturbed["ledger"]
    assert jobs.digests(name) == undisturbed["digests"]


def pid_one_of(pod_uid: str) -> int:
    """The process on this machine that is PID 1 of a pod's worker container."""
    mark = pod_uid.replace("-", "_")
    for process in Path("/proc").iterdir():
        try:
            if (
                not process.name.isdigit()
                or b"pretrain_agent" not in (process / "cmdline").read_bytes()
            ):
                continue
            groups = (process / "cgroup").read_text()
            in_pod = pod_uid in groups or mark in groups
            status = (process / "status").read_text()
        except OSError:
            continue  # it ended while we looked
        numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
        if in_pod and numbers[-1] == "1":
            return int(process.name)
    raise LookupError(f"no PID 1 of pod {pod_uid}")


def test_apply_is_enough(jobs: Any, undisturbed: dict[str, Any]) -> None:
    row = jobs.kubectl("get", "ptj", "undisturbed", "--no-headers")
    assert "Complete" in row
    assert "60/60" in row
    events = jobs.kubectl("get", "events", "-o", "jsonpath={.items[*].reason}")
    for reason in ("Created", "Training", "Completed"):
        assert reason in events


@pytest.mark.parametrize("index", [0, 1], ids=["leader", "follower"])
def test_a_killed_worker_costs_no_sample(
    jobs: Any, undisturbed: dict[str, Any], index: int
) -> None:
    name = f"killed-{index}"
    jobs.apply(name)
    jobs.wait_for_step(name, 17)
    before = jobs.read(name)
    pod = next(p for p in jobs.pods(name) if p["metadata"]["name"] == jobs.pod(name, index))
    os.kill(pid_one_of(pod["metadata"]["uid"]), signal.SIGKILL)
    after = jobs.wait(name, lambda job: job.generation > before.generation)
    assert after.restarts >= 1
    same_end(jobs, name, undisturbed)
    end = jobs.read(name)
    assert end.resumed_from is not None
    assert end.resumed_from >= 15
    assert end.restarts == 1


def test_a_deleted_pod_is_replaced(jobs: Any, undisturbed: dict[str, Any]) -> None:
    jobs.apply("deleted")
    jobs.wait_for_step("deleted", 12)
    pod = jobs.pod("deleted", 1)
    jobs.kubectl("delete", "pod", pod, "--force", "--grace-period=0")
    jobs.wait("deleted", lambda job: job.generation > 1)
    same_end(jobs, "deleted", undisturbed)
    assert jobs.pod("deleted", 1) != pod


def suspend(jobs: Any, name: str) -> int:
    """Suspends a job and returns the step its workers saved before they left."""
    jobs.patch(name, {"suspend": True})
    jobs.wait(name, lambda job: job.holds(names.SUSPENDED) and not jobs.pods(name))
    folders = jobs.checkpoints(name).glob("step-*/manifest.json")
    return max(int(path.parent.name.removeprefix("step-")) for path in folders)


def test_a_suspended_job_goes_on_where_it_was(jobs: Any, undisturbed: dict[str, Any]) -> None:
    jobs.apply("paused")
    jobs.wait_for_step("paused", 12)
    saved = suspend(jobs, "paused")
    assert saved >= 12
    jobs.patch("paused", {"suspend": False})
    same_end(jobs, "paused", undisturbed)
    assert jobs.read("paused").resumed_from == saved


def test_a_damaged_checkpoint_is_passed_over(jobs: Any, undisturbed: dict[str, Any]) -> None:
    jobs.apply("damaged")
    jobs.wait_for_step("damaged", 12)
    saved = suspend(jobs, "damaged")
    file = next((jobs.checkpoints("damaged") / f"step-{saved}").glob("__1_*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    jobs.patch("damaged", {"suspend": False})
    resumed = jobs.wait("damaged", lambda job: job.resumed_from is not None)
    assert resumed.resumed_from < saved
    jobs.wait("damaged", lambda job: bool(job.checkpoint and job.checkpoint.skipped))
    assert saved in [each.step for each in jobs.read("damaged").checkpoint.skipped]
    same_end(jobs, "damaged", undisturbed)


def test_training_needs_no_operator(jobs: Any, undisturbed: dict[str, Any]) -> None:
    jobs.apply("alone")
    jobs.wait_for_step("alone", 10)
    operator = "--selector=app.kubernetes.io/name=pretrain-operator"
    jobs.target.kubectl("delete", "pod", "--namespace=pretrain-system", operator)
    same_end(jobs, "alone", undisturbed)
    end = jobs.read("alone")
    assert (end.generation, end.restarts) == (1, 0)


def test_deleting_a_job_leaves_nothing_behind(jobs: Any) -> None:
    jobs.apply("gone")
    jobs.wait("gone", lambda job: bool(jobs.pods("gone")))
    jobs.delete("gone")
    selector = f"--selector={names.LABEL_JOB}=gone"
    jobs.kubectl("wait", "pods,configmaps,pvc", selector, "--for=delete", "--timeout=90s")
