"""Who writes which part of which tensor: DCP's planner, driven without its pickled messages.

torch's ``dcp.save`` gathers every rank's plan on rank 0, removes what several ranks hold (HSDP
replicas, plain tensors), and scatters the result; as pickles. The planner itself is public and pure
arithmetic, so we call it ourselves and send what it needs to know as JSON: for each part its name,
its place and its dtype. What comes out is the same table of contents.

Loading needs no talk at all: which bytes a rank wants follows from its own tensors and the table.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from .errors import CheckpointConfigError

# One part of a tensor, as JSON: path in the state, offsets, sizes, dtype, size of the whole, and
# whether it is a shard. Its name is the path joined by dots.
Part = list[Any]


def tensors_only(state: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """A copy of the state's nested dicts around the same tensors, without empty dicts.

    Raises:
        TypeError: something in it is no tensor; that would have to be stored as a pickle.
    """
    result: dict[str, Any] = {}
    for key, value in state.items():
        here = (*path, str(key))
        if isinstance(value, dict):
            nested = tensors_only(value, here)
            if nested:
                result[key] = nested
        elif isinstance(value, torch.Tensor):
            result[key] = value
        else:
            raise TypeError(
                f"{'.'.join(here)} is a {type(value).__name__}: a checkpoint holds only tensors"
            )
    return result


def propose(state: dict[str, Any]) -> tuple[DefaultSavePlanner, SavePlan, list[Part]]:
    """What this rank could write: a planner that knows the tensors, its plan, and that as JSON."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors_only(state), StorageMeta(), False)
    plan = planner.create_local_plan()
    return planner, plan, [_to_json(item, plan.planner_data) for item in plan.items]


def decide(proposals: list[list[Part]]) -> tuple[list[list[int]], Metadata]:
    """Rank 0: choose one writer for each part.

    Args:
        proposals: of every rank, in the order of ranks.

    Returns:
        for every rank the positions in its proposal that it writes, and the table of contents,
        still without places.

    Raises:
        ValueError: the parts of a tensor overlap or leave gaps.
    """
    plans = [_from_json(parts) for parts in proposals]
    chosen, table = DefaultSavePlanner().create_global_plan(plans)
    keep = []
    for plan, final in zip(plans, chosen, strict=True):
        kept = {item.index for item in final.items}
        keep.append([place for place, item in enumerate(plan.items) if item.index in kept])
    return keep, table


def fill_in(
    table: Metadata,
    proposals: list[list[Part]],
    keep: list[list[int]],
    places: list[list[tuple[int, int]]],
) -> None:
    """Note in the table where each part was written: (offset, length) in its rank's file."""
    table.storage_data = {}
    for rank, (parts, kept, written) in enumerate(zip(proposals, keep, places, strict=True)):
        for position, (offset, length) in zip(kept, written, strict=True):
            path, offsets = parts[position][:2]
            index = MetadataIndex(".".join(path), torch.Size(offsets))
            table.storage_data[index] = _StorageInfo(data_file(rank), offset, length)
    table.storage_meta = StorageMeta()
    if hasattr(table, "version"):
        table.version = "1.0.0"  # of DCP's format


def data_file(rank: int) -> str:
    """DCP's name for the file that a rank writes."""
    return f"__{rank}_0.distcp"


def request(state: dict[str, Any], table: Metadata) -> tuple[DefaultLoadPlanner, LoadPlan]:
    """What this rank has to read to fill the tensors of ``state`` in place.

    Raises:
        CheckpointConfigError: the checkpoint has no such tensor, or one of another shape.
    """
    wanted = tensors_only(state)
    for name, tensor in _leaves(wanted):
        entry = table.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointConfigError(f"it has no tensor {name}")
        if entry.size != tensor.size():
            raise CheckpointConfigError(
                f"{name} has the shape {list(entry.size)} there and {list(tensor.size())} here"
            )
    planner = DefaultLoadPlanner()
    planner.set_up_planner(wanted, table, False)
    return planner, planner.create_local_plan()


def sections(table: Metadata) -> set[str]:
    """The top-level keys of the state that was saved, such as model and optimizer."""
    paths = (table.planner_data or {}).values()
    return {str(path[0]) for path in paths}


def cast_floating(state: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same state with floating point tensors in another number format."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor

    return _map(tensors_only(state), convert)


def _map(state: dict[str, Any], convert: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {
        key: _map(value, convert) if isinstance(value, dict) else convert(value)
        for key, value in state.items()
    }


def _leaves(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _to_json(item: WriteItem, paths: dict[str, tuple[Any, ...]]) -> Part:
    data = item.tensor_data
    assert data is not None, "tensors_only let only tensors through"
    return [
        list(paths[item.index.fqn]),
        list(data.chunk.offsets),
        list(data.chunk.sizes),
        str(data.properties.dtype).removeprefix("torch."),
        list(data.size),
        item.type == WriteItemType.SHARD,
    ]


def _from_json(parts: list[Part]) -> SavePlan:
    items = []
    paths = {}
    for path, offsets, sizes, dtype, whole, shard in parts:
        name = ".".join(path)
        paths[name] = tuple(path)
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
            properties=TensorProperties(dtype=getattr(torch, dtype)),
            size=torch.Size(whole),
        )
        kind = WriteItemType.SHARD if shard else WriteItemType.TENSOR
        items.append(WriteItem(MetadataIndex(name, torch.Size(offsets)), kind, tensor_data=data))
    return SavePlan(items, planner_data=paths)
