"""A save interrupted anywhere leaves the old checkpoint or the new one, never neither.

All system calls of a save that change something are counted, and the save is cut off at each of
them: before the call, in the middle of a write, by an error that the call returns, by SIGKILL, and
with everything that was not synced lost.
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

from pretrain_trainer.checkpoint.errors import SaveFailedError

from .syscalls import Calls, only_whole_folders

OLD, NEW = 10, 20


class Crash(BaseException):
    """The process is dead: nothing in it may handle this."""


def crash_at(number: int, *, torn: bool = False) -> Calls:
    """Die at call ``number``; torn: in the middle of it, if it is a write."""

    def act(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if count == number and torn and name == "write":
            data = arguments[1]
            calls.real("write", arguments[0], data[: len(data) // 2])
        if count >= number:  # a dead process does nothing more, cleaning up included
            raise Crash

    calls = Calls(act)
    return calls


def lose_unsynced(root: Path, calls: Calls) -> None:
    """What a power failure does: names survive, bytes that were not synced are zeros."""
    for path in root.rglob("*"):
        if path.is_file() and path.stat().st_ino in calls.unsynced:
            path.write_bytes(bytes(path.stat().st_size))


@pytest.fixture
def base(manager_at, state, tmp_path) -> Path:
    """A root with a good checkpoint of step OLD."""
    root = tmp_path / "base"
    manager_at(root)().save(OLD, state(OLD))
    return root


@pytest.fixture
def total(manager_at, state, base, tmp_path) -> int:
    """How many calls one undisturbed save makes."""
    calls = Calls(lambda *_: None)
    saver = manager_at(shutil.copytree(base, tmp_path / "count"))()
    with calls.watching():
        saver.save(NEW, state(NEW))
    assert {"write", "fsync", "mkdir", "rename", "replace", "open"} <= set(calls.names)
    assert not calls.unsynced
    return calls.count


@pytest.fixture
def loaded_step(manager_at, state, same) -> Callable[[Path], int]:
    """What the next generation finds; checks that it is exactly what was saved as that step."""

    def load(root: Path) -> int:
        target = state(0)
        del target["ledger"]  # its length depends on the step
        report = manager_at(root)(generation=2).load(target)
        assert report.step in (OLD, NEW)
        assert same(target, {key: state(report.step)[key] for key in target})
        leftovers = [p.name for p in root.iterdir() if p.name.startswith((".saving", ".deleting"))]
        assert not leftovers
        return report.step

    return load


@pytest.mark.parametrize("torn", [False, True], ids=["between calls", "within writes"])
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power lost"])
def test_at_every_call_the_old_or_the_new_one_survives(
    manager_at, state, base, total, loaded_step, tmp_path, torn, power
):
    seen = []
    for number in range(1, total + 2):
        root = shutil.copytree(base, tmp_path / f"at-{number}")
        calls = crash_at(number, torn=torn)
        saver = manager_at(root)()
        with calls.watching():
            if number <= total:
                with pytest.raises(Crash):
                    saver.save(NEW, state(NEW))
            else:
                saver.save(NEW, state(NEW))
        if power:
            lose_unsynced(root, calls)
        seen.append(loaded_step(root))
        shutil.rmtree(root)
    assert seen == sorted(seen), "once the new one is there it stays"
    assert set(seen) == {OLD, NEW}
    assert seen[-1] == NEW


def test_at_every_call_without_renaming_of_folders(manager_at, state, base, loaded_step, tmp_path):
    seen = []
    for number in range(1, 1000):
        root = shutil.copytree(base, tmp_path / f"at-{number}")

        def act(count: int, name: str, arguments: tuple[Any, ...], number: int = number) -> None:
            if count >= number:
                raise Crash
            if only_whole_folders(name, arguments):
                raise OSError(errno.EXDEV, "folders can't be renamed")

        saver = manager_at(root)()
        finished = True
        with Calls(act).watching():
            try:
                saver.save(NEW, state(NEW))
            except Crash:
                finished = False
        seen.append(loaded_step(root))
        shutil.rmtree(root)
        if finished:
            break
    assert seen == sorted(seen)
    assert set(seen) == {OLD, NEW}
    assert finished


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_an_error_of_any_call_is_loud_and_keeps_the_old_one(
    manager_at, state, base, total, loaded_step, tmp_path, error
):
    for number in range(1, total + 1):
        root = shutil.copytree(base, tmp_path / f"at-{number}")

        def act(count: int, *_: Any, number: int = number) -> None:
            if count == number:
                raise OSError(error, os.strerror(error))

        saver = manager_at(root)()
        failure = ""
        with Calls(act).watching() as calls:
            try:
                saver.save(NEW, state(NEW))
            except SaveFailedError as failed:
                failure = str(failed)
        committed = not failure
        assert committed or os.strerror(error) in failure
        # The root exists, so making it may fail; and a folder that can't be renamed is moved file
        # by file. Nothing else is forgiven.
        assert not committed or calls.names[number - 1] in ("mkdir", "rename")
        assert loaded_step(root) == NEW or not committed
        shutil.rmtree(root)


def test_training_can_save_again_after_a_full_disk(manager, state, same):
    saver = manager()
    saver.save(OLD, state(OLD))

    def full(_: int, name: str, __: tuple[Any, ...]) -> None:
        if name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Calls(full).watching(), pytest.raises(SaveFailedError, match="step-20 was not saved: No"):
        saver.save(NEW, state(NEW))
    assert saver.save(NEW, state(NEW)).step == NEW


def test_killed_at_every_call(manager_at, state, base, total, loaded_step, tmp_path):
    """The same with a process of its own that is really killed."""
    context = multiprocessing.get_context("fork")
    seen = []
    for number in range(1, total + 1, 3):
        root = shutil.copytree(base, tmp_path / f"at-{number}")

        def die(root: Path = root, number: int = number) -> None:
            def act(count: int, *_: Any) -> None:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            saver = manager_at(root)()
            with Calls(act).watching():
                saver.save(NEW, state(NEW))

        child = context.Process(target=die)
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        seen.append(loaded_step(root))
    assert seen == sorted(seen)
    assert seen[0] == OLD


def test_a_file_size_limit_stops_a_save_but_not_the_process(manager_at, state, base):
    """A limit that the kernel enforces, in a process of its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def save() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            manager_at(base)().save(NEW, state(NEW))
            send.send("saved")
        except SaveFailedError as failure:
            send.send(str(failure))

    child = context.Process(target=save)
    child.start()
    answer = receive.recv() if receive.poll(60) else "no answer"
    child.join(60)
    assert answer == "step-20 was not saved: File too large"
    assert [path.name for path in base.glob("step-*")] == ["step-10"]
    assert not list(base.glob(".saving-*"))


@pytest.mark.parametrize("last", range(4))
def test_a_folder_copied_in_any_order_counts_only_when_it_is_whole(
    manager_at, state, base, loaded_step, tmp_path, last
):
    """File systems that rename a folder by copying show it in parts."""
    whole = tmp_path / "whole"
    manager_at(shutil.copytree(base, whole))().save(NEW, state(NEW))
    files = sorted((whole / "step-20").iterdir())
    order = files[last % len(files) :] + files[: last % len(files)]
    root = shutil.copytree(base, tmp_path / "copied")
    (root / "step-20").mkdir()
    for file in order:
        assert loaded_step(root) == OLD
        data = file.read_bytes()
        (root / "step-20" / file.name).write_bytes(data[: len(data) // 2])
        assert loaded_step(root) == OLD
        (root / "step-20" / file.name).write_bytes(data)
    assert loaded_step(root) == NEW
