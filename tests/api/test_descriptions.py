"""What `kubectl explain` shows of a single field must make sense to somebody who sees nothing else.

Whether a description is true or well put needs a reader. That it is a sentence of its own, says
more than the name, has a unit and a default and names keys as YAML does, can be checked.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from pretrain_api import crd
from pretrain_api.schema import aliases
from pretrain_api.support import REFINEMENTS, UNBUILT

Schema = dict[str, Any]
Field = tuple[str, Schema, bool]  # path, schema, whether it must be there

# What a number may be of; other numbers are unclear.
UNITS = re.compile(
    r"\b(number|seconds|milliseconds|bytes|percent|tokens|steps?|share|rate|decay|norm|loss"
    r"|workers|ranks?|generation|seed|code|difference)\b",
    re.I,
)
UNIT_OF_NAME = {"Seconds": "second", "Ms": "millisecond", "Percent": "percent", "Steps": "steps"}
# Words that say nothing without the name of the field or its neighbours.
DANGLING = re.compile(
    r"^(Its?|Both|They|Those|These|That|This|Such)\b|\b(that|those) (pod|file)s?\b"
)
FILLERS = {"the", "a", "an", "of", "to", "in", "is", "and", "or", "for", "with", "this", "that"}


def fields(schema: Schema, path: str) -> Iterator[Field]:
    """Every property below a schema, and what it is a property of."""
    for name, inner in schema.get("properties", {}).items():
        yield f"{path}.{name}", inner, name in schema.get("required", ())
        yield from fields(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from fields(schema[key], f"{path}[]")


def part(name: str) -> list[Field]:
    root = crd.definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return [(name, root["properties"][name], True), *fields(root["properties"][name], name)]


SPEC, STATUS = part("spec"), part("status")
ALL = SPEC + STATUS


def offenders(wrong: Any, among: list[Field] = ALL) -> list[str]:
    return [
        f"{path}: {each.get('description')}"
        for path, each, must in among
        if wrong(path, each, must)
    ]


def own_words(path: str, text: str) -> set[str]:
    """Words of a description that the name of its field does not have."""
    name = re.findall(r"[a-z]+", re.sub(r"([A-Z])", r" \1", path.rpartition(".")[2]).lower())
    said = re.findall(r"[a-z]+", text.lower())
    return {word for word in said if word not in FILLERS and word.rstrip("s") not in name} - {*name}


def test_there_is_much_to_read() -> None:
    assert len(SPEC) > 200
    assert len(STATUS) > 80


def test_each_is_a_sentence_on_one_line() -> None:
    sentence = re.compile(r"[A-Z][^\n]*\.")
    assert offenders(lambda _, each, __: not sentence.fullmatch(each.get("description", ""))) == []


def test_each_says_more_than_the_name_and_stands_alone() -> None:
    def empty(path: str, each: Schema, _: bool) -> bool:
        first = re.split(r"\.(?: |$)", each["description"])[0]
        return len(own_words(path, first)) < 2 or bool(DANGLING.search(each["description"]))

    assert offenders(empty) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [("spec.seqLen", "The seq len."), ("spec.name", "Name."), ("spec.job", "A job.")],
)
def test_a_name_that_is_repeated_is_noticed(path: str, text: str) -> None:
    assert len(own_words(path, text)) < 2


def test_numbers_have_a_unit() -> None:
    def unclear(path: str, each: Schema, _: bool) -> bool:
        units = [unit for end, unit in UNIT_OF_NAME.items() if path.endswith(end)]
        text = each["description"].lower()
        is_number = each.get("type") in ("integer", "number")
        return any(unit not in text for unit in units) or (is_number and not UNITS.search(text))

    assert offenders(unclear) == []


def test_quantities_are_bytes_with_an_example() -> None:
    quantities = [field for field in ALL if "[KMGTPE]i" in field[1].get("pattern", "")]
    assert {path.rpartition(".")[2] for path, *_ in quantities} == {"storage", "sizeLimit"}
    assert (
        offenders(lambda _, q, __: not re.search(r"bytes.*\dGi", q["description"]), quantities)
        == []
    )


def test_what_may_be_left_out_says_what_follows() -> None:
    """A list or an object that is left out is empty; anything else needs a word."""
    whole = ("object", "array")
    silent = offenders(
        lambda _, each, must: (
            not must
            and each.get("type") not in whole
            and not re.search(r"Default: |Unset\b|unset\b|Set either", each["description"])
        ),
        SPEC,
    )
    assert silent == []


def test_keys_are_spelled_as_in_yaml() -> None:
    keys = {path.rpartition(".")[2] for path, *_ in ALL}
    words = {word for _, each, _ in ALL for word in each.get("enum", ())}
    words |= {w for _, each, _ in ALL for w in each.get("items", {}).get("enum", ())}
    for path, each, _ in ALL:
        for token in re.findall(r"[a-z][a-z0-9_.]*_[a-z0-9_.]*[a-z0-9]", each["description"]):
            assert token in words or not keys.issuperset(aliases(token)), f"{path}: {token}"


def test_what_is_not_supported_yet_says_so() -> None:
    told = {path for path, each, _ in SPEC if "not supported yet." in each["description"].lower()}
    paths = {*REFINEMENTS, *(entry.path for entry in UNBUILT)}
    assert told == {".".join(["spec", *aliases(path)]) for path in paths}
