"""Reading ``.metadata`` without trusting it.

DCP keeps the table of contents of a checkpoint as a pickle, and torch reads it with the ordinary
unpickler, which runs whatever the file says. We keep the format, so that torch's own tools can read
our checkpoints, but read it with an allow-list: the dataclasses of the table, sizes and dtypes.
Nothing on the list does anything but hold values. Afterwards every number is checked against the
files, because the table also says where to read and how much memory to ask for.
"""

import collections
import io
import math
import pathlib
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from .errors import DamagedError

SIZE_LIMIT = 1 << 30  # bytes; the table of a 405B model on 16,384 ranks is about a third of this


def _member(kind: Any, name: str) -> dcp._MEM_FORMAT_ENCODING:
    """Stands in for getattr, which is how Python 3.11.0 to 3.11.3 pickles a member of an enum."""
    if kind is not dcp._MEM_FORMAT_ENCODING:
        raise DamagedError(f".metadata asks for {name} of {kind}, which has no place there")
    return dcp._MEM_FORMAT_ENCODING[name]


_ALLOWED: dict[tuple[str, str], Any] = {("builtins", "getattr"): _member} | {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        dcp.Metadata,
        dcp.MetadataIndex,
        dcp.TensorStorageMetadata,
        dcp.BytesStorageMetadata,
        dcp.ChunkStorageMetadata,
        dcp.TensorProperties,
        dcp.StorageMeta,
        dcp._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
        torch.serialization._get_layout,
        collections.OrderedDict,
        pathlib.PosixPath,  # DCP records the folder it wrote to
    )
}


class _AllowListUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """Look a name up in the list; anything else ends the reading."""
        if module_name == "torch":
            dtype = getattr(torch, global_name, None)
            if isinstance(dtype, torch.dtype):
                return dtype
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise DamagedError(
                f".metadata asks for {module_name}.{global_name}, "
                "which has no place in a checkpoint"
            ) from None


def dump(table: dcp.Metadata) -> bytes:
    """The content of ``.metadata``, as torch's own reader expects it."""
    return pickle.dumps(table)


def load(data: bytes | bytearray, sizes: dict[str, int]) -> dcp.Metadata:
    """Unpickle a table of contents and check it against the files.

    Args:
        data: content of ``.metadata``.
        sizes: bytes of every file that the table may refer to, by name.

    Raises:
        DamagedError: it holds anything but a table, or the table doesn't fit the files.
    """
    try:
        table = _AllowListUnpickler(io.BytesIO(data)).load()
    except DamagedError:
        raise
    except Exception as error:  # a broken pickle can raise almost anything
        raise DamagedError(f".metadata can't be read: {type(error).__name__}: {error}") from error
    try:
        _check(table, sizes)
    except (AttributeError, TypeError, ValueError) as error:
        raise DamagedError(f".metadata is not a table of contents: {error}") from error
    return table


def _check(table: dcp.Metadata, sizes: dict[str, int]) -> None:
    if not isinstance(table, dcp.Metadata):
        raise TypeError(f"it is a {type(table).__name__}")
    for name, entry in table.state_dict_metadata.items():
        if isinstance(entry, dcp.BytesStorageMetadata):
            continue
        for chunk in entry.chunks:
            _check_chunk(table, sizes, name, entry, chunk)


def _check_chunk(
    table: dcp.Metadata,
    sizes: dict[str, int],
    name: str,
    entry: dcp.TensorStorageMetadata,
    chunk: dcp.ChunkStorageMetadata,
) -> None:
    inside = len(chunk.offsets) == len(chunk.sizes) == len(entry.size) and all(
        offset >= 0 and size >= 0 and offset + size <= whole
        for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
    )
    if not inside:
        raise ValueError(f"a part of {name} lies outside of it")
    where = table.storage_data.get(dcp.MetadataIndex(name, chunk.offsets))
    if where is None:
        raise ValueError(f"a part of {name} is stored nowhere")
    if where.relative_path not in sizes:
        raise ValueError(f"{name} is said to be in {where.relative_path!r}, an unknown file")
    if not 0 <= where.offset <= where.offset + where.length <= sizes[where.relative_path]:
        raise ValueError(f"{name} is said to lie outside of {where.relative_path}")
    if math.prod(chunk.sizes) * entry.properties.dtype.itemsize > where.length:
        raise ValueError(f"{name} is said to be larger than the bytes it is stored in")
