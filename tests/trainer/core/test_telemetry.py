"""Numbers that people compare must mean what they say."""

import io
import json
import logging
import math
from typing import Any

import pytest

from pretrain_api.wire import Progress
from pretrain_trainer.logs import HumanLines, JsonLines
from pretrain_trainer.state import TrainState
from pretrain_trainer.telemetry import log_fields, log_line, mfu, peak_flops

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


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_of_a_device(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak


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


def test_ledger_is_a_chain() -> None:
    one, two, other = TrainState(), TrainState(), TrainState()
    for state, hashes in ((one, (5, 6)), (two, (5, 6)), (other, (6, 5))):
        for sample_hash in hashes:
            state.advance(10, sample_hash, finite=True)
    assert one.ledger == two.ledger != other.ledger
    assert (one.step, one.tokens, math.isnan(one.first_loss)) == (2, 20, True)
