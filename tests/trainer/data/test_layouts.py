"""Property: whatever the documents, streams and stops, no layout changes what a step contains."""

from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_api.mesh import BatchPlan
from pretrain_trainer.alive import Alive, unwatched
from pretrain_trainer.data.loader import Loader
from pretrain_trainer.data.order import Order
from pretrain_trainer.data.packing import Tokens
from pretrain_trainer.data.sources import Document
from pretrain_trainer.data.tokenizer import Tokenizer


class Memory:
    """A source whose document n is a text of ``lengths[n]`` letters."""

    identity: Mapping[str, str] = {"data": "memory"}

    def __init__(self, lengths: list[int], order: Order) -> None:
        self.lengths = lengths
        self.order = order

    def open(
        self, first: Mapping[int, int], moved: Alive = unwatched
    ) -> dict[int, Iterator[Document]]:
        return {stream: self.documents(stream, ordinal) for stream, ordinal in first.items()}

    def documents(self, stream: int, ordinal: int) -> Iterator[Document]:
        while places := self.order.places(stream, ordinal, 1):
            epoch, document = places[0]
            identity = epoch * len(self.lengths) + document
            yield Document(ordinal, identity, f"{document} " * self.lengths[document])
            ordinal += 1

    def close(self) -> None:
        """Nothing to let go of."""


class Words:
    """One token per word, counted from 1; 0 ends a document."""

    eos_id = 0
    digest = "words"

    def encode_batch(self, texts: list[str]) -> list[Tokens]:
        return [np.array([*(int(word) + 1 for word in text.split()), 0]) for text in texts]


class Case:
    """A drawn data set with a number of streams; builds the ranks of any layout of it."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=12))
        self.seq_len = draw(st.integers(1, 20))
        self.streams = draw(st.sampled_from([2, 4, 8]))
        self.batch = self.streams * draw(st.sampled_from([1, 2]))
        epochs = draw(st.integers(1, 3))
        self.order = Order(len(self.lengths), self.streams, draw(st.integers(0, 99)), epochs)

    def degrees(self) -> list[int]:
        return [dp for dp in (1, 2, 4, 8) if dp <= self.streams]

    def ranks(self, dp: int, local: int) -> list[Loader]:
        plan = BatchPlan(self.batch, local, self.batch // dp // local, dp, self.streams)
        source, words = Memory(self.lengths, self.order), cast(Tokenizer, Words())
        return [Loader(source, words, plan, self.seq_len, rank) for rank in range(dp)]

    def steps(self, ranks: list[Loader], most: int) -> tuple[list[object], bool]:
        """The ledger's entry and all tokens of up to ``most`` steps, and whether data ended."""
        record: list[object] = []
        ended = False
        while len(record) < most and not ended:
            batches = [rank.next_step() for rank in ranks]
            tokens = torch.cat([m.tokens for batch in batches for m in batch.microbatches])
            labels = torch.cat([m.labels for batch in batches for m in batch.microbatches])
            ledger = sum(batch.sample_hash for batch in batches) % 2**63
            record.append((ledger, tokens.tolist(), labels.tolist()))
            ended = all(batch.ended for batch in batches)
        return record, ended


cases = st.composite(Case)()


@settings(max_examples=30)
@given(case=cases)
def test_every_degree_makes_the_same_steps(case: Case) -> None:
    records = []
    for dp in case.degrees():
        for local in {1, case.batch // dp}:
            ranks = case.ranks(dp, local)
            records.append(case.steps(ranks, most=10_000))
            for rank in ranks:
                rank.close()
    assert all(record == records[0] for record in records)


@settings(max_examples=30)
@given(case=cases, data=st.data())
def test_stops_and_other_degrees_change_no_step(case: Case, data: st.DataObject) -> None:
    ranks = case.ranks(1, 1)
    cursors = ranks[0].cursors()
    whole, _ = case.steps(ranks, most=10_000)
    ranks[0].close()
    record: list[object] = []
    ended = False
    while not ended:
        dp = data.draw(st.sampled_from(case.degrees()))
        ranks = case.ranks(dp, 1)
        for rank in ranks:
            rank.load_cursors(cursors, ranks[0].fingerprint)
        part, ended = case.steps(ranks, most=data.draw(st.integers(1, 9)))
        record += part
        cursors = torch.cat([rank.cursors() for rank in ranks])
        for rank in ranks:
            rank.close()
    assert record == whole


@settings(max_examples=30)
@given(case=cases)
def test_every_token_of_every_epoch_is_used_once(case: Case) -> None:
    ranks = case.ranks(1, 1)
    used = [0] * (len(case.lengths) + 1)
    ended = False
    while not ended:
        batch = ranks[0].next_step()
        ended = batch.ended
        for microbatch in batch.microbatches:
            first, labels = microbatch.tokens[0, :1], microbatch.labels[0]
            for token in [*first.tolist(), *labels[labels != -100].tolist()]:
                used[token] += 1
    ranks[0].close()
    epochs = case.order.epochs or 0
    assert used[1:] == [epochs * length for length in case.lengths]
