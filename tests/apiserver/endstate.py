"""What two runs of the same workflow must agree on: the status without clocks and dice."""

import re
from typing import Any

# When, where and how fast: different in every run.
VARYING = {
    "announced", "completionTime", "created", "ended", "eta", "goodput", "ip", "lastTransitionTime",
    "leader", "nonce", "notBefore", "ordered", "selector", "startTime", "started", "time",
    "tokensPerSecond", "uid", "until", "updated",
}  # fmt: skip
BLURRED = ("assignment", "attempts")
ADDRESS = re.compile(r"\b127(\.\d+){3}\b")
NODE = re.compile(r"\blab-\d+-(\d)\b")
UID = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
SECONDS = re.compile(r"\b\d+ s\b")
MASKS = {ADDRESS: "ADDRESS", NODE: r"node-\1", UID: "UID", SECONDS: "some seconds"}


def masked(value: Any) -> Any:
    """A status with everything left out that no two runs have in common."""
    if isinstance(value, dict):
        return {key: masked(each) for key, each in sorted(value.items()) if key not in VARYING}
    if isinstance(value, list):
        return [masked(each) for each in value]
    if isinstance(value, str):
        for pattern, word in MASKS.items():
            value = pattern.sub(word, value)
        return value
    return value


def blurred(state: dict[str, Any], fields: frozenset[str]) -> dict[str, Any]:
    """A state without these fields of its assignment and its attempts."""
    status = state["status"]
    if status is None:
        return state
    parts = {key: _without(status[key], fields) for key in BLURRED if key in status}
    return {**state, "status": {**status, **parts}}


def _without(value: Any, fields: frozenset[str]) -> Any:
    if isinstance(value, list):
        return [_without(each, fields) for each in value]
    return {key: each for key, each in value.items() if key not in fields}


def difference(expected: Any, found: Any, where: str = "") -> list[str]:
    """Where two states differ, one line each."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted(expected.keys() | found.keys())
        return [
            line
            for key in keys
            for line in difference(expected.get(key), found.get(key), f"{where}.{key}")
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for i, (a, b) in pairs for line in difference(a, b, f"{where}[{i}]")]
    return [] if expected == found else [f"{where.lstrip('.')}: {expected!r} became {found!r}"]
