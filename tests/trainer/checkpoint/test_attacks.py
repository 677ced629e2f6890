"""Files made to run code or to eat memory are refused before they can.

The attacker here can write a manifest with right digests, so nothing is stopped by them.
"""

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from pretrain_trainer.checkpoint import manifest, metadata
from pretrain_trainer.checkpoint.errors import DamagedError
from pretrain_trainer.checkpoint.files import digest

Load = Callable[[], str]


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._mark}",)


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def folder(manager, state, tmp_path) -> Path:
    """A good checkpoint of step 20 above one of step 10, without ledgers."""
    saver = manager()
    for step in (10, 20):
        saver.save(step, {"model": state(step)["model"]})
    return tmp_path / "checkpoint" / "step-20"


@pytest.fixture
def refused(manager, state, mark) -> Load:
    """Load, see step 10 come out, and return why step 20 was refused."""

    def load() -> str:
        report = manager(generation=2).load({"model": state(0)["model"]})
        assert not mark.exists()
        assert report.step == 10
        return report.skipped[0].reason

    return load


def sign(folder: Path) -> None:
    """Make the manifest fit whatever the files hold now."""
    old = manifest.decode((folder / manifest.NAME).read_bytes())
    entries = []
    for entry in old.files:
        data = (folder / entry.name).read_bytes()
        size = old.chunk_bytes
        chunks = [digest(data[start : start + size]) for start in range(0, len(data), size)]
        entries.append(manifest.FileEntry(name=entry.name, bytes=len(data), chunks=chunks))
    total = sum(entry.bytes for entry in entries)
    new = old.model_copy(update={"files": entries, "total_bytes": total})
    (folder / manifest.NAME).write_bytes(manifest.encode(new))


def rewrite_table(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / ".metadata"
    table = pickle.loads(path.read_bytes())
    change(table)
    path.write_bytes(pickle.dumps(table))
    sign(folder)


def replace_part(folder: Path, data: bytes) -> None:
    """Let all parts of all tensors point to ``data``."""
    (folder / "__0_0.distcp").write_bytes(data)

    def change(table: Any) -> None:
        for index in table.storage_data:
            table.storage_data[index] = _StorageInfo("__0_0.distcp", 0, len(data))

    rewrite_table(folder, change)


def test_a_bomb_works_on_whoever_trusts_it(mark):
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bomb_in_the_table(folder, refused, mark, protocol):
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(mark), protocol))
    sign(folder)
    assert "which has no place in a checkpoint" in refused()


def test_a_bomb_hidden_deep_in_the_table(folder, refused, mark):
    def hide(table: Any) -> None:
        table.planner_data["model.a.bias"] = ("model", [{"x": Bomb(mark)}])

    rewrite_table(folder, hide)
    assert "system" in refused()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "os system",
        "posix system",
        "torch load",
        "torch.hub load",
        "torch.storage _load_from_bytes",
        "torch._utils _rebuild_tensor_v2",
        "functools partial",
        "operator attrgetter",
        "torch.distributed.checkpoint.filesystem FileSystemReader",
        "torch.distributed.checkpoint.metadata os.system",
        "torch Size.__class__",
    ],
)
def test_names_that_are_not_on_the_list(name):
    module, attribute = name.split()
    program = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, attribute)
    )
    with pytest.raises(DamagedError, match="no place in a checkpoint"):
        metadata.load(program + b"\x93.", {})


def test_getattr_finds_nothing_but_what_old_pythons_need():
    """It stands for members of one enum, and only there."""
    for target in (b"ctorch\nSize\n", b"cpathlib\nPosixPath\n"):
        with pytest.raises(DamagedError, match=r"\.metadata asks for"):
            metadata.load(b"cbuiltins\ngetattr\n(" + target + b"V__class__\ntR.", {})


@pytest.mark.parametrize("data", [b"", b"\x80", b"garbage", pickle.dumps(1), pickle.dumps([])])
def test_what_is_no_table(data):
    with pytest.raises(DamagedError, match=r"\.metadata"):
        metadata.load(data, {})


def test_a_bomb_in_place_of_a_tensor(folder, refused, mark):
    replace_part(folder, pickle.dumps(Bomb(mark)).ljust(5000))
    assert "is not a torch.save archive" in refused()


def test_a_bomb_inside_an_archive(folder, refused, mark):
    data = io.BytesIO()
    torch.save(Bomb(mark), data)
    replace_part(folder, data.getvalue())
    assert "can't be read: UnpicklingError" in refused()


