"""The device mesh: which ranks do the same, and which share what.

Ranks are laid out row-major over torchtitan's axes, outermost first: ``pp``, ``dp_replicate``,
``dp_shard``, ``cp``, ``tp``. So the ranks that talk most, those of one tensor-parallel group, are
neighbours. What a degree is, and whether it is legal, was decided by pretrain_api.mesh.

Parameters are sharded over ``dp_shard`` and ``cp`` together, because the ranks of a sequence hold
the same weights; for torch that is one axis. The two data axes are always there, even where one of
them is 1: code that composes parallelisms then meets no special case. Other axes of size 1 don't
exist, because each would cost every start a process group.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pretrain_api.mesh import Degrees

PP: Final = "pp"
DP_REPLICATE: Final = "dp_replicate"
DP_SHARD: Final = "dp_shard"
CP: Final = "cp"
TP: Final = "tp"


class Coordinates(NamedTuple):
    """A rank's place along every axis, in the order of the mesh."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """The whole world as this rank sees it.

    Attributes:
        degrees: sizes of all axes.
        at: this rank's place.
        dense: torch's mesh of what layers outside of experts are laid out on: pp (if any),
            dp_replicate, dp_shard times cp under the name of dp_shard, and tp (if any).
        cp: the ranks that share a sequence; None if there is no such splitting.
    """

    degrees: Degrees
    at: Coordinates
    dense: DeviceMesh
    cp: dist.ProcessGroup | None = None

    @property
    def fsdp(self) -> DeviceMesh:
        """The axes that FSDP replicates and shards over."""
        hybrid = self.degrees.dp_replicate > 1
        return self.dense[DP_REPLICATE, DP_SHARD] if hybrid else self.dense[DP_SHARD]

    @property
    def tp(self) -> DeviceMesh | None:
        """The axis that matrices are split over; None if they are whole."""
        return self.dense[TP] if self.degrees.tp > 1 else None

    @property
    def pp(self) -> DeviceMesh | None:
        """The axis of stages; None if there is one."""
        return self.dense[PP] if self.degrees.pp > 1 else None

    @property
    def data_rank(self) -> int:
        """This rank's number among those that see different samples."""
        return self.at.dp_replicate * self.degrees.dp_shard + self.at.dp_shard

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for all that see the same samples."""
        return self.at.pp == self.at.cp == self.at.tp == 0

    def groups(self) -> list[dist.ProcessGroup]:
        """Every group of the mesh that this rank is in."""
        found = [*self.dense.get_all_groups(), self.cp]
        return [group for group in found if group is not None]


def build_mesh(degrees: Degrees, device: torch.device) -> Mesh:
    """The mesh of the whole world. Collective."""
    axes = {PP: degrees.pp, DP_REPLICATE: degrees.dp_replicate}
    axes |= {DP_SHARD: degrees.dp_shard * degrees.cp, TP: degrees.tp}
    shape = {name: n for name, n in axes.items() if n > 1 or name in (DP_REPLICATE, DP_SHARD)}
    dense = init_device_mesh(device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    at = coordinates(degrees, dist.get_rank())
    return Mesh(degrees, at, dense, _sequence_group(degrees) if degrees.cp > 1 else None)


def coordinates(degrees: Degrees, rank: int) -> Coordinates:
    """The place of a rank of the world."""
    return Coordinates(*(int(i) for i in np.unravel_index(rank, sizes(degrees))))


def sizes(degrees: Degrees) -> Coordinates:
    """Degrees of the mesh's axes, outermost first."""
    return Coordinates(degrees.pp, degrees.dp_replicate, degrees.dp_shard, degrees.cp, degrees.tp)


def _sequence_group(degrees: Degrees) -> dist.ProcessGroup:
    """The ranks that differ from this one along cp alone. Collective."""
    ranks = np.arange(degrees.world_size).reshape(sizes(degrees))
    members = np.moveaxis(ranks, Coordinates._fields.index(CP), -1).reshape(-1, degrees.cp)
    group, _ = dist.new_subgroups_by_enumeration(members.tolist())
    assert isinstance(group, dist.ProcessGroup), "every rank is in one"
    return group


def gather_rows(own: Tensor, control: dist.ProcessGroup, mesh: Mesh) -> Tensor:
    """Stack every data rank's rows, in the order of :attr:`Mesh.data_rank`. Collective.

    Args:
        own: [rows, ...] on the host, the same shape and dtype on every rank; ranks that see the
            same samples have the same.
        control: all ranks, in the order of the world.
        mesh: of the world.

    Returns:
        [data ranks x rows, ...].
    """
    parts = [torch.empty_like(own) for _ in range(control.size())]
    dist.all_gather(parts, own, group=control)
    # The data axes lie between pp and cp, so those that lead are evenly spaced in the first stage.
    same = mesh.degrees.cp * mesh.degrees.tp
    return torch.cat(parts[: mesh.degrees.dp * same : same])
