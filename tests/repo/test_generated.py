"""Generated pages are fresh, and leave nothing out of what they are generated from."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain_docs import __main__ as program
from pretrain_docs import chart, reference


def test_the_pages_are_fresh() -> None:
    stale = [path for path, text in program.pages().items() if path.read_text() != text]
    assert stale == [], "run `make generate`"


def test_a_stale_page_is_named_and_then_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(program, "pages", lambda: {page: "fresh"})
    assert program.main(["--check"]) == 1
    assert "page.md: stale" in capsys.readouterr().out
    assert not page.exists()
    assert program.main([]) == 0
    assert program.main(["--check"]) == 0


def fields(schema: dict[str, Any]) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        yield name
        yield from fields(field)
        yield from fields(field.get("items", {}))
        if isinstance(field.get("additionalProperties"), dict):
            yield from fields(field["additionalProperties"])


def test_the_reference_has_every_field_once_for_each_place_it_is_at() -> None:
    definition = yaml.safe_load(program.DEFINITION.read_text())
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    expected = sorted([*fields(schema["spec"]), *fields(schema["status"])])
    page = reference.render(definition)
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.M)) == expected


def test_links_within_the_reference_resolve() -> None:
    page = reference.render(yaml.safe_load(program.DEFINITION.read_text()))
    headings = re.findall(r"^## (.*)$", page, re.M)
    anchors = {re.sub(r"[^\w-]", "", heading.lower()) for heading in headings}
    assert len(anchors) == len(headings)
    assert set(re.findall(r"\(#([^)]*)\)", page)) <= anchors


def test_every_cell_of_the_reference_stays_in_its_row() -> None:
    page = reference.render(yaml.safe_load(program.DEFINITION.read_text()))
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}


def leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def test_the_charts_readme_has_every_value_with_its_default_and_a_word_about_it() -> None:
    text = (program.CHART / "values.yaml").read_text()
    told = {value.path: yaml.safe_load(value.default) for value in chart.read(text)}
    assert told == dict(leaves(yaml.safe_load(text)))
    assert [value.path for value in chart.read(text) if not value.text] == []


def test_comments_belong_to_the_key_below_or_to_the_section() -> None:
    text = "# Whose.\nimage:\n  # The name.\n  name: a # inline\n  tag: ''\n\n# Lost.\n\nalone: 1\n"
    rows = [(value.path, value.default, value.text) for value in chart.read(text)]
    assert rows == [
        ("image.name", '"a"', "The name."),
        ("image.tag", '""', "Whose."),
        ("alone", "1", ""),
    ]
