"""Expert parallelism: whole experts live on different ranks, and tokens travel to them.

A mixture of experts hands its experts rows in their order and how many each gets. Here that call
is replaced by one that sends each row to the rank of its expert and the answer back: two all-to-all
exchanges of as many rows as there are, so none is dropped and none is made up. The ranks of ``ep``
are borrowed from those that share the other weights, so experts lie on a mesh of their own
(:attr:`pretrain_trainer.parallel.mesh.Mesh.experts`), sharded by FSDP over the ranks that are left.

With tensor parallelism there are two ways. If the ranks of ``tp`` are borrowed as well
(``expert_tensor_parallel_degree`` 1), each sends the rows of its own positions. If they split each
expert instead (w1 and w3 by column, w2 by row), all of them route all positions, and their answers
are parts of a sum. Without expert parallelism they split each expert, as torchtitan has it.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional

from pretrain_api.config import RunConfig
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.models.moe import Experts, MoE, Router, answer, mixtures, permute
from pretrain_trainer.parallel.layout import local
from pretrain_trainer.parallel.mesh import Mesh
from pretrain_trainer.parallel.tensor import POSITIONS

EXPERTS, HIDDEN = 0, {"w1": 1, "w2": 2, "w3": 1}  # dimensions of the stacked weights

# From [rows, dim] in the order of experts, and integer [experts], to [rows, dim].
Answer = Callable[[Tensor, Tensor], Tensor]


def split(model: LanguageModel, config: RunConfig, mesh: Mesh) -> None:
    """Put every mixture of experts in ``model`` on its ranks, in place.

    Raises:
        BadInputError: there are no experts, or they can't be shared evenly.
    """
    check(model, config, mesh)
    for moe in mixtures(model):
        moe.router.round_robin = config.training.debug_moe_force_load_balance
        if mesh.tp is not None:
            _replicate(moe.router, mesh.tp)
        if mesh.expert_parts is not None:
            _split_weights(moe.experts, mesh)
        if mesh.degrees.ep > 1:
            _dispatch(moe.experts, mesh.expert_parts)
        if mesh.tp is not None and mesh.splits_experts:
            _route_all_positions(moe, mesh.tp)


def check(model: LanguageModel, config: RunConfig, mesh: Mesh) -> None:
    """Raise BadInputError for keys that this model, or part of one, can't follow."""
    mixed, degrees = mixtures(model), mesh.degrees
    keys = {
        "parallelism.expert_parallel_degree": degrees.ep > 1,
        "parallelism.expert_tensor_parallel_degree": degrees.etp > 1,
        "training.debug_moe_force_load_balance": config.training.debug_moe_force_load_balance,
    }
    name = f"{config.model.name} {config.model.flavor}"
    for key, wanted in keys.items():
        if wanted and model.layers and not mixed:
            raise BadInputError(f"{key}: {name} has no experts; leave it at its default")
    for moe in mixed:
        if moe.shape.num_experts % degrees.ep:
            raise BadInputError(
                f"parallelism.expert_parallel_degree: {degrees.ep} doesn't divide the "
                f"{moe.shape.num_experts} experts of {name}; use a divisor of them"
            )


def shard_placement(
    block: nn.Module, config: RunConfig, mesh: Mesh
) -> Callable[[nn.Parameter], Shard | ShardPlacementResult | None] | None:
    """Which mesh and dimension FSDP shards a block's parameters over; None for all alike.

    Experts are sharded whole where each rank gets as many as the others, else each along its first
    dimension.
    """
    experts = [weight for moe in mixtures(block) for weight in moe.experts.parameters()]
    if not experts:
        return None
    own = mesh.expert_fsdp
    info = None
    if mesh.experts is not None:
        hybrid = own.ndim > 1
        info = HSDPMeshInfo(own, 1, 0) if hybrid else FSDPMeshInfo(own, shard_mesh_dim=0)
    # Resharding to groups of ranks is only made for the first dimension.
    in_groups = isinstance(config.parallelism.fsdp_reshard_after_forward, int)

    def place(parameter: nn.Parameter) -> Shard | ShardPlacementResult | None:
        if not any(parameter is weight for weight in experts):
            return None
        stacked, first = local(parameter).shape[:2]
        ranks = own.size(-1)
        inside = stacked % ranks > 0 and first % ranks == 0 and not in_groups
        dimension = Shard(1 if inside else 0)
        return dimension if info is None else ShardPlacementResult(dimension, info)

    return place


