"""A recovery is split at the moments that ended its stages, whatever was or wasn't seen."""

from typing import Any

import pytest

from pretrain_api.wire import Timeline
from pretrain_bench.recorder import Sighting
from pretrain_bench.stages import STAGES, Marks, in_place, new_generation

FAULT = 100.0
LINE = Timeline(
    generation=2, round=0, stopped=101.5, joined=104.0, started=104.5, load=105.0,
    first_step=106.0, trained=107.0,
)  # fmt: skip


def job(at: float, generation: int) -> Sighting:
    return Sighting(at, "job", False, {"status": {"assignment": {"generation": generation}}})


def pod(at: float, name: str, node: str | None = None, deleted: bool = False, **status: Any) -> Any:
    spec = {"nodeName": node} if node else {}
    body = {"metadata": {"name": name}, "spec": spec, "status": status}
    return Sighting(at, "pod", deleted, body)


ENDED = {"containerStatuses": [{"state": {"terminated": {"exitCode": 137}}}]}
REPLACED = [
    pod(100.5, "a-0", "node1", containerStatuses=[{"state": {"running": {}}}]),
    pod(101.0, "a-1", "node2", **ENDED),
    job(101.2, 1),
    job(101.4, 2),
    pod(101.5, "b-1"),
    pod(101.9, "b-1", "node2"),
    pod(102.2, "b-1", "node2"),
    pod(103.0, "a-1", "node2", deleted=True),
]


def test_a_replaced_pod_has_every_stage() -> None:
    kept = LINE.model_copy(update={"joined": 101.8})
    marks = new_generation(FAULT, 1, {"a-0", "a-1"}, REPLACED, {"a-0": kept, "b-1": LINE})
    seconds = marks.durations(FAULT)
    expected = (1.0, 0.4, 0.5, 2.1, 0.5, 1.5, 1.0)
    assert seconds == pytest.approx(dict(zip(STAGES, expected, strict=True)))
    assert sum(expected) == pytest.approx((LINE.trained or 0) - FAULT)


def test_a_silent_loss_is_known_by_what_is_decided() -> None:
    silent = [sight for sight in REPLACED if sight.at != 101.0]
    marks = new_generation(FAULT, 1, {"a-0", "a-1"}, silent, {"b-1": LINE})
    seconds = marks.durations(FAULT)
    assert seconds["detect"] == pytest.approx(1.4)
    assert seconds["decide"] is None


def test_a_pod_of_an_older_world_that_goes_at_last_is_no_sign() -> None:
    late = [pod(100.1, "old", "node1", deleted=True), *REPLACED]
    marks = new_generation(FAULT, 1, {"a-0", "a-1"}, late, {"b-1": LINE})
    assert marks.detect == 101.0


def test_a_world_that_only_shrinks_schedules_and_starts_nothing() -> None:
    marks = new_generation(FAULT, 1, {"a-0", "a-1"}, REPLACED, {"a-0": LINE})
    seconds = marks.durations(FAULT)
    assert (seconds["schedule"], seconds["start"]) == (None, None)
    assert seconds["meet"] == pytest.approx(104.5 - 101.4)


def test_a_restart_in_place_waits_for_the_slowest() -> None:
    slow = Timeline(stopped=101.7, joined=104.2, started=104.6, first_step=106.5, trained=107.0)
    seconds = in_place([LINE, slow]).durations(FAULT)
    assert [stage for stage in STAGES if seconds[stage] is None] == ["schedule", "start"]
    shown = {stage: value for stage, value in seconds.items() if value is not None}
    expected = {"detect": 1.5, "decide": 2.7, "meet": 0.4, "load": 1.9, "first step": 0.5}
    assert shown == pytest.approx(expected)


def test_what_overlaps_is_counted_once() -> None:
    marks = Marks(detect=103.0, decide=102.0, meet=104.0, load=104.0, first_step=105.0)
    seconds = marks.durations(FAULT)
    assert seconds["decide"] == 0.0
    assert sum(value for value in seconds.values() if value) == pytest.approx(5.0)
