"""The GPU benchmark: its arithmetic, and a whole run of it on what this machine has."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_api.flavors.llama3 import FLAVORS
from pretrain_trainer.bench import gpu, roofline
from pretrain_trainer.bench.gpu import Outcome, count_parameters, layers_that_fit
from pretrain_trainer.bench.roofline import Floor, products

EIGHT = FLAVORS["8B"]
VOCABULARY = 128_256


def test_products_are_six_flops_per_parameter_and_token() -> None:
    tokens = 8192
    counted = sum(product.flops for product in products(EIGHT, VOCABULARY, tokens))
    norms = (2 * EIGHT.n_layers + 1) * EIGHT.dim
    used = count_parameters(EIGHT, VOCABULARY) - VOCABULARY * EIGHT.dim - norms
    assert counted == 6 * used * tokens


def test_elementwise_bytes_grow_with_layers_and_tokens() -> None:
    one = roofline.elementwise_bytes(dataclasses.replace(EIGHT, n_layers=1), 1)
    assert roofline.elementwise_bytes(EIGHT, 10) == 10 * EIGHT.n_layers * one


@pytest.mark.parametrize(("gib", "layers"), [(10, 1), (79, 9), (139, 20), (1000, 32)])
def test_layers_are_as_many_as_leave_room(gib: int, layers: int) -> None:
    assert layers_that_fit(EIGHT, VOCABULARY, gib * 2**30) == layers


def test_a_row_says_what_was_measured(tmp_path: Path) -> None:
    class Options:
        batch, seq_len = 2, 8192

    half = dataclasses.replace(EIGHT, n_layers=16)
    work = gpu.describe(half, EIGHT, VOCABULARY, Options)
    floor = Floor(products=0.6, attention=0.1, elementwise=0.05, optimizer=0.05)
    row = gpu.row("bf16", work, floor, Outcome(1.0, 50 * 2**30, 7.0), 989e12)
    assert row[:4] == ["bf16", "16", "1.000", "16,384"]
    # The published convention: 57.9 GFLOP per token of the whole 8B at 8,192.
    assert work.whole_flops == pytest.approx(57.9e9, rel=0.002)
    assert float(row[5].rstrip("%")) == pytest.approx(16384 * work.flops / 989e12 * 100, abs=0.05)
    assert work.causal_flops < work.flops
    assert row[7:] == ["80%", "50.0"]


def test_it_trains_and_measures_what_there_is(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "REPEATS", 2)
    tokenizer = str(repository / "tests" / "assets" / "tokenizer")
    small = ["--flavor", "tiny", "--seq-len", "64", "--warm", "1", "--steps", "2"]
    only = ["--only", "bf16, selective AC", "--tokenizer", tokenizer]
    variants: tuple[Any, ...] = (gpu.VARIANTS[0],)  # compiling takes a minute
    monkeypatch.setattr(gpu, "VARIANTS", variants)
    assert gpu.main([*small, *only]) == 0
    said = capsys.readouterr().out
    assert "| bf16, selective AC | 2 | " in said
    assert "floor with 2 layers" in said
    assert not torch.distributed.is_initialized()
