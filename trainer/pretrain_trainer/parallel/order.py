"""A pipeline schedule from a file: which rank does what, in which order.

A line for each rank, cells as torch writes them: ``0F1`` is the forward pass of microbatch 1 in
stage 0, ``B`` its backward pass, ``I`` and ``W`` the halves of that, for inputs and for weights.
Sending and receiving is not in the file but follows from it, and so does which rank has which
stages.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.distributed.pipelining.schedules import _Action, _ComputationType

from pretrain_trainer.errors import BadInputError

CSV = "parallelism.pipeline_parallel_schedule_csv"

Actions = Sequence[_Action | None]  # of one rank; None is to wait
Order = dict[int, list[_Action | None]]  # by rank of the pipeline


def read_order(path: Path, ranks: int) -> Order:
    """What each of so many ranks does.

    Raises:
        BadInputError: there is no such file, it isn't written so, or it is for another number of
            ranks.
    """
    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row]
        order: Order = {n: [_Action.from_str(cell) for cell in row] for n, row in enumerate(rows)}
    except (OSError, ValueError, csv.Error, RuntimeError) as error:
        raise BadInputError(f"{CSV}: {path} can't be read as a schedule: {error}") from error
    busy = sum(bool(stages_in(actions)) for actions in order.values())
    if not busy == len(order) == ranks:
        raise BadInputError(
            f"{CSV}: {path} has something to do for {busy} ranks, but "
            f"parallelism.pipeline_parallel_degree is {ranks}; make them equal"
        )
    return order


def stages_in(actions: Actions) -> tuple[int, ...]:
    """Numbers of the stages that a rank's actions are for, ascending."""
    return tuple(sorted({action.stage_index for action in _single(actions)}))


def splits_backward(order: Order) -> bool:
    """Whether any backward pass is in two halves."""
    halves = (_ComputationType.BACKWARD_INPUT, _ComputationType.BACKWARD_WEIGHT)
    return any(
        action.computation_type in halves
        for actions in order.values()
        for action in _single(actions)
    )


def _single(actions: Actions) -> Iterator[_Action]:
    """All actions, those that belong together one by one."""
    for action in actions:
        if action is not None:
            yield from action.sub_actions or (action,)
