"""Which part of a parameter this rank holds, for code that should not know about parallelism."""

from math import prod
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard


class Placement(NamedTuple):
    """A rank's part of a tensor: ``local`` holds exactly ``whole[owned]``."""

    local: Tensor
    shape: tuple[int, ...]  # of the whole tensor
    owned: tuple[slice, ...]  # one per dimension


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory; of a plain one all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placement_of(tensor: Tensor) -> Placement:
    """Where this rank's part of ``tensor`` lies in the whole.

    A plain tensor is its own whole. What was split by a later axis of the mesh first and by an
    earlier one then (FSDP of a matrix that tensor parallelism had split) is one rectangle as well,
    though torch calls it strided. Raises ValueError for a placement that isn't one.
    """
    if not isinstance(tensor, DTensor):
        return Placement(tensor, tuple(tensor.shape), tuple(slice(0, n) for n in tensor.shape))
    if not all(_contiguous(tensor, axis) for axis in range(len(tensor.placements))):
        raise ValueError(f"{tensor.placements} is no contiguous part of a parameter")
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    owned = tuple(slice(start, start + n) for start, n in zip(offset, shape, strict=True))
    return Placement(tensor.to_local(), tuple(tensor.shape), owned)


def _contiguous(tensor: DTensor, axis: int) -> bool:
    """Whether the split along one axis of the mesh leaves neighbours together."""
    place = tensor.placements[axis]
    if not isinstance(place, _StridedShard):
        return isinstance(place, Shard) or place.is_replicate()
    sizes, later = tensor.device_mesh.shape, tensor.placements[axis + 1 :]
    inner = [n for n, p in zip(sizes[axis + 1 :], later, strict=True) if p.is_shard(place.dim)]
    return bool(place.split_factor == prod(inner))
