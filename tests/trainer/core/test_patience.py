"""Ranks wait for one whose data or storage is slow, and not a moment for one that is dead."""

import os
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pretrain_agent.board import Board
from pretrain_api.config import RunConfig
from pretrain_api.wire import Phase
from pretrain_trainer import train
from pretrain_trainer.checkpoint import tensors
from pretrain_trainer.data.loader import Loader
from pretrain_trainer.settings import Place
from pretrain_trainer.supervision import QUIET_SECONDS, Supervision

MakeConfig = Callable[..., RunConfig]

TRAIN_TIMEOUT = 5  # seconds that gradients may take once training runs, on a busy machine as well
LATE = TRAIN_TIMEOUT + 2

# Where a rank can be late or die: the function that runs there, and on which of its calls. Calls of
# next_step are steps; the second checkpoint is written after step 4.
PLACES = {"data": (Loader, "next_step", 3), "save": (tensors, "write", 2)}

ACTS: dict[str, Callable[[], object]] = {
    "sleep": lambda: time.sleep(LATE),
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def disturbed_run(path: str, acts: dict[str, str]) -> list[str]:
    """One rank of a run whose last rank does something in some places; the phases it went through.

    Args:
        path: of the configuration.
        acts: what to do, by place.
    """
    phases: list[str] = []
    enter = Supervision.enter

    def noted(self: Supervision, phase: Phase, step: int) -> None:
        phases.append(f"{phase} {step}")
        enter(self, phase, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervision, "enter", noted)
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            for place, act in acts.items():
                patch.setattr(*PLACES[place][:2], disturbed(*PLACES[place], ACTS[act]))
        train.main(path)
    return phases


def disturbed(owner: Any, name: str, call: int, act: Callable[[], object]) -> Callable[..., Any]:
    """The function of that name, which first acts when it is called for the ``call``-th time."""
    real, calls = getattr(owner, name), count(1)

    def instead(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            act()
        return real(*arguments, **keywords)

    return instead


@pytest.fixture
def run_json(run_config: MakeConfig, tmp_path: Path) -> str:
    """A run of four steps that saves after the second and the last."""
    path = tmp_path / "run.json"
    config = run_config(comm={"train_timeout_seconds": TRAIN_TIMEOUT})
    path.write_text(config.model_dump_json())
    return str(path)


def test_a_rank_that_is_late_outside_of_gradients_fails_nobody(
    ranks: Callable[..., Any], run_json: str
) -> None:
    first, last = ranks(2, disturbed_run, run_json, dict.fromkeys(PLACES, "sleep"))
    assert first[-1] == last[-1] == "done 4"


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_dies_is_noticed_at_once(
    ranks: Callable[..., Any], run_json: str, place: str
) -> None:
    # The pool waits some seconds for what the others say; the control group would wait for hours.
    with pytest.raises(AssertionError, match=r"rank 0: (?s:.*)without an answer: \[1\]"):
        ranks(2, disturbed_run, run_json, {place: "die"})


def test_every_phase_of_a_run_is_told(ranks: Callable[..., Any], run_json: str) -> None:
    (phases,) = ranks(1, disturbed_run, run_json, {})
    told = list(dict.fromkeys(phases))  # without repeated signs of life
    assert told == [
        "starting 0", "load 0",
        "data 0", "firstStep 0", "data 1", "step 1", "save 2",
        "data 2", "step 2", "data 3", "step 3", "save 4", "done 4",
    ]  # fmt: skip


def test_signs_of_life_keep_the_place_and_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board.create(tmp_path / "board", 1)
    clock = 100.0
    monkeypatch.setattr("pretrain_trainer.supervision.time.monotonic", lambda: clock)
    supervision = Supervision(Place(board=tmp_path / "board"))
    supervision.enter(Phase.SAVE, 7)
    told = [board.read(0)]
    for seconds in (0.9, 0.2, 0.5):  # of the time in which nothing more is said
        clock += seconds * QUIET_SECONDS
        supervision.alive()
        told.append(board.read(0))
    assert {(beat.phase, beat.step) for beat in told} == {(Phase.SAVE, 7)}
    ages = [beat.at for beat in told]
    assert ages == [100.0, 100.0, ages[2], ages[2]]
    assert ages[2] > 100.0
