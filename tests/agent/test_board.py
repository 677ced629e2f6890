"""The board: what one process writes, another reads whole or not at all."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_agent.board import FAILURE_BYTES, PROGRESS_BYTES, RECORD, Beat, Board, Record
from pretrain_api.wire import Failure, Order, Phase, Progress, SkippedCheckpoint

WRITER = """
import sys
from pathlib import Path
from pretrain_agent.board import Board
from pretrain_api.wire import Progress
board = Board.open(Path(sys.argv[1]))
step = 0
while True:
    step += 1
    board.put_progress(Progress(step=step, steps=step, tokens=step, ledger="x" * (step % 3000)))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "board"


def test_a_new_board_says_nothing(path: Path) -> None:
    board = Board.create(path, 2)
    assert board.order is Order.NONE
    assert board.progress() is None
    assert board.failures() == {}
    assert board.beats() == [Beat(Phase.WAITING, 0, 0.0)] * 2


def test_what_one_end_writes_the_other_reads(path: Path) -> None:
    supervisor, rank = Board.create(path, 3), Board.open(path)
    before = time.monotonic()
    for phase in Phase:
        rank.publish(2, phase, 10**12)
        beat = supervisor.read(2)
        assert (beat.phase, beat.step, beat.pid) == (phase, 10**12, os.getpid())
        assert before <= beat.at <= time.monotonic()
    for order in Order:
        supervisor.order = order
        assert rank.order is order
    progress = Progress(step=3, loss=2.5, ledger="ab")
    rank.put_progress(progress)
    assert supervisor.progress() == progress
    rank.put_failure(1, Failure(rank=1, message="broken"))
    assert supervisor.failures() == {1: Failure(rank=1, message="broken")}


def test_clear_forgets_ranks_but_not_progress_and_order(path: Path) -> None:
    board = Board.create(path, 2)
    board.publish(0, Phase.DONE, 5)
    board.put_failure(1, Failure())
    board.put_progress(Progress(step=5))
    board.order = Order.SAVE
    board.clear()
    assert board.read(0).phase is Phase.WAITING
    assert board.failures() == {}
    assert board.progress() == Progress(step=5)
    assert board.order is Order.SAVE


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=20), st.integers(0, 300))
def test_last_words_of_any_length_fit_and_keep_their_end(part: str, times: int) -> None:
    text = part * times
    with tempfile.TemporaryDirectory() as folder:
        board = Board.create(Path(folder, "board"), 1)
        board.put_failure(0, Failure(message=text))
        assert text.endswith(board.failures()[0].message)
        if len(text.encode()) < FAILURE_BYTES // 16:
            assert board.failures()[0].message == text


def test_progress_too_long_drops_the_list_of_skipped_checkpoints(path: Path) -> None:
    board = Board.create(path, 1)
    skipped = (SkippedCheckpoint(step=1, reason="r" * PROGRESS_BYTES),)
    board.put_progress(Progress(step=7, skipped=skipped))
    assert board.progress() == Progress(step=7)


def test_a_writer_that_dies_half_way_leaves_the_record_before(path: Path) -> None:
    board = Board.create(path, 1)
    board.put_progress(Progress(step=1))
    board.put_progress(Progress(step=2))
    record = board._progress
    # what a third write does before it flips the counter: the buffer of step 1 is overwritten
    start = record.buffer(1)
    record.memory[start : start + 64] = os.urandom(64)
    assert board.progress() == Progress(step=2)


def test_a_torn_buffer_is_not_believed(path: Path) -> None:
    board = Board.create(path, 1)
    board.put_progress(Progress(step=1, ledger="abc"))
    record: Record = board._progress
    at = record.memory.find(b"abc")
    record.memory[at : at + 1] = b"X"
    assert board.progress() is None


class Overtaken(Record):
    """A reader that has looked at the counter when almost two writes happen."""

    def buffer(self, number: int) -> int:
        (writes,) = RECORD.unpack_from(self.memory, self.offset)
        if writes == 1:
            writer = Record(self.memory, self.offset, self.capacity)
            writer.write(b"second")
            writer.write(b"third")
            RECORD.pack_into(self.memory, self.offset, 2)  # the third isn't said yet
        return super().buffer(number)


def test_what_is_not_in_force_yet_is_not_read(path: Path) -> None:
    record = Board.create(path, 1)._progress
    record.write(b"first")
    reader = Overtaken(record.memory, record.offset, record.capacity)
    assert reader.read() == record.read() == b"second"


def test_a_reader_never_sees_a_mixture_while_another_process_writes(path: Path) -> None:
    board = Board.create(path, 1)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        newest, different = 0, 0
        deadline = time.monotonic() + 60
        while different < 300:
            assert time.monotonic() < deadline
            progress = board.progress()
            if progress is None:
                continue
            assert progress.step == progress.steps == progress.tokens
            assert progress.ledger == "x" * (progress.step % 3000)
            assert progress.step >= newest
            different += progress.step > newest
            newest = progress.step
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    final = board.progress()
    assert final is not None
    assert final.step >= newest


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 4096])
def test_something_else_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        Board.open(path)
