"""A worker of an older generation that is frozen anywhere in a save changes nothing once it thaws.

A process of its own saves and prunes. It is really stopped, by SIGSTOP, before each of the system
calls that change something; a newer generation takes over meanwhile; then it goes on.
"""

import errno
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain_trainer.checkpoint.errors import DamagedError
from pretrain_trainer.checkpoint.verify import step_folders, verified

from .syscalls import Calls, only_whole_folders

STEP = 30  # that the older generation saves
MOST = 500  # calls of one save; more would be an endless loop
DEADLINE = 60  # seconds


def frozen(
    number: int, work: Callable[[], Any], meanwhile: Callable[[], Any], no_renames: bool
) -> str:
    """Do ``work`` in a process that is stopped before call ``number`` until ``meanwhile`` is done.

    Returns the name of the error it ended with, "done" if there was none, and "" if there is no
    call of that number.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def act(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGSTOP)
        if no_renames and only_whole_folders(name, arguments) and ".saving" in str(arguments[0]):
            raise OSError(errno.EXDEV, "folders can't be renamed")

    def run() -> None:
        try:
            with Calls(act).watching():
                work()
            send.send("done")
        except Exception as error:
            send.send(type(error).__name__)

    child = context.Process(target=run)
    child.start()
    assert child.pid is not None
    what = os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert what is not None
    stopped = what.si_code == os.CLD_STOPPED
    try:
        if stopped:
            meanwhile()
            os.kill(child.pid, signal.SIGCONT)
        assert receive.poll(DEADLINE), "the thawed process says nothing"
        return receive.recv() if stopped else ""
    finally:
        child.kill()
        child.join(DEADLINE)


def good(root: Path) -> dict[str, dict[str, bytes]]:
    """Every file of every checkpoint that a reader would take for one."""
    found = {}
    for folder in step_folders(root):
        try:
            verified(folder)
        except DamagedError:
            continue
        found[folder.name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found


@pytest.fixture(params=["fresh", "in place of a damaged one"])
def base(manager_at, state, tmp_path, request) -> Path:
    """A root of generation 1 with steps 10 and 20, and perhaps a damaged step STEP."""
    root = tmp_path / "base"
    saver = manager_at(root)()
    for step in (10, 20):
        saver.save(step, state(step))
    if request.param != "fresh":
        saver.save(STEP, state(STEP))
        (root / f"step-{STEP}" / "__0_0.distcp").write_bytes(b"damaged")
    return root


@pytest.mark.parametrize("no_renames", [False, True], ids=["renames", "moves"])
@pytest.mark.parametrize("saves", [False, True], ids=["newer loads", "newer saves"])
def test_frozen_at_every_call_an_older_generation_changes_nothing_later(
    manager_at, state, base, tmp_path, saves, no_renames
):
    outcomes = []
    for number in range(1, MOST):
        root = shutil.copytree(base, tmp_path / f"at-{number}")
        seen: dict[str, dict[str, bytes]] = {}
        names: set[str] = set()

        def save_and_prune(root: Path = root) -> None:
            older = manager_at(root)(keep_latest_k=2)
            older.save(STEP, state(STEP))
            older.prune()

        def take_over(
            root: Path = root, seen: dict[str, dict[str, bytes]] = seen, names: set[str] = names
        ) -> None:
            newer = manager_at(root)(generation=2)
            target = state(0)
            del target["ledger"]  # its length depends on the step
            newer.load(target)
            if saves:
                newer.save(STEP, state(STEP + 1))
            seen |= good(root)
            names |= {path.name for path in root.glob("step-*")}

        outcome = frozen(number, save_and_prune, take_over, no_renames)
        if not outcome:
            break
        outcomes.append(outcome)
        assert good(root) == seen
        assert "step-20" in seen
        left = {path.name for path in root.glob("*step-*")}
        # Where files are moved one by one, some may be left without a manifest: no checkpoint.
        assert left == names or (no_renames and left == names | {f"step-{STEP}"})
        shutil.rmtree(root)
    # Turned away at the next check, wherever it was stopped; there is none behind a last deletion.
    assert set(outcomes) <= {"FencedError", "done"}
    assert len(outcomes) > 15
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == "FencedError"
