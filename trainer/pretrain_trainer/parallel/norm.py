"""The norm of all gradients, wherever their parts are.

torch's own function handles gradients of one mesh. Here there may be several: experts lie on
another mesh than the rest, and stages of a pipeline hold different parameters altogether. Squares
of norms add up, so each mesh computes its own.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from pretrain_trainer.parallel.mesh import Mesh


def total_norm(gradients: Iterable[Tensor], mesh: Mesh) -> Tensor:
    """The 2-norm of all gradients of the whole model. Collective.

    Args:
        gradients: this rank's; plain tensors are taken to be the same on all ranks of a stage.
        mesh: of the world.

    Returns:
        A float scalar, the same on every rank.
    """
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for gradient in gradients:
        place = gradient.device_mesh if isinstance(gradient, DTensor) else None
        by_mesh.setdefault(place, []).append(gradient)
    norms = [_whole(get_total_norm(group)) for group in by_mesh.values()]
    if len(norms) == 1 and mesh.pp is None:
        return norms[0]
    squares = torch.stack(norms).square().sum()
    if mesh.pp is not None:
        dist.all_reduce(squares, group=mesh.pp.get_group())
    return squares.sqrt()


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
