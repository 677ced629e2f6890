"""Small data sets and configurations for the tests of the data pipeline."""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pretrain_api.config import RunConfig
from pretrain_trainer.data.tokenizer import Tokenizer, load_tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "assets"

MakeConfig = Callable[..., RunConfig]
WriteLines = Callable[[Iterable[str]], Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files of its own, so that no test finds another's index."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(scope="session")
def assets() -> Path:
    return ASSETS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(str(ASSETS / "tokenizer"))


@pytest.fixture
def make_config() -> MakeConfig:
    """A run over the sample corpus; keyword arguments are keys of the section training."""

    def make(**training: Any) -> RunConfig:
        base = {
            "dataset": "jsonl",
            "dataset_path": str(ASSETS / "text" / "corpus.jsonl"),
            "seq_len": 48,
            "local_batch_size": 1,
            "global_batch_size": 8,
        }
        return RunConfig.model_validate({"training": base | training})

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> WriteLines:
    """Writes texts as a JSON lines file and returns its path."""

    def write(texts: Iterable[str]) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write
