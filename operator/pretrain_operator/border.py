"""What workers send, made safe to believe: every value bounded before anything is decided from it.

A worker runs code that isn't ours. What it says ends up in conditions, Events and metrics, which
have limits of their own: one number that JSON can't carry, or a reason that is too long, would make
every round of its job fail, for ever. So a value beyond its bound is cut or left out here, and
nowhere behind has to ask again.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, cast

from pydantic import ValidationError

from pretrain_api.status import MAX_ATTEMPTS, MAX_MESSAGE
from pretrain_api.wire import Assignment, TerminationMessage, WorkerStatus

MAX_WORKERS = 4096  # of a job, as its schema has it
MAX_INTEGER = 2**53  # what every JSON parser reads exactly
MAX_NUMBER = 1e12  # seconds, tokens per second: far beyond anything measured
MAX_TIME = 253_402_300_799  # the last second of the year 9999
REASON = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")  # one CamelCase word
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
UNKNOWN_REASON = "WorkerFailed"
FAILURES = ("failure", "lastFailure")  # fields that hold a failure


def read_status(text: str | bytes) -> WorkerStatus | None:
    """What a worker answered; None if it makes no sense."""
    found = _parse(text)
    try:
        return WorkerStatus.model_validate(found) if found is not None else None
    except ValidationError:
        return None


def read_termination_message(text: str) -> TerminationMessage | None:
    """What a worker left behind; None if it isn't ours."""
    found = _parse(text)
    try:
        return TerminationMessage.model_validate(found) if found is not None else None
    except ValidationError:
        return None


def read_assignment(text: str) -> Assignment | None:
    """What a worker was told; None if somebody else wrote it."""
    try:
        return Assignment.model_validate_json(text)
    except ValidationError:
        return None


def _parse(text: str | bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            return None
        _keep_ends(cast(dict[str, Any], found))
        document = cast(dict[str, Any], bounded(found))
    except (ValueError, RecursionError):
        return None
    progress = document.get("progress")
    if isinstance(progress, dict):
        _drop_dateless(cast(dict[str, Any], progress))
    for key in FAILURES:
        if isinstance(document.get(key), dict):
            document[key] = _worded(document[key])
    return document


def _keep_ends(document: dict[str, Any]) -> None:
    """Cut the message of a failure to its end, where the tail of a log says what it was.

    Of any other string the start is kept.
    """
    for key in FAILURES:
        failure = cast(dict[str, Any], document.get(key) or {})
        message = failure.get("message") if isinstance(document.get(key), dict) else None
        if isinstance(message, str):
            failure["message"] = message[-MAX_MESSAGE:]


def bounded(value: Any) -> Any:
    """A JSON value with every string, list and number within bounds; entries without are left out.

    Of a list the last items are kept, as many as there are workers if they are indices; of a string
    the first characters.
    """
    if isinstance(value, str):
        # Half a surrogate pair can't be sent on.
        return CONTROLS.sub(" ", value).encode(errors="replace").decode()[:MAX_MESSAGE]
    if isinstance(value, Mapping):
        entries = ((key, bounded(item)) for key, item in cast(Mapping[str, Any], value).items())
        return {key: item for key, item in entries if item is not None}
    if isinstance(value, list):
        items = cast(list[Any], value)
        limit = MAX_WORKERS if all(isinstance(item, int) for item in items) else MAX_ATTEMPTS
        return [item for each in items[-limit:] if (item := bounded(each)) is not None]
    if isinstance(value, float):
        return value if math.isfinite(value) and abs(value) <= MAX_NUMBER else None
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-MAX_INTEGER, min(value, MAX_INTEGER))
    return value


def _drop_dateless(progress: dict[str, Any]) -> None:
    """Leave out a checkpoint whose time is no time: the rest of the report is worth having."""
    checkpoint = progress.get("checkpoint")
    time = cast(Mapping[str, Any], checkpoint).get("time") if isinstance(checkpoint, dict) else None
    if not isinstance(time, int | float) or not 0 <= time <= MAX_TIME:
        progress.pop("checkpoint", None)


def _worded(failure: Mapping[str, Any]) -> dict[str, Any]:
    """A failure whose reason is a word, as conditions and Events take it."""
    reason = failure.get("reason", "RankFailed")
    known = isinstance(reason, str) and REASON.fullmatch(reason)
    return {**failure, "reason": reason if known else UNKNOWN_REASON}
