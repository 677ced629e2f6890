"""Old checkpoints go, but never the last good ones."""

from pathlib import Path

import pytest


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
