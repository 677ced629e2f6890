"""The device mesh: which ranks do the same, and which share what.

The mesh always has torchtitan's two data dimensions, ``dp_replicate`` and ``dp_shard``, even where
one of them is 1: code that composes parallelisms then meets no special case. What a degree is, and
whether it is legal, was decided by pretrain_api.mesh.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pretrain_api.mesh import Degrees

DP_REPLICATE = "dp_replicate"
DP_SHARD = "dp_shard"


def build_mesh(degrees: Degrees, device: torch.device) -> DeviceMesh:
    """The mesh of the whole world. Collective."""
    return init_device_mesh(
        device.type,
        (degrees.dp_replicate, degrees.dp_shard),
        mesh_dim_names=(DP_REPLICATE, DP_SHARD),
    )


def data_rank(mesh: DeviceMesh) -> int:
    """This rank's number among those that see different samples."""
    replicate, shard = mesh.get_local_rank(DP_REPLICATE), mesh.get_local_rank(DP_SHARD)
    return replicate * mesh[DP_SHARD].size() + shard


def gather_rows(own: Tensor, control: dist.ProcessGroup) -> Tensor:
    """Stack every data rank's rows, in the order of :func:`data_rank`. Collective.

    Args:
        own: [rows, ...] on the host, the same shape and dtype on every rank.
        control: all ranks, in the order of the world.

    Returns:
        [ranks x rows, ...].
    """
    # The mesh is row-major over the world, so ranks of the world are data ranks, in order.
    parts = [torch.empty_like(own) for _ in range(control.size())]
    dist.all_gather(parts, own, group=control)
    return torch.cat(parts)