def _replicate(router: Router, tp: DeviceMesh) -> None:
    """Have the router's matrix on every rank of ``tp``, its gradient summed over them."""
    gate = router.gate
    gate.weight = nn.Parameter(distribute_tensor(gate.weight, tp, [Replicate()]))

    def forward(x: Tensor) -> Tensor:
        # Each rank has seen its own positions, or its own part of the answers to all.
        weight = cast(DTensor, gate.weight).to_local(grad_placements=[Partial()])
        return functional.linear(x, weight)

    gate.forward = forward  # pyright: ignore[reportAttributeAccessIssue]  # another name for input


def _split_weights(experts: Experts, mesh: Mesh) -> None:
    """Leave this rank its experts, or its part of each, and compute with what is here."""
    parts = mesh.expert_parts
    assert parts is not None
    for name, weight in list(experts.named_parameters()):
        whole = mesh.degrees.ep > 1
        places = [Shard(EXPERTS)] if whole else []
        places += [Shard(HIDDEN[name])] if mesh.splits_experts else []
        setattr(experts, name, nn.Parameter(distribute_tensor(weight, parts, places)))

    def forward(rows: Tensor, counts: Tensor) -> Tensor:
        w1, w2, w3 = (local(weight) for weight in (experts.w1, experts.w2, experts.w3))
        return answer(rows, counts, w1, w2, w3)

    experts.forward = forward


def _dispatch(experts: Experts, parts: DeviceMesh | None) -> None:
    """Let experts be called with rows for all of them, wherever they live."""
    assert parts is not None
    group = parts.get_group(0)
    own: Answer = experts.forward

    def forward(rows: Tensor, counts: Tensor) -> Tensor:
        return dispatched(rows, counts, own, group)

    # How much travels is known on the host alone, so the compiler can't follow.
    still = torch.compiler.disable(forward)
    experts.forward = still  # pyright: ignore[reportAttributeAccessIssue]  # the same signature


def dispatched(rows: Tensor, counts: Tensor, own: Answer, group: dist.ProcessGroup) -> Tensor:
    """Answers of experts that are spread over a group, the first ones on the first rank.

    Collective; differentiable with respect to the rows.

    Args:
        rows: [rows, dim], those of the first expert first.
        counts: int64 [experts], rows of each.
        own: this rank's experts, called with all ranks' rows for them, by expert, and with how many
            each got.
        group: equal numbers of experts live on its ranks.

    Returns:
        [rows, dim], each row's answer in its place.
    """
    sent = counts.view(group.size(), -1)  # by rank and its expert
    taken = collectives.all_to_all_single(counts, None, None, group).view_as(sent)
    # The one wait for the device: how much travels must be known on the host.
    sends, takes = torch.stack((sent.sum(1), taken.sum(1))).tolist()
    arrived = exchange(rows, sends, takes, group)
    # Rows lie by rank, and by expert within: bring those of an expert together.
    each = torch.arange(sent.shape[1], device=rows.device).repeat(group.size())
    order = each.repeat_interleave(taken.flatten(), output_size=sum(takes)).argsort(stable=True)
    inverse = order.argsort()
    answers = own(permute(arrived, order, inverse), taken.sum(0))
    return exchange(permute(answers, inverse, order), takes, sends, group)


def exchange(rows: Tensor, sends: list[int], takes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Give each rank of the group its rows, in order, and take theirs. Collective.

    Args:
        rows: [sum of sends, dim]; differentiable.
        sends: rows for each rank.
        takes: rows from each rank.
        group: who exchanges.

    Returns:
        [sum of takes, dim].
    """
    moved = collectives.all_to_all_single_autograd(rows, takes, sends, group)
    return collectives.wait_tensor(moved)


def _route_all_positions(moe: MoE, tp: DeviceMesh) -> None:
    """Route the positions of all ranks of ``tp`` on each, and split the sum of their answers."""
    routed = moe.routed

    def forward(x: Tensor) -> Tensor:
        own = DTensor.from_local(x, tp, [Shard(POSITIONS)], run_check=False)
        # What each rank adds to a position's gradient comes from its part of the experts.
        everyone = own.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        parts = DTensor.from_local(routed(everyone), tp, [Partial()], run_check=False)
        return parts.redistribute(placements=[Shard(POSITIONS)]).to_local()

    moe.routed = forward
