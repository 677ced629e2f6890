"""What training remembers beside weights and moments, and the tensors all of it becomes on disk.

A checkpoint holds only tensors, because anything else would be a pickle. Loading fills tensors in
place, so there is one function that lays out the whole state, for saving and for loading alike, and
one that takes the filled tensors back. What is not loaded keeps its fresh value by itself.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain_trainer.data.loader import Loader
from pretrain_trainer.optim import optimizer_state
from pretrain_trainer.parallel.mesh import Mesh, gather_rows
from pretrain_trainer.precision.float8 import plain

LEDGER_BYTES = 32  # of a SHA-256
FINGERPRINT_BYTES = 4096  # fixed, because a checkpoint's shapes must be known before it is read


@dataclass(slots=True)
class TrainState:
    """How far training is.

    ``ledger`` is a chain: after each step, the SHA-256 of its former value and of the step's sample
    hash. Two runs with equal ledgers trained on the same samples at every step, on whatever layout.
    ``schedule_step`` is what the learning rate depends on; it differs from ``step`` only where a
    run started from another's state without its schedule.
    """

    step: int = 0  # finished steps
    tokens: int = 0  # trained on, over all ranks
    first_loss: float = math.nan  # of step 1
    skipped_in_a_row: int = 0  # steps without finite gradients, until now
    schedule_step: int = 0
    ledger: bytes = bytes(LEDGER_BYTES)

    def advance(self, tokens: int, sample_hash: int, finite: bool) -> None:
        """Note one more finished step."""
        self.step += 1
        self.schedule_step += 1
        self.tokens += tokens
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.ledger = hashlib.sha256(self.ledger + sample_hash.to_bytes(8, "little")).digest()


def state_tensors(
    state: TrainState,
    parts: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    control: dist.ProcessGroup,
    mesh: Mesh,
) -> dict[str, Any]:
    """Everything a checkpoint holds. Collective, in the control group.

    The weights and moments are the live ones, everything else are copies. Of those, a rank has only
    what is in its own parts of the model.
    """
    return {
        "model": {k: v for part in parts for k, v in plain(part.state_dict()).items()},
        "optimizer": optimizer_state(parts, optimizer),
        "lr_scheduler": {"step": torch.tensor(state.schedule_step)},
        "data_loader": {
            "cursors": gather_rows(loader.cursors(), control, mesh),
            "fingerprint": _from_text(loader.fingerprint),
        },
        "train_state": {
            "step": torch.tensor(state.step),
            "tokens": torch.tensor(state.tokens),
            "first_loss": torch.tensor(state.first_loss, dtype=torch.float64),
            "skipped_in_a_row": torch.tensor(state.skipped_in_a_row),
        },
        "ledger": {"digest": torch.tensor(list(state.ledger), dtype=torch.uint8)},
    }


def restore(tensors: dict[str, Any], state: TrainState, loader: Loader) -> None:
    """Take back what :func:`state_tensors` laid out and a checkpoint filled.

    Weights and moments were filled where they are.

    Raises:
        DataError: the checkpoint was made with other data.
    """
    progress, data = tensors["train_state"], tensors["data_loader"]
    loader.load_cursors(data["cursors"], _to_text(data["fingerprint"]))
    state.step = int(progress["step"])
    state.tokens = int(progress["tokens"])
    state.first_loss = float(progress["first_loss"])
    state.skipped_in_a_row = int(progress["skipped_in_a_row"])
    state.schedule_step = int(tensors["lr_scheduler"]["step"])
    state.ledger = bytes(tensors["ledger"]["digest"].tolist())


def _from_text(text: str) -> Tensor:
    """uint8 [FINGERPRINT_BYTES], filled up with zeros. Raises ValueError for a longer text."""
    data = text.encode()
    if len(data) > FINGERPRINT_BYTES:
        raise ValueError(f"a fingerprint of {len(data)} bytes doesn't fit {FINGERPRINT_BYTES}")
    return torch.tensor(list(data.ljust(FINGERPRINT_BYTES, b"\0")), dtype=torch.uint8)


def _to_text(data: Tensor) -> str:
    return bytes(data.tolist()).rstrip(b"\0").decode()
