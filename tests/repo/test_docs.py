"""Documentation that points somewhere must point at something that exists."""

import re
import subprocess
from pathlib import Path

import pytest

LINK = re.compile(r"\[[^\]]*\]\((?!https?://|mailto:|#)([^)#\s]+)[^)]*\)")
MAKE = re.compile(r"(?:^|[\s`])make ([a-z][a-z-]*)")


def pages(repository: Path) -> list[Path]:
    return [*sorted(repository.glob("*.md")), *sorted((repository / "docs").rglob("*.md"))]


def test_links_between_pages_resolve(repository: Path) -> None:
    broken = [
        f"{page.relative_to(repository)} -> {target}"
        for page in pages(repository)
        for target in LINK.findall(page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_make_verbs_in_the_docs_exist(repository: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (repository / "Makefile").read_text(), re.M))
    mentioned = {
        verb
        for page in pages(repository)
        for block in re.findall(r"```.*?```|`[^`\n]+`", page.read_text(), re.S)
        for verb in MAKE.findall(block)
    }
    assert {"demo", "test"} <= mentioned
    assert mentioned - targets == set()


@pytest.mark.parametrize(
    "verb", ["setup", "test", "unit", "demo", "lint", "up", "down", "generate"]
)
def test_make_help_lists_every_verb(repository: Path, verb: str) -> None:
    text = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert re.search(rf"^\s*(\x1b\[\d+m)?{verb}\b", text, re.M), text


def test_the_readme_shows_an_example_that_is_shipped(repository: Path) -> None:
    # The YAML in the README is one of the tested examples, so it can't rot on its own.
    blocks = re.findall(r"```yaml\n(.*?)```", (repository / "README.md").read_text(), re.S)
    examples = [
        "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
        for path in sorted((repository / "manifests" / "examples").glob("*.yaml"))
    ]
    jobs = [block for block in blocks if "kind: PretrainJob" in block]
    assert jobs
    assert [job for job in jobs if not any(job.strip() in example for example in examples)] == []


def test_every_proof_in_the_docs_is_a_test_that_exists(repository: Path) -> None:
    missing = []
    for page in pages(repository):
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
            source = repository / file
            if not source.exists() or f"def {name}(" not in source.read_text():
                missing.append(f"{page.name}: {file}::{name}")
    assert missing == []
