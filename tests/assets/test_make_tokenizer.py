"""The sample files are those the script makes from the texts."""

import subprocess
import sys
from pathlib import Path

import pytest

ASSETS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes, run in a process of its own."""
    target = tmp_path_factory.mktemp("assets")
    subprocess.run([sys.executable, ASSETS / "make_tokenizer.py", target], check=True, timeout=120)
    return target


@pytest.mark.parametrize(
    "file", ["text/corpus.jsonl", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
)
def test_the_script_makes_the_committed_file(made: Path, file: str) -> None:
    assert (made / file).read_bytes() == (ASSETS / file).read_bytes()


def test_every_text_is_named_with_its_source_in_the_readme() -> None:
    readme = (ASSETS / "README.md").read_text()
    for path in (ASSETS / "text").glob("*.txt"):
        assert f"`text/{path.name}`" in readme
