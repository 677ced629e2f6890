"""Where ranks are when they hang: their Python stacks, taken before they are killed.

Every rank has a handler for one signal, installed in C by faulthandler, that writes the stacks of
all its threads into a file of its own. It needs neither the interpreter's lock nor the main thread,
so it works inside a collective and inside a deadlock. It doesn't in a process that is stopped or in
uninterruptible sleep; of that the kernel says where it waits.

Files that ranks write are in memory, next to the board. What is kept goes to the output volume, and
a volume that doesn't answer must hold up nothing: a thread of its own does that.
"""

import asyncio
import contextlib
import faulthandler
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pretrain_agent import process
from pretrain_agent.board import Beat
from pretrain_agent.hang import STATES

log = logging.getLogger(__name__)

SIGNAL = signal.SIGUSR2
DUMP_SECONDS = 1.0  # to wait for the dumps of all ranks
SETTLED_SECONDS = 0.1  # without growth: a dump is whole
LOOK_SECONDS = 0.02
KEPT = 10  # folders on the volume
KEEP_SECONDS = 2.0  # for the volume, when this process ends
FRAMES = 8  # of a stack, in a failure's message
FOLDER = "stacks"
NAME = re.compile(r"generation-(\d+)-round-(\d+)")


def dump_path(directory: Path, local_rank: int) -> Path:
    """Where a rank writes its stacks."""
    return directory / f"stacks-{local_rank}"


def answer_signal(directory: Path, local_rank: int) -> None:
    """In a rank: write the stacks of all threads whenever the signal comes."""
    file = dump_path(directory, local_rank).open("wb")
    faulthandler.register(SIGNAL, file=file, all_threads=True)


def folder_name(generation: int, number: int) -> str:
    """Folder, below the run's own, of what was taken in one round."""
    return f"{FOLDER}/generation-{generation}-round-{number}"


async def take(directory: Path, beats: Sequence[Beat], session: int) -> dict[int, str]:
    """The stacks of the local ranks, which are in ``session``; a sentence where there are none.

    Returns after about a second at the latest.
    """
    states = {local: _state(beat, session) for local, beat in enumerate(beats)}
    asked = {local: dump_path(directory, local) for local in states if not states[local]}
    before = {local: _size(path) for local, path in asked.items()}
    for local in asked:
        with contextlib.suppress(ProcessLookupError):
            os.kill(beats[local].pid, SIGNAL)
    await _settle(asked, before)
    taken = {local: _read(path, before[local]) for local, path in asked.items()}
    return {
        local: states[local] or taken[local] or _unanswered(beats[local].pid) for local in states
    }


def _state(beat: Beat, session: int) -> str:
    """Why a rank can't be asked, or nothing."""
    if not beat.pid:
        return "the rank has not started yet\n"
    found = process.look_up(beat.pid)
    if found is None or found.session != session:
        return f"{STATES['']}\n"
    if found.state in STATES:
        return _stuck(beat.pid, STATES[found.state])
    return "" if process.catches(beat.pid, SIGNAL) else _stuck(beat.pid, "no handler is installed")


def _unanswered(pid: int) -> str:
    """Why a rank that was asked said nothing: it may have been stopped, or have ended, since."""
    found = process.look_up(pid)
    return _stuck(pid, STATES.get(found.state if found else "", "the signal is ignored"))


def _stuck(pid: int, why: str) -> str:
    """What the kernel tells about a process that can't tell anything itself."""
    try:
        wait = Path(f"/proc/{pid}/wchan").read_text().strip("0\n")
    except OSError:
        wait = ""
    return f"no stacks: {why}{f', in the kernel at {wait}' if wait else ''}\n"


async def _settle(asked: Mapping[int, Path], before: Mapping[int, int]) -> None:
    """Wait until all files have grown and stopped growing, or the time is up."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DUMP_SECONDS
    sizes, since = dict(before), loop.time()
    while loop.time() < deadline:
        found = {local: _size(path) for local, path in asked.items()}
        if found != sizes:
            sizes, since = found, loop.time()
        grown = all(sizes[local] > before[local] for local in sizes)
        if grown and loop.time() - since >= SETTLED_SECONDS:
            return
        await asyncio.sleep(LOOK_SECONDS)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, start: int) -> str:
    try:
        return path.read_bytes()[start:].decode(errors="replace")
    except OSError:
        return ""


def innermost(dump: str) -> str:
    """The last calls of the main thread, which faulthandler lists last and from the inside out."""
    _, _, main = dump.rpartition("(most recent call first):\n")
    frames = [line.strip() for line in main.splitlines() if line.strip()]
    return "\n".join(reversed(frames[:FRAMES]))


class Keeper:
    """Writes stacks where they outlive the pod, in a thread that nobody has to wait for."""

    def __init__(self, output: Path | None) -> None:
        """``output`` is the run's folder, or None where that isn't known."""
        self.output = output
        self._thread: threading.Thread | None = None

    def keep(self, name: str, texts: Mapping[int, str], show: Callable[[], None]) -> None:
        """Show the stacks and write them, by global rank, into the folder ``name``."""

        def work() -> None:
            show()
            if self.output is not None:
                _write(self.output / name, texts)

        if self._thread is not None and self._thread.is_alive():
            log.warning("stacks of %s are lost: the output volume or the log is stuck", name)
            return
        self._thread = threading.Thread(target=work, name="stacks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the volume a last moment."""
        if self._thread is not None:
            self._thread.join(KEEP_SECONDS)


def _write(folder: Path, texts: Mapping[int, str]) -> None:
    """Write a file per rank, and remove the oldest folders, which other workers may do as well."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rank, text in texts.items():
            (folder / f"rank-{rank}.txt").write_text(text)
        for old in _oldest(folder.parent):
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        log.warning("stacks could not be kept: %s", error)


def _oldest(parent: Path) -> list[Path]:
    """All folders but the newest ones."""
    found = {path: NAME.fullmatch(path.name) for path in parent.iterdir()}
    order = {path: tuple(map(int, match.groups())) for path, match in found.items() if match}
    return sorted(order, key=lambda path: order[path])[:-KEPT]
