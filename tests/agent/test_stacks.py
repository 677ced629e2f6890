"""Stacks of ranks that hang: taken from real processes, kept on a volume, shown in the log."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain_agent import logs, process, stacks
from pretrain_agent.board import Beat, Board
from pretrain_agent.evidence import Evidence
from pretrain_agent.hang import Hung
from pretrain_agent.stacks import KEPT, Keeper
from pretrain_api.wire import Phase

RANK = """
import sys, threading, time
from pathlib import Path
from pretrain_agent import stacks
from pretrain_agent.board import Board
from pretrain_api.wire import Phase
folder, local_rank = Path(sys.argv[1]), int(sys.argv[2])
def innocent(): time.sleep(3600)
def guilty(): time.sleep(3600)
if local_rank != 2:
    stacks.answer_signal(folder, local_rank)
threading.Thread(target=innocent, daemon=True).start()
Board.open(folder / "board").publish(local_rank, Phase.STEP, 5)
guilty()
"""
HUNG = Hung(rank=9, phase=Phase.STEP, step=5, seconds=61, limit=60, state="S")


def state(pid: int) -> str:
    found = process.look_up(pid)
    return found.state if found else ""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Board]:
    """Three processes in our session: one that answers, one that is stopped, one without a handler;
    and a fourth rank that never started.
    """
    board = Board.create(tmp_path / "board", 4)
    started = [
        subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(number)])
        for number in range(3)
    ]
    try:
        wait_for(lambda: all(beat.pid for beat in board.beats()[:3]))
        wait_for(lambda: {state(rank.pid) for rank in started} == {"S"})  # in guilty, all of them
        os.kill(started[1].pid, signal.SIGSTOP)
        wait_for(lambda: state(started[1].pid) == "T")
        yield board
    finally:
        for rank in started:
            rank.kill()
            rank.wait()


def test_stacks_are_taken_where_there_are_any_and_nobody_is_hurt(
    ranks: Board, tmp_path: Path
) -> None:
    beats = ranks.beats()
    began = time.monotonic()
    taken = asyncio.run(stacks.take(tmp_path, beats, os.getsid(0)))
    assert time.monotonic() - began < stacks.DUMP_SECONDS + 5
    assert "in innocent" in taken[0]
    assert stacks.innermost(taken[0]).splitlines()[-1].endswith("in guilty")
    assert taken[1].startswith("no stacks: the process is stopped (state T)")
    assert taken[2].startswith("no stacks: no handler is installed")
    assert taken[3] == "the rank has not started yet\n"
    for beat in beats[:3]:
        assert process.look_up(beat.pid) is not None

    # what was taken before is not taken again, and a stranger's process is left alone
    again = asyncio.run(stacks.take(tmp_path, beats, os.getsid(0)))
    assert again[0].count("in guilty") == 1
    other = asyncio.run(stacks.take(tmp_path, beats, session=1))
    assert other[0] == "the process is gone\n"


def test_a_rank_that_is_stopped_just_after_it_was_looked_at(
    ranks: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_state", lambda beat, session: "")
    taken = asyncio.run(stacks.take(tmp_path, ranks.beats()[:2], os.getsid(0)))
    assert "in innocent" in taken[0]
    assert taken[1].startswith("no stacks: the process is stopped (state T)")


def test_the_rank_at_fault_is_reported_where_it_runs(ranks: Board, tmp_path: Path) -> None:
    out = io.BytesIO()
    (tmp_path / "pipes").mkdir()
    pump = logs.LogPump(tmp_path / "pipes", 4, out)
    pump.begin_round(9)
    evidence = Evidence(tmp_path, ranks, pump, tmp_path / "output")
    folder = stacks.folder_name(3, 1)
    failure = asyncio.run(evidence.take(HUNG, folder, 9, os.getsid(0)))
    assert failure is not None
    assert (failure.rank, failure.reason, failure.exit_code) == (9, "Hung", 1)
    assert failure.message.startswith(f"{HUNG}; all stacks are in stacks/generation-3-round-1\n")
    assert failure.message.endswith("in guilty")
    elsewhere = HUNG.model_copy(update={"rank": 40})
    evidence.close()
    assert asyncio.run(evidence.take(elsewhere, folder, 9, os.getsid(0))) is None
    evidence.close()
    assert b"\n[rank 9]   File " in out.getvalue()
    kept = {path.name: path.read_text() for path in (tmp_path / "output" / folder).iterdir()}
    assert set(kept) == {f"rank-{rank}.txt" for rank in range(9, 13)}
    assert "in guilty" in kept["rank-9.txt"]


def test_the_newest_folders_are_kept_and_strange_ones_left_alone(tmp_path: Path) -> None:
    (tmp_path / "stacks" / "notes").mkdir(parents=True)
    for number in range(KEPT + 3):
        keeper = Keeper(tmp_path)
        keeper.keep(stacks.folder_name(1 + number // 6, number), {0: "text"}, lambda: None)
        keeper.close()
    rounds = {path.name.rpartition("-")[2] for path in (tmp_path / "stacks").iterdir()}
    assert rounds == {"notes", *map(str, range(3, KEPT + 3))}


def test_a_volume_or_a_log_that_is_stuck_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "KEEP_SECONDS", 0.1)
    stuck = threading.Event()
    keeper = Keeper(tmp_path)
    keeper.keep(stacks.folder_name(1, 0), {0: "lost"}, stuck.wait)
    keeper.keep(stacks.folder_name(1, 1), {0: "dropped"}, lambda: None)
    keeper.close()
    assert not (tmp_path / "stacks").exists()
    stuck.set()


def test_a_volume_that_can_not_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("not a folder")
    keeper = Keeper(tmp_path)
    keeper.keep(stacks.folder_name(1, 0), {0: "text"}, lambda: None)
    keeper.close()
    assert (tmp_path / "stacks").is_file()


def test_a_rank_that_is_gone_is_no_longer_asked(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    taken = asyncio.run(stacks.take(tmp_path, [Beat(Phase.STEP, 1, 0.0, dead.pid)], os.getsid(0)))
    assert taken == {0: "the process is gone\n"}
