"""Every layout computes what one process computes, resumes bitwise, and reads any other's files.

Everything is float32. Against one process, which takes the same batch in as many microbatches:

- the first step's loss within 1e-6, relative;
- every gradient of the first step within 2e-5 of its parameter's largest element;
- the losses of ten steps, and the norms by which gradients are clipped, within 1e-5, relative.

What differs is the order in which floating point numbers are added. A mistake of a layout (a
reduction forgotten, a mean for a sum, a position rotated twice) is a matter of percents.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain_api.config import RunConfig
from pretrain_trainer.checkpoint.digest import digests

from .layouts import ALL, CHOSEN, LLAMA, Cell, alone, picked
from .watched import Array, copy_checkpoint, watched_run

Ranks = Callable[..., Any]
Run = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]

STEPS = 10
BATCH: dict[str, Any] = {"global_batch_size": 8}  # the smallest that every layout can share
LOSS, GRADIENT, CURVE, NORM = 1e-6, 2e-5, 1e-5, 1e-5


def observe(
    ranks: Ranks, cell: Cell, config: RunConfig
) -> tuple[dict[str, Array], list[float], list[float]]:
    """The same of the whole layout: all parameters, and losses and norms that would be reported."""
    seen = ranks(cell.ranks, watched_run, config)
    gradients = {name: value for found, *_ in seen for name, value in found.items()}
    norms = seen[0][2]
    assert all(each == norms for *_, each in seen)  # all clip alike
    return gradients, np.sum([losses for _, losses, _ in seen], axis=0).tolist(), norms


def configured(make: MakeConfig, cell: Cell, **changes: dict[str, Any]) -> RunConfig:
    names = {*cell.sections, *changes}
    return make(
        **{name: {**changes.get(name, {}), **cell.sections.get(name, {})} for name in names}
    )


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    """What one process computed, once for all layouts of a model."""
    return {}


def compare(ranks: Ranks, make: MakeConfig, references: dict[str, Any], cell: Cell) -> None:
    changes = {
        "training": {"steps": STEPS, **BATCH},
        "checkpoint": {"enable": False},
    }
    reference = alone(cell)
    key = str(reference)
    if key not in references:
        references[key] = observe(ranks, reference, configured(make, reference, **changes))
    expected, curve, lengths = references[key]
    gradients, losses, norms = observe(ranks, cell, configured(make, cell, **changes))
    assert norms == pytest.approx(lengths, rel=NORM)
    assert losses[0] == pytest.approx(curve[0], rel=LOSS)
    assert losses == pytest.approx(curve, rel=CURVE)
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        largest = float(np.abs(value).max())
        np.testing.assert_allclose(
            gradients[name], value, rtol=0, atol=GRADIENT * largest, err_msg=name
        )


@pytest.mark.parametrize("name", picked(LLAMA))
def test_a_layout_computes_what_one_process_does(
    ranks: Ranks, run_config: MakeConfig, references: dict[str, Any], name: str
) -> None:
    compare(ranks, run_config, references, LLAMA[name])


@pytest.mark.parametrize("name", picked(LLAMA))
def test_a_killed_layout_resumes_bitwise(
    run: Run, run_until_killed: Run, run_config: MakeConfig, name: str
) -> None:
    cell = LLAMA[name]
    there = run_config().job.dump_folder + "-undisturbed"
    undisturbed = configured(run_config, cell, training=BATCH, job={"dump_folder": there})
    config = configured(run_config, cell, training=BATCH)
    expected = run(cell.ranks, undisturbed)
    run_until_killed(cell.ranks, config, kill_at=4)
    outcome = run(cell.ranks, config)
    assert {step: expected.losses[step] for step in (3, 4)} == outcome.losses
    assert digests(step_folder(config, 4)) == digests(step_folder(undisturbed, 4))


def step_folder(config: RunConfig, step: int) -> Path:
    return Path(config.job.dump_folder) / config.checkpoint.folder / f"step-{step}"


def pairs() -> list[tuple[str, str]]:
    """Every layout to one process and back, and ten random pairs; a few of them if not all."""
    names = picked(LLAMA)
    draw = random.Random(7)
    mixed = []
    for _ in range(10 if ALL else 2):
        source = draw.choice(names)
        model = LLAMA[source].sections["model"]
        others = [name for name in names if LLAMA[name].sections["model"] == model]
        mixed.append((source, draw.choice(others)))
    return [*((name, "alone") for name in names), *(("alone", name) for name in names), *mixed]


@pytest.mark.parametrize(("source", "target"), pairs())
def test_every_layout_reads_what_any_other_wrote(
    ranks: Ranks, run: Run, run_config: MakeConfig, source: str, target: str
) -> None:
    cells = {"alone": alone(LLAMA[target if source == "alone" else source]), **LLAMA}
    steps = {"training": {"steps": 2, **BATCH}, "checkpoint": {"last_save_model_only": False}}
    written = configured(run_config, cells[source], **steps)
    assert run(cells[source].ranks, written).code == 0
    longer = {**steps, "training": {"steps": 3, **BATCH}}
    reader = configured(run_config, cells[target], **longer)
    there = {"dump_folder": written.job.dump_folder + "-copy"}
    copy = configured(run_config, cells[target], job=there, **longer)
    ranks(cells[target].ranks, copy_checkpoint, reader, copy)
    assert digests(step_folder(copy, 2)) == digests(step_folder(written, 2))


def test_every_technique_is_among_the_chosen() -> None:
    assert set(CHOSEN) <= set(LLAMA)
