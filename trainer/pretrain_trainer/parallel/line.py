"""How parts of a sequence get from rank to rank, and how what was added to them comes home.

All at once they arrive with one all-gather, and sums go back with one reduce-scatter: the fewest
messages, for the memory of whole sequences. Around a ring each rank hands on what it has worked on,
so it holds its own part, the one it works on and the one that arrives meanwhile; a part's sum
follows it, one step behind. Sums are float32 even of bfloat16.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    _resolve_process_group,  # pyright: ignore[reportPrivateImportUsage]
)

Fill = Callable[[int, Tensor, Tensor], None]  # a rank's keys and values, and zeros for gradients


def wide(dtype: torch.dtype) -> torch.dtype:
    """What parts of a tensor of ``dtype`` are added up in."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class Line(ABC):
    """The ranks that share a sequence; ``group`` is None if this is the only one."""

    group: dist.ProcessGroup | None
    rank: int
    degree: int

    @abstractmethod
    def visit(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every rank's ``own`` with its rank, this one's first. Collective."""

    @abstractmethod
    def collect(self, own: Tensor, fill: Fill) -> Tensor:
        """Visit every rank's ``own`` with a tensor to fill, and sum up what was filled for this.

        Collective. Sums have the shape of ``own``, in :func:`wide` of its dtype.
        """


class Gathered(Line):
    """All parts at once."""

    def visit(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Line`; the others travel while this rank's own is worked on."""
        everyone = own.new_empty((self.degree, *own.shape))
        flat = everyone.flatten(0, 1)  # as gloo wants it
        arrival = dist.all_gather_into_tensor(flat, own, self.group, async_op=True)
        yield self.rank, own
        cast(dist.Work, arrival).wait()
        for step in range(1, self.degree):
            other = (self.rank - step) % self.degree
            yield other, everyone[other]

    def collect(self, own: Tensor, fill: Fill) -> Tensor:
        """See :class:`Line`."""
        sums = torch.zeros((self.degree, *own.shape), dtype=wide(own.dtype), device=own.device)
        for other, part in self.visit(own):
            fill(other, part, sums[other])
        mine = torch.empty_like(sums[0])
        dist.reduce_scatter_tensor(mine, sums.flatten(0, 1), group=self.group)
        return mine


class Ring(Line):
    """One part after the other, from each rank to the next. Alone it is a ring of one."""

    def visit(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Line`; the next part travels while one is worked on."""
        for step in range(self.degree):
            passage = None if step == self.degree - 1 else self._pass_on(own)
            yield (self.rank - step) % self.degree, own
            if passage is not None:
                own = passage.arrived()

    def collect(self, own: Tensor, fill: Fill) -> Tensor:
        """See :class:`Line`; a part's sum follows it around, and comes home in the end."""
        passage, sums = None, own
        for other, part in self.visit(own):
            sums = torch.zeros_like(part, dtype=wide(part.dtype))
            fill(other, part, sums)
            if passage is not None:
                sums += passage.arrived()
            passage = self._pass_on(sums) if self.degree > 1 else None
        return sums if passage is None else passage.arrived()

    def _pass_on(self, leaving: Tensor) -> "_Passage":
        arriving = torch.empty_like(leaving)
        operations = [
            dist.P2POp(dist.isend, leaving, group=self.group, group_peer=self._next(1)),
            dist.P2POp(dist.irecv, arriving, group=self.group, group_peer=self._next(-1)),
        ]
        return _Passage(leaving, arriving, dist.batch_isend_irecv(operations))

    def _next(self, distance: int) -> int:
        return (self.rank + distance) % self.degree


@dataclass(frozen=True, slots=True)
class _Passage:
    """A tensor on its way to the next rank, and one coming from the one before."""

    leaving: Tensor  # kept until it has left
    arriving: Tensor
    work: list[dist.Work]

    def arrived(self) -> Tensor:
        for work in self.work:
            work.wait()
        return self.arriving


def line_of(group: str, rotates: bool) -> Line:
    """The ranks of the group of this name; this one alone if the name is empty."""
    if not group:
        return Ring(None, 0, 1)
    found = _resolve_process_group(group)  # pyright: ignore[reportArgumentType]  # a str at run time
    return (Ring if rotates else Gathered)(found, found.rank(), found.size())
