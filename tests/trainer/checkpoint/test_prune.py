"""Old checkpoints go, but never the last good ones."""

import errno
from pathlib import Path

import pytest

from pretrain_trainer.checkpoint import manifest
from pretrain_trainer.checkpoint.errors import SaveFailedError
from pretrain_trainer.checkpoint.verify import report


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "checkpoint"


def steps(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("step-[0-9]*"))


def fill(saver, state, count: int) -> None:
    for step in range(1, count + 1):
        saver.save(step, {"model": state(step)["model"]})


def test_the_latest_k_stay(manager, state, root):
    saver = manager(keep_latest_k=3)
    fill(saver, state, 5)
    assert saver.prune() == [2, 1]
    assert steps(root) == [3, 4, 5]
    assert saver.prune() == []
    assert not list(root.glob(".deleting-*"))


def test_zero_keeps_all(manager, state, root):
    saver = manager(keep_latest_k=0)
    fill(saver, state, 4)
    assert saver.prune() == []
    assert steps(root) == [1, 2, 3, 4]


def test_nothing_goes_before_a_new_one_was_read_back(manager, state, root):
    fill(manager(keep_latest_k=0), state, 4)
    later = manager(generation=2, keep_latest_k=2)
    later.load({"model": state(0)["model"]})
    assert later.prune() == []
    assert steps(root) == [1, 2, 3, 4]


def test_damaged_ones_do_not_count_as_kept(manager, state, root):
    saver = manager(keep_latest_k=2)
    fill(saver, state, 4)
    (root / "step-3" / "__0_0.distcp").unlink()
    assert saver.prune() == [1]
    assert steps(root) == [2, 3, 4]


def rot(root: Path, step: int) -> None:
    """Flip a bit; the length stays."""
    path = root / f"step-{step}" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[900] ^= 1
    path.write_bytes(data)


def good(root: Path) -> set[str]:
    return {folder.name for folder, found in report(root) if not isinstance(found, str)}


def test_damage_that_a_start_has_found_does_not_count_as_kept(manager, state, root):
    fill(manager(keep_latest_k=0), state, 6)
    for step in (5, 6):
        rot(root, step)
    later = manager(generation=2, keep_latest_k=3)
    assert later.load({"model": state(0)["model"]}).step == 4
    later.save(7, {"model": state(7)["model"]})
    assert later.prune() == [2, 1]
    assert good(root) == {"step-3", "step-4", "step-7"}


def test_a_save_that_reads_back_differently_does_not_count_as_kept(
    manager, state, root, monkeypatch
):
    saver = manager(keep_latest_k=2)
    fill(saver, state, 2)
    with monkeypatch.context() as patch:
        verify = manifest.verify

        def after_damage(folder, *rest, **options):
            rot(root, 3)
            return verify(folder, *rest, **options)

        patch.setattr(manifest, "verify", after_damage)
        with pytest.raises(SaveFailedError, match="reads back differently"):
            saver.save(3, {"model": state(3)["model"]})
    saver.save(4, {"model": state(4)["model"]})
    assert saver.prune() == [1]
    assert good(root) == {"step-2", "step-4"}
    saver.save(3, {"model": state(3)["model"]})  # saved anew, it does
    assert saver.prune() == [2]


def test_what_only_looks_like_a_checkpoint_stays(manager, state, root, tmp_path):
    saver = manager(keep_latest_k=2)
    fill(saver, state, 4)
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "manifest.json").touch()
    (root / "step-0-backup").mkdir()
    (root / "step-0").symlink_to(outside)
    assert saver.prune() == [2, 1]
    assert (outside / "manifest.json").exists()
    assert (root / "step-0-backup").exists()
    assert (root / "step-0").is_symlink()


def test_newer_ones_than_the_one_just_saved_stay(manager, state, root):
    """Whoever put them there, they are not older than what was read back."""
    fill(manager(keep_latest_k=0), state, 4)
    again = manager(generation=2, keep_latest_k=2)
    again.save(2, {"model": state(2)["model"]})
    assert again.prune() == [1]
    assert steps(root) == [2, 3, 4]


def test_a_deletion_that_fails_is_logged_and_tried_again(manager, state, root, caplog, monkeypatch):
    saver = manager(keep_latest_k=2)
    fill(saver, state, 3)
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output")))
        assert saver.prune() == []
    assert "step-1 could not be deleted" in caplog.text
    assert saver.prune() == [1]


@pytest.fixture
def stuck(manager, state, root, monkeypatch):
    """A checkpoint that has lost its name, and whose files can't be deleted."""
    saver = manager(keep_latest_k=2)
    fill(saver, state, 3)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        assert saver.prune() == []
        assert len(list(root.glob(".deleting-*"))) == 1
        yield saver, patch


def test_a_deletion_that_fails_half_way_is_finished_the_next_time(stuck, state, root):
    saver, refusal = stuck
    refusal.undo()
    saver.save(4, {"model": state(4)["model"]})
    assert saver.prune() == [2]
    assert not list(root.glob(".deleting-*"))


def test_a_deletion_that_can_not_be_finished_keeps_nobody_from_starting(
    stuck, manager, state, root, caplog
):
    later = manager(generation=2)
    assert later.load({"model": state(0)["model"]}).step == 3
    assert "could not be deleted: [Errno 5] Input/output error" in caplog.text


def test_a_root_that_can_not_be_listed_does_not_end_training(
    manager, state, root, caplog, monkeypatch
):
    saver = manager(keep_latest_k=2)
    fill(saver, state, 3)
    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", lambda *_: (_ for _ in ()).throw(OSError(116, "Stale handle")))
        assert saver.prune() == []
    assert "could not be listed for deletion: [Errno 116] Stale handle" in caplog.text
    assert saver.prune() == [1]
