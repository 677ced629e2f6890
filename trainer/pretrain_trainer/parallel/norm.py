"""The norm of all gradients and their clipping, wherever their parts are.

torch's own functions handle gradients of one mesh. Here there may be several: experts lie on
another mesh than the rest, and stages of a pipeline hold different parameters altogether. Squares
of norms add up, so each mesh computes its own.
"""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pretrain_trainer.parallel.mesh import Mesh

T = TypeVar("T", bound=Tensor)


def total_norm(gradients: Iterable[Tensor], mesh: Mesh) -> Tensor:
    """The 2-norm of all gradients of the whole model. Collective.

    Args:
        gradients: this rank's; plain tensors are taken to be the same on all ranks of a stage.
        mesh: of the world.

    Returns:
        A float scalar, the same on every rank.
    """
    norms = [_whole(get_total_norm(group)) for group in _by_mesh(gradients)]
    if len(norms) == 1 and mesh.pp is None:
        return norms[0]
    squares = torch.stack(norms).square().sum()
    if mesh.pp is not None:
        dist.all_reduce(squares, group=mesh.pp.get_group())
    return squares.sqrt()


def clip(parameters: Iterable[Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale this rank's gradients, in place, as if all together had the norm ``max_norm`` at most.

    Args:
        parameters: with gradients.
        max_norm: to have afterwards.
        norm: a float scalar, what :func:`total_norm` gave.
    """
    for group in _by_mesh(parameters):
        clip_grads_with_norm_(group, max_norm, norm)


def _by_mesh(tensors: Iterable[T]) -> list[list[T]]:
    groups: dict[DeviceMesh | None, list[T]] = {}
    for tensor in tensors:
        place = tensor.device_mesh if isinstance(tensor, DTensor) else None
        groups.setdefault(place, []).append(tensor)
    return list(groups.values())


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
