"""Features that aren't built are refused with the value to go back to."""

from typing import Any

import pytest
from pydantic import ValidationError

from pretrain_api.config import RunConfig
from pretrain_api.support import REFINEMENTS, UNBUILT, Unbuilt

# A value that asks for the feature, where it can't be made from the inactive one.
ASKS_FOR: dict[str, Any] = {
    "checkpoint.async_mode": "async",
    "comm.trace_buf_size": 20_000,
    "fault_tolerance.semi_sync_method": "diloco",
    "job.config_file": "other.toml",
    "model.tokenizer_path": "tokenizer.model",
    "optimizer.name": "Adam",
}


def at(path: str, value: Any) -> dict[str, Any]:
    """A configuration with one key set."""
    *sections, key = path.split(".")
    data: dict[str, Any] = {"training": {"dataset": "c4"}}
    target = data
    for section in sections:
        target = target.setdefault(section, {})
    target[key] = value
    return data


def asking(entry: Unbuilt) -> Any:
    if entry.path in ASKS_FOR:
        return ASKS_FOR[entry.path]
    (inactive,) = entry.inactive
    if isinstance(inactive, bool):
        return not inactive
    return inactive + 1 if isinstance(inactive, int) else "mine"


@pytest.mark.parametrize("entry", UNBUILT, ids=lambda entry: entry.path)
def test_inactive_values_are_accepted(entry: Unbuilt) -> None:
    for value in entry.inactive:
        RunConfig.model_validate(at(entry.path, list(value) if value == () else value))


@pytest.mark.parametrize("entry", UNBUILT, ids=lambda entry: entry.path)
def test_any_other_value_is_refused_by_name(entry: Unbuilt) -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(at(entry.path, asking(entry)))
    (error,) = caught.value.errors()
    assert error["type"] == "unsupported"
    assert "is not supported yet; " in error["msg"]
    spelled = "".join(part.lower() for part in entry.path.replace("_", "").split("."))
    assert "".join(map(str, error["loc"])).lower() == spelled


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (
            "comm.trace_buf_size",
            8,
            "8 is not supported yet; leave it at 0",
        ),
        (
            "checkpoint.async_mode",
            "async",
            '"async" is not supported yet; leave it at "disabled"',
        ),
        (
            "model.tokenizer_path",
            "t.model",
            '"t.model" is not supported yet; use model.hf_assets_path',
        ),
        (
            "job.config_file",
            "x.toml",
            '"x.toml" is not supported yet; it is an option of the command line; remove it',
        ),
    ],
)
def test_sentences(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(at(path, value))
    assert [error["msg"] for error in caught.value.errors()] == [sentence]


def test_all_unbuilt_features_are_reported_at_once() -> None:
    data = at("comm.trace_buf_size", 2)
    data["checkpoint"] = {"async_mode": "async"}
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(data)
    assert caught.value.error_count() == 2


def test_refinements_of_unbuilt_features_are_accepted() -> None:
    RunConfig.model_validate(at("profiling.profile_freq", 100))
    assert "profiling.profile_freq" in REFINEMENTS
