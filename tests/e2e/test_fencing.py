"""A worker that is cut off trains on without knowing that it was replaced, and changes nothing."""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain_bench import faults, processes
from pretrain_bench.faults import Scene
from pretrain_bench.jobs import LOOK_SECONDS, Jobs
from pretrain_bench.trial import passed, training

pytestmark = pytest.mark.cluster

KEEP = 3
PATIENCE_SECONDS = 120.0


def committed(root: Path) -> dict[int, int]:
    """Generation that committed each checkpoint of a root, by step."""
    found: dict[int, int] = {}
    for path in root.glob("step-*/manifest.json"):
        try:
            found[int(path.parent.name.removeprefix("step-"))] = json.loads(path.read_text())[
                "generation"
            ]
        except FileNotFoundError:
            continue  # pruned while we looked
    return found


def still_runs(pod: dict[str, Any]) -> bool:
    """Whether a pod's agent is alive, on whatever node."""
    try:
        processes.pid_one(processes.of_pod(faults.uid(pod)), processes.AGENT)
    except LookupError:
        return False
    return True


def reasons(jobs: Jobs) -> Counter[str]:
    """How often the loner was restarted, by reason."""
    restarts = jobs.read("loner").status.restarts
    return Counter(restarts.by_reason if restarts else {})


def test_a_worker_cut_off_trains_on_and_is_fenced_out(
    jobs: Jobs, scene: Callable[[str], Scene]
) -> None:
    jobs.apply(
        "loner",
        training={"steps": 100_000},
        # Slow, so that the run that it is compared with is short.
        workers={"replicas": 1, "resources": {"limits": {"cpu": "400m"}}},
        checkpoint={"keepLatestK": KEEP},  # the one cut off has something to delete
    )
    loner = scene("loner")
    training(loner)
    loner.expose()
    restarts = reasons(jobs)
    old = loner.exposed_worker()
    generation = passed(loner, jobs.hear("loner").step).generation
    root = jobs.checkpoints("loner")
    node = loner.cluster.node(old["spec"]["nodeName"])
    node.cut()
    try:
        cut_at = max(committed(root), default=0)
        after = jobs.wait_heard(
            "loner",
            lambda job: job.generation > generation and faults.trains(job),
            PATIENCE_SECONDS,
            "training elsewhere",
        )
        assert after.generation == generation + 1
        # From here on the new generation holds the fence, and the old one still runs.
        before = committed(root)
        strays = {step for step, by in before.items() if by == generation}
        assert max(before) > cut_at  # it trained on, and its checkpoints were good until then
        newest: list[int] = []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while still_runs(old):
            now = committed(root)
            assert {step for step, by in now.items() if by == generation} <= strays
            assert set(newest) <= now.keys()
            newest = sorted(step for step, by in now.items() if by > generation)[1 - KEEP :]
            assert time.monotonic() < deadline, "the worker cut off never left"
            time.sleep(LOOK_SECONDS)
    finally:
        node.heal()
        loner.wait_for_nodes()
    jobs.wait("loner", lambda _: not faults.alive(loner, old), PATIENCE_SECONDS, "its pod gone")
    job = passed(loner, jobs.hear("loner").step)
    assert job.generation == generation + 1
    assert (reasons(jobs) - restarts).keys() <= {"NodeLost", "Unreachable"}

    def replacement() -> list[int]:
        return [step for step, by in committed(root).items() if by > generation]

    jobs.wait("loner", lambda _: bool(replacement()), what="a checkpoint of its replacement")
    step = max(replacement())
    ours = jobs.digests("loner", step)
    jobs.apply("undisturbed", training={"steps": step})
    jobs.complete("undisturbed")
    theirs = jobs.digests("undisturbed", step)
    assert ours["ledger"] == theirs["ledger"]  # the same samples, though on another layout
