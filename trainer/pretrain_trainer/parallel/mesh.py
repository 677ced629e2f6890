"""The device mesh: which ranks do the same, and which share what.

Ranks are laid out row-major over torchtitan's axes, outermost first: ``pp``, ``dp_replicate``,
``dp_shard``, ``cp``, ``tp``. So the ranks that talk most, those of one tensor-parallel group, are
neighbours. What a degree is, and whether it is legal, was decided by pretrain_api.mesh.

Parameters are sharded over ``dp_shard`` and ``cp`` together, because the ranks of a sequence hold
the same weights; for torch that is one axis. The two data axes are always there, even where one of
them is 1: code that composes parallelisms then meets no special case. Other axes of size 1 don't
exist, because each would cost every start a process group.

Experts lie on a second mesh over the same ranks, ``pp``, ``dp_replicate``, ``efsdp``, ``ep`` and
``etp``: ``ep`` takes neighbours out of dp_shard and cp, and out of tp where the ranks of tp don't
split each expert; ``efsdp`` is what remains to shard each rank's experts over.
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
EFSDP: Final = "efsdp"
EP: Final = "ep"
ETP: Final = "etp"


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
        experts: torch's mesh of what experts are laid out on: pp (if any), dp_replicate, efsdp, ep
            and etp (if any); None if whole experts aren't split over ranks.
    """

    degrees: Degrees
    at: Coordinates
    dense: DeviceMesh
    cp: dist.ProcessGroup | None = None
    experts: DeviceMesh | None = None

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
    def expert_fsdp(self) -> DeviceMesh:
        """The axes that FSDP replicates and shards experts over."""
        if self.experts is None:
            return self.fsdp
        hybrid = self.degrees.dp_replicate > 1
        return self.experts[DP_REPLICATE, EFSDP] if hybrid else self.experts[EFSDP]

    @property
    def splits_experts(self) -> bool:
        """Whether each expert is split over the ranks of tp; they must have something to do."""
        return self.degrees.tp > 1 and (self.degrees.etp > 1 or self.degrees.ep == 1)

    @property
    def expert_parts(self) -> DeviceMesh | None:
        """The axes that experts are split over, ep before etp; None if all are whole here."""
        if self.experts is None:
            return self.tp
        return self.experts[EP, ETP] if self.splits_experts else self.experts[EP]

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
        second = [] if self.experts is None else self.experts.get_all_groups()
        found = [*self.dense.get_all_groups(), self.cp, *second]
        return [group for group in found if group is not None]

    def stage_groups(self) -> list[dist.ProcessGroup]:
        """Groups in which to add up, one after another, what the ranks of a stage counted."""
        axes = [DP_REPLICATE, DP_SHARD, *([TP] if self.degrees.tp > 1 else [])]
        return [self.dense.get_group(axis) for axis in axes]


def build_mesh(degrees: Degrees, device: torch.device) -> Mesh:
    """The mesh of the whole world. Collective."""
    axes = {PP: degrees.pp, DP_REPLICATE: degrees.dp_replicate}
    axes |= {DP_SHARD: degrees.dp_shard * degrees.cp, TP: degrees.tp}
    dense = _device_mesh(axes, device)
    at = coordinates(degrees, dist.get_rank())
    cp = _sequence_group(degrees) if degrees.cp > 1 else None
    return Mesh(degrees, at, dense, cp, _expert_mesh(degrees, device) if degrees.ep > 1 else None)


def coordinates(degrees: Degrees, rank: int) -> Coordinates:
    """The place of a rank of the world."""
    return Coordinates(*(int(i) for i in np.unravel_index(rank, sizes(degrees))))


def sizes(degrees: Degrees) -> Coordinates:
    """Degrees of the mesh's axes, outermost first."""
    return Coordinates(degrees.pp, degrees.dp_replicate, degrees.dp_shard, degrees.cp, degrees.tp)


def _expert_mesh(degrees: Degrees, device: torch.device) -> DeviceMesh:
    """See the module's docstring. Collective."""
    left = degrees.dp_shard * degrees.cp * degrees.tp // (degrees.ep * degrees.etp)
    axes = {PP: degrees.pp, DP_REPLICATE: degrees.dp_replicate, EFSDP: left, EP: degrees.ep}
    axes |= {ETP: degrees.etp}
    return _device_mesh(axes, device)


def _device_mesh(axes: dict[str, int], device: torch.device) -> DeviceMesh:
    """Torch's mesh of these axes, without those of size 1 that needn't be there. Collective."""
    always = (DP_REPLICATE, DP_SHARD, EFSDP)
    shape = {name: n for name, n in axes.items() if n > 1 or name in always}
    return init_device_mesh(device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))


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
