"""The documents between operator and workers: small, tolerant, in camelCase."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_api.wire import (
    TERMINATION_MESSAGE_LIMIT,
    Assignment,
    Failure,
    Order,
    Progress,
    Result,
    SkippedCheckpoint,
    TerminationMessage,
    WorkerStatus,
)


def test_an_assignment_travels_in_camel_case_without_empty_fields() -> None:
    place = Assignment(generation=2, size=4, leader="10.0.0.1:8477", nonce="n")
    assert place.to_json() == (
        '{"generation":2,"size":4,"leader":"10.0.0.1:8477","nonce":"n","orders":"none"}'
    )
    assert Assignment.model_validate_json(place.to_json()) == place


def test_newer_peers_are_understood() -> None:
    status = WorkerStatus.model_validate_json('{"generation": 3, "fromTheFuture": {"a": 1}}')
    assert status.generation == 3
    assert status.progress == Progress()


@pytest.mark.parametrize("field", ["generation", "size"])
def test_impossible_places_are_refused(field: str) -> None:
    data = {"generation": 1, "size": 1, "leader": "h:1", "nonce": "n", field: 0}
    with pytest.raises(ValueError, match=field):
        Assignment.model_validate(data)


def test_orders_are_words() -> None:
    text = '{"generation":1,"size":1,"leader":"h:1","nonce":"n","orders":"drain"}'
    assert Assignment.model_validate_json(text).orders is Order.DRAIN


def message(text: str) -> TerminationMessage:
    return TerminationMessage(
        result=Result.FAILED, generation=3, exit_code=1, failure=Failure(rank=1, message=text)
    )


@given(st.text(max_size=9000))
def test_a_termination_message_fits_and_keeps_the_end(text: str) -> None:
    data = message(text).to_bytes()
    assert len(data) <= TERMINATION_MESSAGE_LIMIT
    back = TerminationMessage.model_validate_json(data)
    assert back.failure is not None
    assert text.endswith(back.failure.message)
    assert back.generation == 3


@pytest.mark.parametrize(("character", "size"), [("x", 1), ("é", 2), ("\n", 2), ("\x00", 6)])
def test_as_much_as_fits_is_kept(character: str, size: int) -> None:
    data = message(character * 9000).to_bytes()
    assert TERMINATION_MESSAGE_LIMIT - size < len(data) <= TERMINATION_MESSAGE_LIMIT


def test_a_short_message_is_left_alone() -> None:
    back = TerminationMessage.model_validate_json(message("KeyError: 'x'").to_bytes())
    assert back == message("KeyError: 'x'")


@pytest.mark.parametrize("failure", [None, Failure(rank=3, message="x" * 9000 + "the end")])
def test_a_long_list_of_skipped_checkpoints_gives_way(failure: Failure | None) -> None:
    skipped = tuple(SkippedCheckpoint(step=n, reason="bit flip in a chunk " * 5) for n in range(50))
    progress = Progress(step=10, skipped=skipped)
    data = TerminationMessage(result=Result.FAILED, progress=progress, failure=failure).to_bytes()
    assert len(data) <= TERMINATION_MESSAGE_LIMIT
    back = TerminationMessage.model_validate_json(data)
    assert back.progress == Progress(step=10)
    if failure is not None:
        assert back.failure is not None
        assert back.failure.message.endswith("the end")
        assert len(back.failure.message) > 3000


def test_a_list_of_skipped_checkpoints_stays_where_the_failures_text_can_give_way() -> None:
    progress = Progress(skipped=(SkippedCheckpoint(step=1, reason="a chunk is damaged"),))
    long = TerminationMessage(
        result=Result.FAILED, progress=progress, failure=Failure(message="x" * 9000)
    )
    assert TerminationMessage.model_validate_json(long.to_bytes()).progress == progress
