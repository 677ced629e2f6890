"""A damaged checkpoint is never loaded; the one before it is, and the report says why."""

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain_trainer.checkpoint import manifest
from pretrain_trainer.checkpoint.errors import (
    CheckpointConfigError,
    DamagedError,
    NothingGoodError,
    SaveFailedError,
    UnreadableError,
    VanishedError,
)
from pretrain_trainer.checkpoint.verify import verified
from pretrain_trainer.errors import BadInputError, HopelessError


@pytest.fixture
def root(manager_at, state, tmp_path) -> Path:
    """Checkpoints of steps 10 and 20."""
    path = tmp_path / "checkpoint"
    saver = manager_at(path)()
    saver.save(10, without_ledger(state(10)))
    saver.save(20, without_ledger(state(20)))
    return path


@pytest.fixture
def falls_back(manager_at, state, same, root) -> Callable[[str], None]:
    """Check that a start takes step 10 and reports step 20 with this reason."""

    def check(reason: str) -> None:
        target = without_ledger(state(0))
        report = manager_at(root)(generation=2).load(target)
        assert report.step == 10
        assert [each.step for each in report.skipped] == [20]
        assert reason in report.skipped[0].reason
        assert same(target, without_ledger(state(10)))

    return check


def without_ledger(state):
    return {key: value for key, value in state.items() if key != "ledger"}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize(("chunk_bytes", "flips"), [(512, 500), (1 << 20, 2500)])
def test_no_flipped_bit_is_accepted(manager, state, tmp_path, chunk_bytes, flips):
    manager(chunk_bytes=chunk_bytes).save(20, state(20))
    folder = tmp_path / "checkpoint" / "step-20"
    files = [(path, path.stat().st_size * 8) for path in sorted(folder.iterdir())]
    chance = random.Random(20)
    for _ in range(flips):
        path, bits = chance.choices(files, weights=[bits for _, bits in files])[0]
        bit = chance.randrange(bits)
        flip(path, bit)
        with pytest.raises(DamagedError):
            verified(folder)
        flip(path, bit)
    verified(folder)


def test_no_flipped_bit_of_a_manifest_is_accepted(root):
    good = (root / "step-20" / manifest.NAME).read_bytes()
    for bit in range(len(good) * 8):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError):
            manifest.decode(bytes(data))


