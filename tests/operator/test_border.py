"""What a worker says can't make a round fail, whatever it is."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_api import names
from pretrain_api.status import MAX_ATTEMPTS, MAX_MESSAGE, JobPhase
from pretrain_api.wire import Failure, Progress, Result
from pretrain_operator.actions import Notice
from pretrain_operator.apply import build_event
from pretrain_operator.border import MAX_NUMBER, bounded, read_status, read_termination_message
from pretrain_operator.testing import Bench, message

NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "1e300", "-1", "0", "1" + "0" * 400, "null"]
FIELDS = ["step", "steps", "tokens", "loss", "mfu", "stepSeconds", "tokensPerSecond", "resumedFrom"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("field", [*FIELDS, "time"])
async def test_no_number_stops_a_round(bench: Bench, field: str, number: str) -> None:
    await bench.submit(recovery={"backoffSeconds": 0})
    await bench.train()
    checkpoint = {"step": 3, "time": 1.0, "path": "x", "bytes": 1}
    values = {"step": 5, "steps": 9, "stepSeconds": 1.0, "mfu": 0.5, "checkpoint": checkpoint}
    (checkpoint if field == "time" else values)[field] = "NUMBER"
    said = json.dumps({"generation": 1, "rank": 0, "phase": "step", "progress": values})
    report = read_status(said.replace('"NUMBER"', number))
    if report is not None:
        bench.workers.reports["llama-0-1"] = report
        bench.cluster.advance(11)
        await bench.settle()
        assert bench.status.phase is JobPhase.RUNNING
    ended = json.dumps({"result": "failed", "generation": 1, "rank": 0, "progress": values})
    bench.cluster.finish("llama-0-1", 1, ended.replace('"NUMBER"', number))
    await bench.settle()
    json.dumps(bench.status.to_dict(), allow_nan=False)
    assert len(bench.status.attempts) == 1


@pytest.mark.parametrize("reason", ["x" * 4000, "no word", "", "\u0007", "Bösewicht"])
async def test_a_reason_is_a_word(bench: Bench, reason: str) -> None:
    await bench.submit()
    await bench.train()
    failure = Failure(reason=reason, message="\x00boom")
    bench.cluster.finish(
        "llama-1-1",
        1,
        json.dumps(
            {
                "result": "failed",
                "generation": 1,
                "rank": 1,
                "failure": failure.model_dump(by_alias=True),
            }
        ),
    )
    await bench.settle()
    assert bench.condition(names.RESTARTING) == ("True", "WorkerFailed")
    assert bench.status.attempts[-1].message.endswith(" boom")


def test_a_bad_checkpoint_costs_only_itself() -> None:
    done = message(Result.COMPLETE, Progress(step=9, steps=9)).to_bytes().decode()
    broken = json.loads(done)
    broken["progress"]["checkpoint"] = {"step": 9, "time": 1e300, "path": "x", "bytes": 1}
    found = read_termination_message(json.dumps(broken))
    assert found is not None
    assert (found.result, found.progress.step, found.progress.checkpoint) == ("complete", 9, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=60,
)


@settings(max_examples=100, deadline=None)
@given(value=JSON)
def test_everything_is_bounded_and_can_be_sent_on(value: Any) -> None:
    found = bounded(value)
    json.dumps(found, allow_nan=False).encode()
    for item in walk(found):
        assert not isinstance(item, str) or len(item) <= MAX_MESSAGE
        assert not isinstance(item, float) or abs(item) <= MAX_NUMBER
    assert bounded(found) == found


def test_a_leader_may_wait_for_thousands() -> None:
    said = {"waitingFor": list(range(5000)), "names": ["x"] * 5000}
    found = bounded(said)
    assert found["waitingFor"] == list(range(904, 5000))
    assert len(found["names"]) == MAX_ATTEMPTS


def walk(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(deeper for item in inner for deeper in walk(item))]


def test_an_events_note_fits_in_bytes() -> None:
    meta = {"name": "a", "namespace": "b", "uid": "c", "resourceVersion": "1"}
    note = build_event({"metadata": meta}, Notice("R", "ä" * 1024))["note"]
    assert note == "ä" * 512
