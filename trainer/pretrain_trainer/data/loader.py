"""Batches for one rank, and the state to go on from.

The global batch of a step is a row of slots; each of the run's streams fills an equal share of them
and each rank owns an equal, contiguous share of the streams. Which samples a step has, therefore,
doesn't depend on the number of ranks: a rank's part is only where the row is cut.

State is one cursor per stream. It belongs to the steps that were handed out, never to what the
thread behind has prepared. Ranks exchange nothing here: the trainer gathers the cursors of all
ranks into one tensor when it saves, and gives it to every rank when it resumes, on any layout.
"""

import threading
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain_api.config import RunConfig
from pretrain_api.mesh import BatchPlan, split_batch
from pretrain_trainer.alive import Alive, unwatched
from pretrain_trainer.data.errors import DataError
from pretrain_trainer.data.packing import Cursor, Packer, Window, sample, sample_hash
from pretrain_trainer.data.prefetch import Prefetcher
from pretrain_trainer.data.sources import Source, open_source
from pretrain_trainer.data.tokenizer import Tokenizer

RULES = 1  # of order and packing; a new number makes older cursors unusable
AHEAD = 2  # steps prepared while one is trained on


class Microbatch(NamedTuple):
    """Sequences of one forward pass; B = local batch size, T = sequence length."""

    tokens: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T], -100 where there is nothing to predict
    positions: Tensor  # int32 [B, T], 0 at the first token of each document
    document_ids: Tensor  # int32 [B, T], counted from 0 in each sequence


class StepBatch(NamedTuple):
    """This rank's part of one optimizer step.

    ``sample_hash`` is the sum of its samples' hashes modulo 2**63; the sum over all ranks, modulo
    2**63 again, is the same on every layout. ``ended`` says that this rank has nothing left after
    this step: when all ranks say so, it is the last one. A rank that ends before others goes on
    with batches that are all padding.
    """

    microbatches: list[Microbatch]
    sample_hash: int
    ended: bool


def build_loader(
    cfg: RunConfig,
    tokenizer: Tokenizer,
    *,
    dp_rank: int,
    dp_degree: int,
    alive: Alive = unwatched,
) -> "Loader":
    """The loader of data-parallel rank ``dp_rank``; ``alive`` is called while data is indexed.

    Raises MeshError if batch sizes don't come out even, DataError if the data set can't be used,
    DataUnavailableError if it can't be reached.
    """
    plan = split_batch(cfg.training, dp_degree)
    source = open_source(cfg.training, plan.streams, alive)
    return Loader(source, tokenizer, plan, cfg.training.seq_len, dp_rank)


