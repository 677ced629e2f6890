"""The one thing all ranks exchange every step beside gradients: a few integers, added up.

The number of valid tokens in the whole step is needed before the first backward pass anyway. What
else all ranks have to know at the same step rides along: orders that reached some of them, the sum
of sample hashes, the end of the data. So every rank saves, drains or ends after the same step, and
no signal or second collective is needed.
"""

from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from pretrain_api.wire import Order

HASH_MODULUS = 2**63  # sums wrap at 2**64, so reducing them afterwards loses nothing


@dataclass(frozen=True, slots=True)
class Count:
    """One rank's contribution, or the sum of all."""

    valid_tokens: int  # positions with a label
    sample_hash: int  # modulo HASH_MODULUS
    ended: int  # ranks whose data ends with this step
    save: int = 0  # ranks ordered to save
    drain: int = 0  # ranks ordered to save and leave
    stop: int = 0  # ranks ordered to leave

    @property
    def order(self) -> Order:
        """The gravest order that any rank was given."""
        if self.stop:
            return Order.STOP
        if self.drain:
            return Order.DRAIN
        return Order.SAVE if self.save else Order.NONE


def count(
    valid_tokens: int, sample_hash: int, ended: bool, order: Order, *, samples: bool = True
) -> Count:
    """One rank's contribution; without ``samples`` only its order, as others count the rest."""
    return Count(
        valid_tokens=valid_tokens if samples else 0,
        sample_hash=sample_hash if samples else 0,
        ended=int(ended and samples),
        save=int(order == Order.SAVE),
        drain=int(order == Order.DRAIN),
        stop=int(order == Order.STOP),
    )


def agree(own: Count, control: dist.ProcessGroup) -> Count:
    """Add up all ranks' contributions. Collective; one int64 all-reduce on the host.

    This is where ranks wait for the one whose data is late, for as long as the control group does.
    """
    total = torch.tensor(astuple(own), dtype=torch.int64)
    dist.all_reduce(total, group=control)
    fields = total.tolist()
    fields[1] %= HASH_MODULUS
    return Count(*fields)
