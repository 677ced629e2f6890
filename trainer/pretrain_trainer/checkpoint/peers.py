"""How the ranks talk about a checkpoint: JSON in byte tensors over gloo, never pickle.

torch's own checkpoint planning sends pickled objects, which means that whoever can reach one rank's
port can run code in all of them. What ranks have to tell each other is small and plain (plans,
digests, verdicts), so it goes as JSON. The second job of this module is that no error leaves peers
waiting: work that may fail on one rank ends in a collective verdict, after which either all ranks
go on or all raise the same error.

Without a group a process is simply a world of one.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain_trainer.alive import Alive, unwatched

from .errors import BY_NAME, CheckpointError

T = TypeVar("T")

_MESSAGE_LIMIT = 2000  # characters of an error's text that travel to the peers


class Peers:
    """The ranks that save and load together; rank 0 speaks for all.

    Args:
        group: a process group with a gloo (CPU) backend, and a timeout that bears with slow
            storage. None is a world of one.
        alive: what this rank's work calls when it gets on; waiting for others is no work.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, alive: Alive = unwatched) -> None:
        self._group = group
        self.alive = alive
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    def gather(self, value: Any) -> list[Any] | None:
        """Collect one JSON value from every rank; rank 0 gets the list, the others None."""
        if self._group is None:
            return [value]
        data, width = self._padded(value)
        rows = [torch.empty(width, dtype=torch.uint8) for _ in range(self.size)]
        dist.gather(data, rows if self.rank == 0 else None, group_dst=0, group=self._group)
        return [_decode(row) for row in rows] if self.rank == 0 else None

    def broadcast(self, value: Any = None) -> Any:
        """Give rank 0's JSON value to every rank."""
        if self._group is None:
            return value
        data, _ = self._padded(value if self.rank == 0 else None)
        dist.broadcast(data, group_src=0, group=self._group)
        return _decode(data)

    def scatter(self, values: list[Any] | None) -> Any:
        """Give every rank its own of rank 0's JSON values."""
        if self._group is None:
            return values[0] if values else None
        rows = [_encode(value) for value in values] if values is not None else []
        width = self._largest(max((len(row) for row in rows), default=0))
        mine = torch.empty(width, dtype=torch.uint8)
        padded = [_pad(row, width) for row in rows] if self.rank == 0 else None
        dist.scatter(mine, padded, group_src=0, group=self._group)
        return _decode(mine)

    def everywhere(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; if it raises anywhere, all ranks raise.

        The rank whose work failed raises its own error, the others the first failing rank's: of
        the same class where that is a :class:`CheckpointError`.
        """
        result, error = _attempt(work)
        self._agree(error)
        return result  # type: ignore[return-value]  # no error, so work() returned it

    def first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 alone and give its JSON-able result, or its error, to all."""
        result, error = _attempt(work) if self.rank == 0 else (None, None)
        self._agree(error)
        return self.broadcast(result)

    def _agree(self, error: Exception | None) -> None:
        failed = self._largest(1 if error is not None else 0)
        if not failed:
            return
        told = self.gather(None if error is None else [type(error).__name__, _text(error)])
        verdict = self.broadcast(_first_failure(told) if told is not None else None)
        if error is not None:
            raise error
        rank, kind, text = verdict
        if kind in BY_NAME:
            raise BY_NAME[kind](text)
        raise CheckpointError(f"rank {rank} failed: {kind}: {text}")

    def _largest(self, number: int) -> int:
        if self._group is None:
            return number
        tensor = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return int(tensor.item())

    def _padded(self, value: Any) -> tuple[torch.Tensor, int]:
        data = _encode(value)
        width = self._largest(len(data))
        return _pad(data, width), width


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Result or error of ``work``. Whoever calls this has to raise the error in the end."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def _first_failure(told: list[Any]) -> list[Any]:
    return next([rank, *failure] for rank, failure in enumerate(told) if failure is not None)


def _text(error: Exception) -> str:
    return str(error)[:_MESSAGE_LIMIT]


def _encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _pad(data: bytes, width: int) -> torch.Tensor:
    """``data`` as uint8 [width], filled up with blanks, which JSON ignores."""
    return torch.frombuffer(bytearray(data.ljust(width)), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
