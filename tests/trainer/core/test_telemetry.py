"""Numbers that people compare must mean what they say."""

import dataclasses
import io
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from pretrain_api.config import RunConfig
from pretrain_api.flavors.llama3 import FLAVORS
from pretrain_api.wire import Progress
from pretrain_trainer.agreement import Count
from pretrain_trainer.logs import HumanLines, JsonLines
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.settings import Place
from pretrain_trainer.state import TrainState
from pretrain_trainer.step import StepReport
from pretrain_trainer.telemetry import Telemetry, log_fields, log_line, mfu
from pretrain_trainer.world import World

PROGRESS = Progress(
    step=20,
    steps=1000,
    tokens=81_920,
    loss=6.54321,
    first_loss=10.9,
    grad_norm=1.5,
    learning_rate=3e-4,
    tokens_per_second=12_345.6,
    mfu=0.345,
    step_seconds=0.75,
    data_wait_seconds=0.001,
)


def test_mfu_is_a_fraction_of_the_peak_and_unknown_without_one() -> None:
    # Llama 3.1 8B at 8192 tokens: 57.9 GFLOP per token, so 17,077 tokens/s would be the peak.
    assert mfu(17_077, 57_911_574_528, 989e12) == pytest.approx(1.0, abs=1e-3)
    assert mfu(1000, 57_911_574_528, None) is None


def test_line_for_people_is_aligned() -> None:
    early = PROGRESS.model_copy(update={"step": 1, "loss": 11.0, "mfu": None})
    line = log_line(PROGRESS)
    assert line.startswith("step   20/1000  loss   6.5432  grad    1.500  lr 3.00e-04")
    assert line.endswith("12,346 tok/s    0.750 s/step  mfu  34.5%")
    assert line.index("loss") == log_line(early).index("loss")
    assert "nan" in log_line(PROGRESS.model_copy(update={"loss": None}))


def logged(formatter: logging.Formatter, level: int, message: str, **extra: Any) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.log(level, message, **extra)
    return stream.getvalue()


def test_line_for_machines_is_json_with_the_numbers() -> None:
    fields = log_fields(PROGRESS)
    text = logged(JsonLines(rank=0), logging.INFO, "two\nlines", extra={"fields": fields})
    assert text.count("\n") == 1
    line = json.loads(text)
    assert line["message"] == "two\nlines"
    assert (line["level"], line["rank"], line["step"], line["loss"]) == ("info", 0, 20, 6.54321)
    assert "checkpoint" not in line


def test_people_see_levels_only_where_they_matter() -> None:
    assert "info" not in logged(HumanLines(), logging.INFO, "hello")
    assert "warning: careful" in logged(HumanLines(), logging.WARNING, "careful")


@dataclass
class TinyWorld:
    """What telemetry looks at of a world."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    place: Place = field(default_factory=Place)


@pytest.fixture
def telemetry(run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> Telemetry:
    """That of a rank alone, whose sums are its own numbers."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    shape = dataclasses.replace(FLAVORS["tiny"], vocab_size=64)
    model = Llama3(shape, seq_len=8)
    return Telemetry(run_config(), cast(World, TinyWorld()), model, Progress())


def report(loss: float, tokens: int = 100) -> StepReport:
    agreed = Count(valid_tokens=tokens, sample_hash=0, ended=0)
    return StepReport(torch.tensor(loss), 1.0, 1e-3, agreed, data_wait=0.0, last=False)


@pytest.mark.parametrize(("step", "first"), [(1, 7.5), (5, None)])
def test_first_loss_is_that_of_step_1_or_unknown(
    telemetry: Telemetry, step: int, first: float | None
) -> None:
    telemetry.step_done(report(7.5), TrainState(step=step), last=False)
    assert telemetry.progress.first_loss == first


def test_rates_leave_out_what_came_before_training(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.monotonic() + 1000  # spent on loading
    monkeypatch.setattr("time.monotonic", lambda: clock)
    telemetry.start()
    clock += 2
    telemetry.step_done(report(7.5, tokens=100), TrainState(step=1), last=False)
    assert telemetry.progress.tokens_per_second == 50
    assert telemetry.progress.step_seconds == 2


def test_ledger_is_a_chain() -> None:
    one, two, other = TrainState(), TrainState(), TrainState()
    for state, hashes in ((one, (5, 6)), (two, (5, 6)), (other, (6, 5))):
        for sample_hash in hashes:
            state.advance(10, sample_hash, finite=True)
    assert one.ledger == two.ledger != other.ledger
    assert (one.step, one.tokens, math.isnan(one.first_loss)) == (2, 20, True)
