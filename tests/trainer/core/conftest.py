"""Runs that take a second: the tiny model, 32 tokens, a few dozen documents."""

import json
import logging
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain_api.config import RunConfig
from pretrain_trainer import train

WORDS = ("the", "of", "light", "ray", "glass", "red", "blue", "angle", "refraction", "prism", "sun")

Sections = dict[str, dict[str, Any]]


@dataclass
class Outcome:
    """What rank 0 saw of a run: exit code of main(), and what it reported of each step."""

    code: int
    reports: list[dict[str, Any]]

    @property
    def losses(self) -> dict[int, float]:
        return {report["step"]: report["loss"] for report in self.reports}


class Reports(logging.Handler):
    """Collects the fields of the log lines that report a step."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", {})
        if "loss" in fields:
            self.found.append(fields)


def run_main(config: RunConfig, kill_at: int | None) -> tuple[int, list[dict[str, Any]]]:
    """One rank of a run: its exit code and reports, plain because they leave this process.

    The last rank kills itself when it is about to start step ``kill_at``.
    """
    path = Path(config.job.dump_folder) / f"run-{os.environ['RANK']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.model_dump_json())
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    real_step = train.run_step

    def deadly_step(machine: Any, state: Any, *rest: Any) -> Any:
        if last and state.step + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_step(machine, state, *rest)

    reports = Reports()
    logging.getLogger("pretrain_trainer.telemetry").addHandler(reports)
    train.run_step = deadly_step
    try:
        train.main(str(path))
        return 0, reports.found
    except SystemExit as ending:
        return int(ending.code or 0), reports.found
    finally:
        train.run_step = real_step
        logging.getLogger("pretrain_trainer.telemetry").removeHandler(reports)


@pytest.fixture
def run(ranks: Callable[..., Any]) -> Callable[..., Outcome]:
    """Runs the trainer's main() on so many ranks; the outcome of rank 0."""

    def start(size: int, config: RunConfig, timeout: float = 120, **environment: str) -> Outcome:
        outcomes = ranks(size, run_main, config, None, timeout=timeout, environment=environment)
        assert len({code for code, _ in outcomes}) == 1
        return Outcome(*outcomes[0])

    return start


@pytest.fixture
def run_until_killed(ranks: Callable[..., Any]) -> Callable[..., None]:
    """The same, but one rank is killed before it starts a given step, and the others with it."""

    def start(size: int, config: RunConfig, kill_at: int) -> None:
        with pytest.raises(AssertionError, match="without an answer"):
            ranks(size, run_main, config, kill_at)

    return start


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of 5 to 60 words."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    texts = (" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(60))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def run_config(repository: Path, tmp_path: Path, documents: Path) -> Callable[..., RunConfig]:
    """Makes a configuration; keyword arguments are sections with the keys to change.

    float32 throughout, because these tests compare numbers; and a large epsilon, because with a
    small one Adam turns rounding errors of vanishing gradients into whole steps.
    """
    base: Sections = {
        "job": {"dump_folder": str(tmp_path / "output")},
        "model": {
            "flavor": "tiny",
            "hf_assets_path": str(repository / "tests" / "assets" / "tokenizer"),
        },
        "training": {
            "dataset": "jsonl",
            "dataset_path": str(documents),
            "seq_len": 32,
            "local_batch_size": 1,
            "global_batch_size": 4,
            "steps": 4,
            "seed": 7,
            "mixed_precision_param": "float32",
        },
        "optimizer": {"lr": 3e-3, "eps": 1e-4},
        "lr_scheduler": {"warmup_steps": 2},
        "activation_checkpoint": {"mode": "none"},
        "checkpoint": {"enable": True, "interval": 2, "last_save_model_only": False},
        "metrics": {"log_freq": 1},
    }

    def make(**changes: dict[str, Any]) -> RunConfig:
        sections = (*base, *(name for name in changes if name not in base))
        return RunConfig.model_validate(
            {name: {**base.get(name, {}), **changes.get(name, {})} for name in sections}
        )

    return make


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[RunConfig, int], dict[str, Tensor]]:
    """All tensors of a run's checkpoint, whole, by dotted name; read by torch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    def read(config: RunConfig, step: int) -> dict[str, Tensor]:
        folder = Path(config.job.dump_folder) / config.checkpoint.folder / f"step-{step}"
        dcp_to_torch_save(folder, tmp_path / "whole.pt")
        return dict(leaves(torch.load(tmp_path / "whole.pt", weights_only=True)))

    return read


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
