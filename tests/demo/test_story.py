"""What the demo says about a job, from the status alone."""

import io
import json
from typing import Any

import pytest

from pretrain_demo.console import Console
from pretrain_demo.install import image_values, set_flags
from pretrain_demo.job import Snapshot, bar
from pretrain_demo.story import Kill, summary, worth_killing


def snapshot(**status: Any) -> Snapshot:
    return Snapshot.parse(json.dumps({"status": status}))


def running(step: int, saved: int | None, steps: int = 100) -> Snapshot:
    condition = {
        "type": "Running",
        "status": "True",
        "reason": "Training",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    status: dict[str, Any] = {
        "conditions": [condition],
        "progress": {"step": step, "steps": steps, "loss": 4.5, "firstLoss": 7.25},
        "restarts": {"total": 1, "byReason": {"PodDeleted": 1}},
    }
    if saved is not None:
        status["checkpoint"] = {
            "step": saved,
            "time": "2026-01-01T00:00:00Z",
            "path": f"checkpoint/step-{saved}",
            "bytes": 12_300_000,
        }
    return snapshot(**status)


def test_a_job_nobody_has_seen_yet_is_pending() -> None:
    assert Snapshot.parse("{}").line() == "Pending"


def test_the_line_tells_how_far_it_is() -> None:
    line = running(50, 40).line()
    for part in ("step  50/100", "loss 4.500", "checkpoint 40", "restarts 1", "█" * 12 + "░" * 12):
        assert part in line


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (running(25, 20), True),
        (running(25, None), False),  # nothing to come back to
        (running(20, 20), False),  # nothing to lose
        (running(65, 60), False),  # too late to be a middle
        (Snapshot.parse("{}"), False),
    ],
)
def test_the_worker_is_killed_in_the_middle(job: Snapshot, expected: bool) -> None:
    assert worth_killing(job) is expected


def test_the_summary_names_what_the_demo_promises() -> None:
    text = "\n".join(summary(running(100, 100), Kill("pair-1-1", 55, 12.34)))
    for part in ("100 of 100", "7.250 at first, 4.500 at last", "1 (PodDeleted 1)", "12.3"):
        assert part in text
    assert "step 100, 12.3 MB, checkpoint/step-100 in claim pair-checkpoint" in text


def test_the_leader_knows_better_than_the_status() -> None:
    job = Snapshot.parse(
        '{"status": {"assignment": {"generation": 2}, "progress": {"step": 40, "steps": 100}}}'
    )
    fresh = '{"generation": 2, "progress": {"step": 47, "steps": 100, "loss": 3.5}}'
    assert (job.heard(fresh).step, job.heard(fresh).loss) == (47, 3.5)
    stale = '{"generation": 1, "progress": {"step": 55, "steps": 100}}'
    for answer in (stale, "", "Error from server", '{"generation": 2}'):
        assert job.heard(answer).step == 40


def test_the_line_does_not_go_back_when_the_leader_falls_silent() -> None:
    status = '{"status": {"assignment": {"generation": %d}, "progress": {"step": %d}}}'
    fresh = '{"generation": 2, "progress": {"step": 95, "steps": 100}}'
    heard = Snapshot.parse(status % (2, 80)).heard(fresh)
    assert Snapshot.parse(status % (2, 85)).after(heard).step == 95
    assert Snapshot.parse(status % (2, 100)).after(heard).step == 100
    assert Snapshot.parse(status % (3, 80)).after(heard).step == 80  # resumed, some steps back
    assert Snapshot.parse(status % (2, 85)).after(None).step == 85


def test_a_log_gets_each_line_once() -> None:
    out = io.StringIO()
    console = Console(out)
    for text in ("one", "one", "two", "two"):
        console.live(text)
    assert [line.split()[-1] for line in out.getvalue().splitlines()] == ["one", "two"]
    assert "\033" not in out.getvalue()


def test_a_terminal_gets_one_line_that_changes() -> None:
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    console = Console(out)
    console.live("one")
    console.live("two")
    console.say("done")
    assert out.getvalue().count("\n") == 2
    assert out.getvalue().count("\r") == 2


def test_the_bar_is_never_longer_than_itself() -> None:
    assert {len(bar(done, 7)) for done in range(20)} == {24}


@pytest.mark.parametrize(
    ("reference", "values"),
    [
        (
            "172.30.0.3:5000/pretrain-operator@sha256:ab",
            {
                "registry": "172.30.0.3:5000",
                "repository": "pretrain-operator",
                "digest": "sha256:ab",
            },
        ),
        (
            "registry.example/team/trainer:v1",
            {"registry": "registry.example/team", "repository": "trainer", "tag": "v1"},
        ),
        (
            "a:5000/b:dev@sha256:cd",
            {"registry": "a:5000", "repository": "b", "digest": "sha256:cd"},
        ),
    ],
)
def test_image_references_become_chart_values(reference: str, values: dict[str, str]) -> None:
    assert image_values(reference) == values


def test_helm_reads_values_as_they_are() -> None:
    assert set_flags({"image": {"tag": "1.10"}}) == ['--set-json=image={"tag": "1.10"}']