def test_no_truncation_is_accepted(root):
    folder = root / "step-20"
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for length in {0, 1, len(good) // 2, len(good) - 1, *range(0, len(good), 97)}:
            path.write_bytes(good[:length])
            with pytest.raises(DamagedError):
                verified(folder)
        path.write_bytes(good + b"\0")
        with pytest.raises(DamagedError):
            verified(folder)
        path.write_bytes(good)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_start_passes_over_any_damage(root, falls_back, data):
    path = data.draw(st.sampled_from(sorted((root / "step-20").iterdir())))
    good = path.read_bytes()
    start = data.draw(st.integers(0, len(good) - 1))
    end = data.draw(st.integers(start + 1, len(good)))
    # What was there, zeros (an unwritten block), or nothing (a shorter file).
    damage = data.draw(st.sampled_from([bytes(end - start), b"", os.urandom(end - start)]))
    bad = good[:start] + damage + good[end:]
    try:
        path.write_bytes(bad)
        if bad != good:
            falls_back("")
    finally:
        path.write_bytes(good)


def test_the_reason_names_file_and_place(root, falls_back):
    flip(root / "step-20" / "__0_0.distcp", 8 * 600)
    falls_back("__0_0.distcp is damaged between bytes 512 and 1024")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_missing_file(root, falls_back, name):
    (root / "step-20" / name).unlink()
    falls_back(f"{name} is missing")


def test_a_missing_manifest_means_never_committed(root, falls_back):
    (root / "step-20" / manifest.NAME).unlink()
    falls_back("it has no manifest.json, so it was never committed")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_links_pipes_and_folders_in_place_of_files(root, falls_back, tmp_path, name):
    path = root / "step-20" / name
    outside = shutil.move(path, tmp_path / "outside")
    path.symlink_to(outside)
    falls_back(f"{name} can't be opened")
    path.unlink()
    os.mkfifo(path)
    falls_back(f"{name} is not a plain file")
    path.unlink()
    path.mkdir()
    falls_back(f"{name} is not a plain file")


def test_stray_files_and_folders_are_ignored(root, manager_at, state):
    (root / "step-20" / "__9_9.distcp").write_bytes(b"stray")
    (root / "step-20" / "notes.txt").write_text("stray")
    for name in ("step-999-backup", "xstep-999", "step-0999", "step--1", "step-1e3"):
        shutil.copytree(root / "step-20", root / name)
    (root / "step-998").symlink_to(root / "step-20")
    (root / "step-997").write_text("a file")
    report = manager_at(root)(generation=2).load(without_ledger(state(0)))
    assert (report.step, report.skipped) == (20, ())


def test_a_folder_under_the_name_of_another_step(root, falls_back):
    shutil.rmtree(root / "step-20")
    shutil.copytree(root / "step-10", root / "step-20")
    falls_back("its manifest is that of step 10")


def test_a_file_of_another_step(root, falls_back):
    shutil.copy(root / "step-10" / "__0_0.distcp", root / "step-20")
    falls_back("__0_0.distcp is damaged")


def test_a_checkpoint_of_another_job(root, falls_back, manager_at, state, tmp_path):
    shutil.rmtree(root / "step-20")
    manager_at(tmp_path / "other")(uid="job-2").save(20, without_ledger(state(20)))
    shutil.move(tmp_path / "other" / "step-20", root)
    falls_back("it was made by another job (UID 'job-2')")


def test_an_unreadable_disk_is_damage_too(root, falls_back, monkeypatch):
    real = os.preadv
    bad = (root / "step-20" / "__0_0.distcp").stat().st_ino

    def failing(handle: int, buffers: list[memoryview], offset: int) -> int:
        if os.fstat(handle).st_ino == bad:
            raise OSError(5, "Input/output error")
        return real(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    falls_back("it can't be read: Input/output error")


@pytest.fixture
def stale(root, monkeypatch):
    """Storage that gives out no tensor for a while, as a worker's mount may."""
    with monkeypatch.context() as patch:
        real = os.preadv

        def failing(handle: int, buffers: list[memoryview], offset: int) -> int:
            if os.readlink(f"/proc/self/fd/{handle}").endswith(".distcp"):
                raise OSError(errno.ESTALE, "Stale file handle")
            return real(handle, buffers, offset)

        patch.setattr(os, "preadv", failing)
        yield patch


def test_storage_that_gives_out_nothing_now_may_be_tried_again(root, manager_at, state, stale):
    with pytest.raises(UnreadableError, match=r"no checkpoint in .* can be read .*Stale") as caught:
        manager_at(root)(generation=2).load(without_ledger(state(0)))
    assert not isinstance(caught.value, (HopelessError, BadInputError))
    stale.undo()
    report = manager_at(root)(generation=2).load(without_ledger(state(0)))
    assert (report.step, report.skipped) == (20, ())


def test_a_good_step_that_can_not_be_read_now_is_not_replaced(root, manager_at, state, stale):
    again = manager_at(root)(generation=2)
    with pytest.raises(SaveFailedError, match="step-20 exists and can't be read now"):
        again.save(20, without_ledger(state(21)))
    stale.undo()
    assert verified(root / "step-20").generation == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_initial_weights_that_may_not_be_read_need_a_person(
    root, manager_at, state, tmp_path, monkeypatch, number
):
    made = manager_at(tmp_path / "new")(initial_load_path=str(root / "step-20"))
    real = os.open

    def refuse(path: object, *rest: object, **options: object) -> int:
        if str(path).endswith("step-20"):
            raise OSError(number, os.strerror(number))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointConfigError, match="initial_load_path can't be loaded"):
        made.load(without_ledger(state(0)))


def test_initial_weights_that_can_not_be_read_now_may_be_tried_again(
    root, manager_at, state, tmp_path, stale
):
    made = manager_at(tmp_path / "new")(initial_load_path=str(root / "step-20"))
    with pytest.raises(UnreadableError, match="initial_load_path can't be read now") as caught:
        made.load(without_ledger(state(0)))
    assert not isinstance(caught.value, (HopelessError, BadInputError))


def test_nothing_good_is_no_fresh_start(root, manager_at, state):
    for step in (10, 20):
        flip(root / f"step-{step}" / ".metadata", 800)
    with pytest.raises(NothingGoodError, match=r"step-20: \.metadata is damaged .* start afresh"):
        manager_at(root)(generation=2).load(without_ledger(state(0)))


def test_an_empty_volume_is_no_fresh_start_where_there_were_checkpoints(
    manager_at, state, root, tmp_path
):
    empty = manager_at(tmp_path / "empty")(generation=7, recovering=True, saved_step=500)
    with pytest.raises(VanishedError, match="no checkpoint, but step-500 was") as caught:
        empty.load(state(0))
    assert not isinstance(caught.value, (HopelessError, BadInputError))  # it may be mounted later
    (tmp_path / "empty" / "step-500").mkdir()  # its content is being copied back
    with pytest.raises(VanishedError):
        empty.load(state(0))
    assert manager_at(root)(generation=2, saved_step=500).load(without_ledger(state(0))).step == 20


def test_what_was_never_committed_does_not_prevent_a_fresh_start(manager, state, tmp_path):
    manager().load(state(0))
    (tmp_path / "checkpoint" / "step-5").mkdir()
    report = manager(generation=2).load(state(0))
    assert report.step is None
    assert [each.step for each in report.skipped] == [5]


def test_a_damaged_step_that_was_asked_for_is_not_replaced_by_another(root, manager_at, state):
    flip(root / "step-20" / ".metadata", 800)
    with pytest.raises(NothingGoodError, match="step-20"):
        manager_at(root)(generation=2, load_step=20).load(without_ledger(state(0)))


def test_a_damaged_step_is_saved_anew(root, manager_at, state, same):
    flip(root / "step-20" / "__0_0.distcp", 8000)
    again = manager_at(root)(generation=2)
    again.load(without_ledger(state(0)))
    again.save(20, without_ledger(state(20)))
    target = without_ledger(state(0))
    assert manager_at(root)(generation=3).load(target).step == 20
    assert same(target, without_ledger(state(20)))
    assert not list(root.glob(".deleting-*"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"files": []}, "not listed"),
        ({"files": [{"name": "../../x", "bytes": 0, "chunks": []}]}, "name"),
        ({"files": [{"name": "/etc/passwd", "bytes": 0, "chunks": []}]}, "name"),
        ({"files": [{"name": ".metadata\n", "bytes": 0, "chunks": []}]}, "name"),
        ({"files": [{"name": ".metadata", "bytes": 0, "chunks": []}] * 2}, "twice"),
        ({"files": [{"name": ".metadata", "bytes": 1 << 62, "chunks": []}]}, "number of digests"),
        ({"files": [{"name": ".metadata", "bytes": -1, "chunks": []}]}, "bytes"),
        ({"step": -1}, "step"),
        ({"step": "20"}, "step"),
        ({"step": True}, "step"),
        ({"version": 2}, "version"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"total_bytes": 1}, "total_bytes"),
        ({"algorithm": "md5"}, "algorithm"),
    ],
)
def test_a_manifest_that_vouches_for_itself_is_still_read_strictly(root, change, reason):
    good = manifest.decode((root / "step-20" / manifest.NAME).read_bytes())
    content = {**good.model_dump(), **change}
    text = manifest._canonical({**content, "digest": manifest.digest(manifest._canonical(content))})
    with pytest.raises(DamagedError, match=reason):
        manifest.decode(text)


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"[" * 100_000, b"\xff", b'{"a":1,"a":1}'])
def test_what_is_no_manifest_at_all(text):
    with pytest.raises(DamagedError):
        manifest.decode(text)


def test_a_huge_manifest_is_not_even_read(root, falls_back):
    with open(root / "step-20" / manifest.NAME, "r+b") as file:
        file.truncate(1 << 40)
    falls_back("larger than any real one")


def test_a_crowded_folder_is_refused(manager, state, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain_trainer.checkpoint.root._LISTING_LIMIT", 50)
    (tmp_path / "checkpoint").mkdir()
    for number in range(51):
        (tmp_path / "checkpoint" / str(number)).touch()
    with pytest.raises(CheckpointConfigError, match="more than 50 entries"):
        manager().load(state(0))