class Loader:
    """Hands out the steps of one rank.

    ``streams`` is their number in the whole run. ``fingerprint`` names everything the meaning of a
    cursor depends on; it is saved beside the cursors.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, plan: BatchPlan, seq_len: int, dp_rank: int
    ) -> None:
        share = plan.streams // plan.dp_degree
        self.streams = plan.streams
        self.fingerprint = _fingerprint(
            source.identity
            | {
                "tokenizer": tokenizer.digest,
                "seq_len": str(seq_len),
                "streams": str(plan.streams),
                "rules": str(RULES),
            }
        )
        self._own = range(dp_rank * share, (dp_rank + 1) * share)
        self._source = source
        self._tokenizer = tokenizer
        self._plan = plan
        self._seq_len = seq_len
        self._cursors = {stream: Cursor() for stream in self._own}
        self._prefetcher: Prefetcher[_Prepared] | None = None

    def next_step(self, alive: Alive = unwatched) -> StepBatch:
        """All microbatches of this rank for one optimizer step.

        While they are being prepared, which includes reading over what was used before a restart,
        ``alive`` is called as the preparing gets on.

        Raises DataError or DataUnavailableError, on every further call as well.
        """
        if self._prefetcher is None:
            moved = threading.Event()
            self._prefetcher = Prefetcher(self._producer(moved.set).prepare, AHEAD, moved)
        prepared = self._prefetcher.get(alive)
        self._cursors = prepared.cursors
        return prepared.batch

    def cursors(self) -> Tensor:
        """State after the last step handed out: int64 [own streams, 2], in order of streams.

        The columns are the fields of :class:`pretrain_trainer.data.packing.Cursor`.
        """
        return torch.tensor([self._cursors[stream] for stream in self._own], dtype=torch.int64)

    def compare(self, first: str) -> None:
        """Make sure that this rank sees the samples that rank 0 sees, whose fingerprint is given.

        Raises DataError if it doesn't: samples would be missed or repeated, and ranks that compute
        one together would each take another.
        """
        if changed := _differences(first, self.fingerprint, "{} is {} there and {} here"):
            raise DataError(
                f"this worker sees other samples than rank 0: {changed}; give all workers the same "
                "files, as on a shared volume"
            )

    def load_cursors(self, all_cursors: Tensor, fingerprint: str) -> None:
        """Go on from the cursors of all streams: int64 [streams, 2].

        Raises DataError if they were saved with other data or another way to cut it.
        """
        if changed := _differences(fingerprint, self.fingerprint, "{} was {} and is {}"):
            raise DataError(
                f"the checkpoint was made with other samples: {changed}; "
                "put it back, or start a new run and load only the model from the checkpoint"
            )
        if tuple(all_cursors.shape) != (self.streams, 2):
            raise DataError(
                f"the checkpoint holds cursors of shape {tuple(all_cursors.shape)} for "
                f"{self.streams} streams; it is damaged, resume from another one"
            )
        self._stop()
        rows = all_cursors.tolist()
        self._cursors = {stream: Cursor(*rows[stream]) for stream in self._own}

    def close(self) -> None:
        """End the thread and let go of files; the loader isn't used afterwards."""
        self._stop()
        self._source.close()

    def _stop(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _producer(self, moved: Alive) -> "_Producer":
        first = {stream: cursor.ordinal for stream, cursor in self._cursors.items()}
        documents = self._source.open(first, moved)
        packers = {
            stream: Packer(documents[stream], self._tokenizer, self._seq_len, cursor, moved)
            for stream, cursor in self._cursors.items()
        }
        return _Producer(packers, self._plan)


class _Prepared(NamedTuple):
    batch: StepBatch
    cursors: dict[int, Cursor]


class _Producer:
    """Makes step after step from the packers of a rank's streams."""

    def __init__(self, packers: dict[int, Packer], plan: BatchPlan) -> None:
        self._packers = packers
        self._plan = plan

    def prepare(self) -> _Prepared:
        per_stream = self._plan.global_batch_size // self._plan.streams
        windows = [
            packer.next_window() for packer in self._packers.values() for _ in range(per_stream)
        ]
        batch = StepBatch(
            microbatches=_microbatches(windows, self._plan.local_batch_size),
            sample_hash=sum(map(sample_hash, windows)) % 2**63,
            ended=all([packer.ended() for packer in self._packers.values()]),
        )
        return _Prepared(batch, {s: packer.cursor for s, packer in self._packers.items()})


def _microbatches(windows: list[Window], size: int) -> list[Microbatch]:
    """Consecutive groups of ``size`` windows, each column stacked into a tensor."""
    samples = [sample(window) for window in windows]
    groups = [samples[at : at + size] for at in range(0, len(samples), size)]
    return [
        Microbatch(*(torch.from_numpy(np.stack(column)) for column in zip(*group, strict=True)))
        for group in groups
    ]


def _fingerprint(parts: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(parts.items()))


def _differences(one: str, other: str, words: str) -> str:
    """What two fingerprints don't have in common, in ``words`` about key and both values."""
    a, b = (dict(part.split("=", 1) for part in text.split()) for text in (one, other))
    changed = [key for key in sorted(a | b) if a.get(key) != b.get(key)]
    said = (words.format(key, a.get(key, "absent"), b.get(key, "absent")) for key in changed)
    return "; ".join(said)
