"""What a checkpoint says, whatever its layout.

``python -m pretrain_trainer.checkpoint.digest PATH [--section model]``

Two runs ended alike if their final weights have the same digest, be they saved by one rank or by a
hundred. So the digest is taken of logical tensors: each is put together from its parts and goes
into its section's SHA-256 as name, dtype, shape and bytes, in the order of names. A section that is
a single tensor is digested as its bare bytes. Small tensors are read together, because each read
verifies whole chunks of the files; one by one that would be gigabytes for a toy.

PATH is a step folder, or a root whose newest good checkpoint is taken.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from . import loading, manifest, planning, tensors
from .errors import CheckpointError
from .files import Folder
from .manifest import Manifest
from .verify import newest_good

MODEL = "model"
BATCH_BYTES = 2**28  # of tensors in memory at a time, if none is larger


def digests(path: Path, only: str | None = None) -> dict[str, str]:
    """SHA-256 of each section of the checkpoint in a step folder, as hex.

    A checkpoint of bare weights has the one section ``model``.

    Args:
        path: the step folder.
        only: digest this section alone.

    Raises:
        DamagedError: it is not a good checkpoint.
    """
    with loading.reading(), Folder.open(path) as folder:
        promised = manifest.read(folder)
        expected = {entry.name: entry.expected for entry in promised.files}
        table = loading.open_table(folder, expected, promised.chunk_bytes)
        sections = _sections(table, promised.model_only)
        return {
            section: _section(folder, promised, table, names)
            for section, names in sorted(sections.items())
            if only in (None, section)
        }


def _sections(table: Metadata, model_only: bool) -> dict[str, dict[str, str]]:
    """Names of the tensors in each section: within the section, and in the table."""
    sections: dict[str, dict[str, str]] = {}
    for name, path in (table.planner_data or {}).items():
        section, inner = (MODEL, path) if model_only else (str(path[0]), path[1:])
        sections.setdefault(section, {})[".".join(map(str, inner))] = name
    return sections


def _section(folder: Folder, promised: Manifest, table: Metadata, names: dict[str, str]) -> str:
    total = hashlib.sha256()
    for batch in _batches(table, sorted(names.items())):
        whole = _logical(folder, promised, table, [name for _, name in batch])
        for inner, name in batch:
            tensor = whole[name]
            if inner:
                kind = [inner, str(tensor.dtype), list(tensor.shape)]
                total.update(json.dumps(kind).encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _batches(table: Metadata, names: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Neighbours that fit into :data:`BATCH_BYTES` together, or a single larger one."""
    batch: list[tuple[str, str]] = []
    size = 0
    for inner, name in names:
        entry = _entry(table, name)
        more = entry.size.numel() * entry.properties.dtype.itemsize
        if batch and size + more > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((inner, name))
        size += more
    if batch:
        yield batch


def _entry(table: Metadata, name: str) -> TensorStorageMetadata:
    entry = table.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata), "we save only tensors"
    return entry


def _logical(
    folder: Folder, promised: Manifest, table: Metadata, names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Whole tensors, on the CPU."""
    entries = {name: _entry(table, name) for name in names}
    whole = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
    }
    planner, plan = planning.request({**whole}, table)
    expected = {each.name: each.expected for each in promised.files}
    tensors.read(folder, expected, promised.chunk_bytes, table, plan, planner)
    return whole


def main(arguments: list[str] | None = None) -> int:
    """Print ``section digest`` lines, or the bare digest of one section."""
    parser = argparse.ArgumentParser(prog="digest", description="Digest a checkpoint's content.")
    parser.add_argument("path", type=Path, help="step-N folder, or root of such")
    parser.add_argument("--section", help="print only the digest of this section, such as model")
    options = parser.parse_args(arguments)
    try:
        found = digests(newest_good(options.path), options.section)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    if options.section is None:
        for section, value in found.items():
            print(section, value)
    elif options.section in found:
        print(found[options.section])
    else:
        print(f"{options.path} has no section {options.section}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
