"""Which part of a parameter this rank holds, for code that should not know about parallelism."""

from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class Placement(NamedTuple):
    """A rank's part of a tensor: ``local`` holds exactly ``whole[owned]``."""

    local: Tensor
    shape: tuple[int, ...]  # of the whole tensor
    owned: tuple[slice, ...]  # one per dimension


def placement_of(tensor: Tensor) -> Placement:
    """Where this rank's part of ``tensor`` lies in the whole.

    A plain tensor is its own whole. Raises ValueError for a placement that isn't one rectangle.
    """
    if not isinstance(tensor, DTensor):
        return Placement(tensor, tuple(tensor.shape), tuple(slice(0, n) for n in tensor.shape))
    if not all(type(place) is Shard or place.is_replicate() for place in tensor.placements):
        raise ValueError(f"{tensor.placements} is no contiguous part of a parameter")
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    owned = tuple(slice(start, start + n) for start, n in zip(offset, shape, strict=True))
    return Placement(tensor.to_local(), tuple(tensor.shape), owned)