def test_torch_saves_old_format(folder, refused):
    data = io.BytesIO()
    torch.save(torch.zeros(3), data, _use_new_zipfile_serialization=False)
    replace_part(folder, data.getvalue() * 4)
    assert "is not a torch.save archive" in refused()


def test_something_else_than_a_tensor(folder, refused):
    data = io.BytesIO()
    torch.save({"x": torch.zeros(1000)}, data)
    replace_part(folder, data.getvalue())
    assert "is a dict instead of a tensor" in refused()


def test_a_zip_bomb(folder, refused):
    data = io.BytesIO()
    torch.save(torch.zeros(1 << 20), data)
    small = io.BytesIO()
    with zipfile.ZipFile(data) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    replace_part(folder, small.getvalue())
    assert "unpacks to more than it is" in refused()


def test_a_tensor_of_another_shape_than_the_table_says(folder, refused):
    data = io.BytesIO()
    torch.save(torch.zeros(2, 500), data)
    replace_part(folder, data.getvalue())
    assert "than the table says" in refused()


def change_index(name: str, info: _StorageInfo) -> Callable[[Any], None]:
    def change(table: Any) -> None:
        shape = table.state_dict_metadata[name].size
        table.storage_data[MetadataIndex(name, torch.Size([0] * len(shape)))] = info

    return change


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (("../../../etc/passwd", 0, 9), "an unknown file"),
        (("/etc/passwd", 0, 9), "an unknown file"),
        (("manifest.json", 0, 9), "an unknown file"),
        (("__0_0.distcp", 0, 1 << 40), "lie outside"),
        (("__0_0.distcp", -5, 10), "lie outside"),
        (("__0_0.distcp", 0, -10), "lie outside"),
        (("__0_0.distcp", 0, 10), "larger than the bytes"),
    ],
)
def test_places_outside_of_the_files(folder, refused, place, reason):
    rewrite_table(folder, change_index("model.a.weight", _StorageInfo(*place)))
    assert reason in refused()


def test_a_tensor_of_a_million_million_elements(folder, refused):
    def enlarge(table: Any) -> None:
        entry = table.state_dict_metadata["model.a.weight"]
        entry.size = entry.chunks[0].sizes = torch.Size([1 << 20, 1 << 20])

    rewrite_table(folder, enlarge)
    assert "larger than the bytes it is stored in" in refused()


def test_parts_outside_of_their_tensor(folder, refused):
    def shift(table: Any) -> None:
        table.state_dict_metadata["model.a.weight"].chunks[0].offsets = torch.Size([1, 0])

    rewrite_table(folder, shift)
    assert "lies outside of it" in refused()


def test_a_file_swapped_after_it_was_checked(folder, refused, monkeypatch):
    """The bytes that are used are the bytes that were checked, whatever happens to the file."""
    from pretrain_trainer.checkpoint import loading

    promise = loading.promise

    def swap(peers: Any, path: Path) -> Any:
        found = promise(peers, path)
        if path == folder:
            data = bytearray((path / "__0_0.distcp").read_bytes())
            data[len(data) // 2] ^= 1
            evil = path.with_name("evil")
            evil.write_bytes(data)
            os.replace(evil, path / "__0_0.distcp")
        return found

    monkeypatch.setattr(loading, "promise", swap)
    assert "is damaged between" in refused()


def test_a_bomb_in_the_checkpoint_to_start_from(manager, folder, state, mark, tmp_path):
    """checkpoint.initial_load_path may have no manifest at all."""
    shutil.copytree(folder, tmp_path / "foreign")
    (tmp_path / "foreign" / manifest.NAME).unlink()
    (tmp_path / "foreign" / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    shutil.rmtree(folder.parent)
    with pytest.raises(Exception, match="no place in a checkpoint"):
        manager(initial_load_path=str(tmp_path / "foreign")).load({"model": state(0)["model"]})
    assert not mark.exists()


def test_tables_of_other_trainers_are_read(tmp_path):
    """The list has all that DCP itself writes, paths of folders and strides included."""
    content = {"w": torch.zeros(3, 4).t(), "n": {"b": torch.zeros((), dtype=torch.bfloat16)}}
    dcp.save(content, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    files = {path.name: path.stat().st_size for path in (tmp_path / "dcp").iterdir()}
    table = metadata.load((tmp_path / "dcp" / ".metadata").read_bytes(), files)
    assert set(table.state_dict_metadata) == {"w", "n.b"}
