"""Who may change a root: one job, and of it the newest generation."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain_trainer.checkpoint.errors import (
    CheckpointConfigError,
    FencedError,
    SaveFailedError,
)
from pretrain_trainer.errors import BadInputError, HopelessError


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "checkpoint"


def test_an_old_generation_neither_commits_nor_deletes(manager, state, root):
    old = manager(generation=1, keep_latest_k=2)
    for step in (10, 20, 30):
        old.save(step, {"model": state(step)["model"]})
    manager(generation=2).load({"model": state(0)["model"]})
    before = names(root)

    with pytest.raises(FencedError, match=r"generation 2 .* has taken over"):
        old.save(40, {"model": state(40)["model"]})
    with pytest.raises(FencedError):
        old.prune()

    assert names(root) == before


def test_an_old_generation_takes_no_space_from_the_newer_one(manager, state, root, monkeypatch):
    old = manager(generation=1)
    old.save(10, {"model": state(10)["model"]})
    manager(generation=2).load({"model": state(0)["model"]})
    monkeypatch.setattr("os.mkdir", lambda *_: pytest.fail("a folder for a save was made"))
    with pytest.raises(FencedError):
        old.save(20, {"model": state(20)["model"]})


def test_a_generation_overtaken_while_it_writes_does_not_commit(manager, state, root, monkeypatch):
    from pretrain_trainer.checkpoint.root import Root

    commit = Root.commit

    def overtaken(self: Root, folder: Path, step: int) -> None:
        manager(generation=2).load({"model": state(0)["model"]})
        commit(self, folder, step)

    old = manager(generation=1)
    old.save(10, {"model": state(10)["model"]})
    monkeypatch.setattr(Root, "commit", overtaken)
    with pytest.raises(FencedError):
        old.save(20, {"model": state(20)["model"]})
    assert [name for name in names(root) if "step" in name] == ["step-10"]


def test_an_old_generation_that_starts_late_is_turned_away(manager, state, root):
    manager(generation=3).save(10, state(10))
    before = names(root)
    with pytest.raises(FencedError, match="of generation 2"):
        manager(generation=2).load(state(10))
    assert names(root) == before


def test_the_newer_generation_clears_what_the_older_one_left(manager, state, root):
    manager(generation=1).save(10, state(10))
    for name in (".saving-step-20-g1-r0-00000000-1", ".deleting-step-5-g1-r2-00000000-1"):
        (root / name).mkdir()
        (root / name / "__0_0.distcp").write_bytes(b"part")
    future = root / ".saving-step-20-g9-r0-00000000-1"
    future.mkdir()
    strangers = [root / ".saving-notes", root / ".saving-step-1"]
    for stranger in strangers:
        stranger.mkdir()

    manager(generation=2).load(state(10))

    assert [name for name in names(root) if name.startswith((".saving", ".deleting"))] == sorted(
        path.name for path in (future, *strangers)
    )


def test_leftovers_are_never_followed_out_of_the_root(manager, state, root, tmp_path):
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "manifest.json").touch()
    manager(generation=1).save(10, state(10))
    (root / ".saving-step-20-g1-r0-00000000-1").symlink_to(outside)
    inside = root / ".saving-step-30-g1-r0-00000000-1"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    manager(generation=2).load(state(10))
    assert (outside / "manifest.json").exists()
    assert not inside.exists()


def test_a_restart_in_place_keeps_the_claim(manager, state, root):
    manager(generation=1).save(10, state(10))
    again = manager(generation=1)
    again.load(state(10))
    again.save(20, state(20))
    assert "step-20" in names(root)


def test_a_rank_of_an_earlier_round_is_fenced_too(manager, state):
    zombie = manager(generation=1, attempt=0)
    zombie.save(10, state(10))
    manager(generation=1, attempt=1).load(state(10))
    with pytest.raises(FencedError, match=r"generation 1 \(round 1\)"):
        zombie.save(20, state(20))


def test_of_two_runs_with_the_same_number_the_later_one_wins(manager, state):
    """Two `pretrain run` in the same folder are both generation 1; their nonces differ."""
    first = manager(nonce="one")
    first.save(10, state(10))
    second = manager(nonce="two")
    second.load(state(10))
    with pytest.raises(FencedError, match="another run has taken over"):
        first.save(20, state(20))
    assert second.save(20, state(20)).step == 20


def test_another_jobs_root_is_refused_with_the_way_out(manager, state, root):
    manager(uid="job-1").save(10, state(10))
    before = names(root)
    for use in ("load", "save"):
        other = manager(uid="job-2", generation=5)
        arguments = (state(10),) if use == "load" else (20, state(20))
        with pytest.raises(CheckpointConfigError) as refused:
            getattr(other, use)(*arguments)
        assert "belongs to another job" in str(refused.value)
        assert "checkpoint.initial_load_path (initialLoadPath in a" in str(refused.value)
        assert f"to {root / 'step-10'} and checkpoint.folder to a new" in str(refused.value)
        assert isinstance(refused.value, BadInputError)
    assert names(root) == before


def test_a_root_that_changes_hands_stops_its_old_owner(manager, state, root):
    saver = manager(uid="job-1")
    saver.save(10, state(10))
    (root / "root.json").write_text(json.dumps({"job_uid": "job-2", "version": 1}))
    with pytest.raises(CheckpointConfigError, match="belongs to another job"):
        saver.save(20, state(20))


def test_checkpoints_without_an_owner_are_not_adopted_silently(manager, state, root):
    manager().save(10, state(10))
    (root / "root.json").unlink()
    with pytest.raises(CheckpointConfigError, match=r"step-10\) but no root\.json"):
        manager(generation=2).load(state(10))


@pytest.mark.parametrize("content", ["", "null", "[]", '{"job": 1}', "\0" * 100])
def test_a_broken_owner_file_is_explained(manager, state, root, content):
    manager().save(10, state(10))
    (root / "root.json").write_text(content)
    with pytest.raises(CheckpointConfigError, match=r'write \{"job_uid": "job-1"\} into it'):
        manager(generation=2).load(state(10))


def test_a_fenced_worker_is_not_retried():
    assert issubclass(FencedError, HopelessError)


def test_a_volume_that_only_reads_can_be_loaded_from(manager, state, root, tmp_path):
    manager().save(10, state(10))
    before = names(root)
    assert manager(generation=2, load_only=True).load(state(10)).step == 10
    assert names(root) == before
    shutil.rmtree(root)
    assert manager(load_only=True).load(state(10)).step is None


@pytest.mark.parametrize("use", ["load", "save"])
@pytest.mark.parametrize("call", ["open", "preadv"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
def test_an_owner_that_can_not_be_read_now_may_be_read_later(
    manager, state, monkeypatch, use, call, error
):
    """Trouble of the storage is no configuration error: another attempt may find it over."""
    saver = manager()
    saver.save(10, state(10))
    real, handles = {name: getattr(os, name) for name in ("open", "preadv")}, []

    def troubled(*arguments: Any, **keywords: Any) -> Any:
        name = arguments[0]
        if (call == "open" and name == "root.json") or name in handles:
            raise OSError(error, os.strerror(error))
        return real[call](*arguments, **keywords)

    def noted(*arguments: Any, **keywords: Any) -> int:
        handle = real["open"](*arguments, **keywords)
        handles.extend([handle] if arguments[0] == "root.json" else [])
        return handle

    with monkeypatch.context() as patch:
        if call == "preadv":
            patch.setattr(os, "open", noted)
        patch.setattr(os, call, troubled)
        with pytest.raises(SaveFailedError) as failed:
            manager(generation=2).load(state(10)) if use == "load" else saver.save(20, state(20))
    assert os.strerror(error) in str(failed.value)
    assert not isinstance(failed.value, BadInputError)
    assert manager(generation=2).load(state(10)).step == 10


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '"job-1"', "\ud800", '{"job_uid": 3}'])
def test_an_owner_with_wrong_content_needs_a_person(manager, state, root, content):
    manager().save(10, state(10))
    owner = root / "root.json"
    owner.unlink()
    if content is None:
        owner.mkdir()
    else:
        owner.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointConfigError, match=r"root\.json can't be read|another job"):
        manager(generation=2).load(state(10))
