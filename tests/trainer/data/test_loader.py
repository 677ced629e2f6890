"""The same samples on every layout, exact resume at every step, and an orderly end."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain_api.config import RunConfig
from pretrain_api.mesh import MeshError
from pretrain_trainer.data.errors import DataError
from pretrain_trainer.data.loader import Loader, StepBatch, build_loader
from pretrain_trainer.data.tokenizer import Tokenizer

MakeConfig = Callable[..., RunConfig]
LONGEST = 500  # steps; an endless loop would be a bug of the loader


class World:
    """All data-parallel ranks of a run in one process, with what the trainer does between them."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, dp: int) -> None:
        self.ranks = [build_loader(config, tokenizer, dp_rank=r, dp_degree=dp) for r in range(dp)]

    def step(self) -> list[StepBatch]:
        return [rank.next_step() for rank in self.ranks]

    def cursors(self) -> Tensor:
        return torch.cat([rank.cursors() for rank in self.ranks])

    def load(self, cursors: Tensor, fingerprint: str) -> "World":
        for rank in self.ranks:
            rank.load_cursors(cursors, fingerprint)
        return self

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()

    @property
    def fingerprint(self) -> str:
        return self.ranks[0].fingerprint


def entry(batches: list[StepBatch]) -> int:
    """What the ledger notes of a step."""
    return sum(batch.sample_hash for batch in batches) % 2**63


def content(batches: list[StepBatch]) -> str:
    """Digest of all tensors of a step, in the order of slots."""
    digest = hashlib.sha256()
    for column in range(4):
        tensors = [m[column] for batch in batches for m in batch.microbatches]
        digest.update(torch.cat(tensors).numpy().tobytes())
    return digest.hexdigest()


def train(world: World, steps: int = LONGEST) -> tuple[list[tuple[int, str]], list[Tensor]]:
    """Ledger and content of each step up to the end, and the cursors before and after each."""
    record, cursors = [], [world.cursors()]
    for _ in range(steps):
        batches = world.step()
        record.append((entry(batches), content(batches)))
        cursors.append(world.cursors())
        if all(batch.ended for batch in batches):
            break
    world.close()
    return record, cursors


def consume(loader: Loader) -> None:
    for _ in range(LONGEST):
        if loader.next_step().ended:
            break


@pytest.fixture
def short(make_config: MakeConfig, write_jsonl: Callable[[Iterable[str]], Path]) -> RunConfig:
    """Two epochs of 21 documents of very different lengths, in 4 streams."""
    texts = [("Some words of a document. " * (1 + n * n % 17))[: 20 + 13 * n] for n in range(21)]
    return make_config(
        dataset_path=str(write_jsonl(texts)), epochs=2, seq_len=24, global_batch_size=4
    )


@pytest.mark.parametrize("streams", [None, 8, 16])
def test_every_layout_sees_the_same_samples(
    make_config: MakeConfig, tokenizer: Tokenizer, streams: int | None
) -> None:
    records = []
    for dp, local in [(1, 1), (1, 16), (2, 4), (4, 1), (4, 4), (8, 2), (8, 1)]:
        config = make_config(local_batch_size=local, global_batch_size=16, data_streams=streams)
        world = World(config, tokenizer, dp)
        record, _ = train(world, steps=12)
        records.append(record)
    assert len(records[0]) == 12
    assert all(record == records[0] for record in records)


def test_shapes_follow_the_batch_arithmetic(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    config = make_config(local_batch_size=2, global_batch_size=16)
    loader = build_loader(config, tokenizer, dp_rank=1, dp_degree=2)
    batch = loader.next_step()
    loader.close()
    assert len(batch.microbatches) == 4
    for microbatch in batch.microbatches:
        assert all(column.shape == (2, 48) for column in microbatch)
        assert [column.dtype for column in microbatch] == [
            torch.int64,
            torch.int64,
            torch.int32,
            torch.int32,
        ]
    assert loader.streams == 16
    assert loader.cursors().shape == (8, 2)
    assert loader.cursors().dtype == torch.int64


def test_resume_at_every_step_gives_the_rest_exactly(
    short: RunConfig, tokenizer: Tokenizer
) -> None:
    """Covers resuming inside a document, at the end of an epoch, and after the last step."""
    whole = World(short, tokenizer, 1)
    record, cursors = train(whole)
    assert any(row[1] for table in cursors for row in table.tolist()), "never inside a document"
    for step, saved in enumerate(cursors[:-1]):
        resumed, _ = train(World(short, tokenizer, 1).load(saved, whole.fingerprint))
        assert resumed == record[step:]
    finished = World(short, tokenizer, 1).load(cursors[-1], whole.fingerprint)
    batches = finished.step()
    finished.close()
    assert all(batch.ended and batch.sample_hash == 0 for batch in batches)
    assert all((m.labels == -100).all() for batch in batches for m in batch.microbatches)


def test_changing_ranks_at_every_stop_changes_no_sample(
    short: RunConfig, tokenizer: Tokenizer
) -> None:
    record, _ = train(World(short, tokenizer, 2))
    pieces = []
    world = World(short, tokenizer, 4)
    saved, fingerprint = world.cursors(), world.fingerprint
    world.close()
    for turn in range(LONGEST):
        world = World(short, tokenizer, [4, 1, 2][turn % 3]).load(saved, fingerprint)
        part, cursors = train(world, steps=3)
        pieces += part
        saved = cursors[-1]
        if len(pieces) >= len(record):
            break
    assert pieces == record


def test_loading_again_into_a_running_loader_goes_back(
    short: RunConfig, tokenizer: Tokenizer
) -> None:
    world = World(short, tokenizer, 1)
    start = world.cursors()
    first = [content(world.step()) for _ in range(3)]
    middle = world.cursors()
    later = [content(world.step()) for _ in range(3)]
    world.load(middle, world.fingerprint)
    assert [content(world.step()) for _ in range(3)] == later
    world.load(start, world.fingerprint)
    assert [content(world.step()) for _ in range(3)] == first
    world.close()


def test_finite_data_is_seen_exactly_as_often_as_asked(
    short: RunConfig, tokenizer: Tokenizer
) -> None:
    texts = [
        json.loads(line)["text"]
        for line in Path(str(short.training.dataset_path)).read_text().splitlines()
    ]
    world = World(short, tokenizer, 2)
    tokens = 0
    for _ in range(LONGEST):
        batches = world.step()
        for batch in batches:
            for microbatch in batch.microbatches:
                real = (microbatch.labels != -100).any(dim=1)
                # A full window holds one token more than it has labels; so does one cut short.
                tokens += int((microbatch.labels != -100).sum() + real.sum())
        if all(batch.ended for batch in batches):
            break
    world.close()
    lengths = sum(len(tokenizer.encode(text, add_bos=True, add_eos=True)) for text in texts)
    # A stream's last token is invisible if it is alone in its window.
    assert 2 * lengths - world.ranks[0].streams <= tokens <= 2 * lengths
    assert world.cursors()[:, 0].sum() == 2 * len(texts)


def test_streams_that_end_early_wait_with_padding(
    make_config: MakeConfig,
    tokenizer: Tokenizer,
    write_jsonl: Callable[[Iterable[str]], Path],
) -> None:
    path = write_jsonl(["a b c d e f g " * 30])
    config = make_config(dataset_path=str(path), epochs=1, seq_len=16, global_batch_size=2)
    world = World(config, tokenizer, 2)
    ends = []
    for _ in range(LONGEST):
        batches = world.step()
        ends.append(sorted(batch.ended for batch in batches))
        padded = [(b.microbatches[0].labels == -100).all().item() for b in batches]
        assert sum(padded) == 1
        if all(batch.ended for batch in batches):
            break
    world.close()
    assert ends[0] == [False, True]
    assert ends[-1] == [True, True]


def test_fewer_documents_than_streams_still_feeds_every_stream(
    make_config: MakeConfig,
    tokenizer: Tokenizer,
    write_jsonl: Callable[[Iterable[str]], Path],
) -> None:
    config = make_config(dataset_path=str(write_jsonl(["one", "two", "three"])), seq_len=8)
    loader = build_loader(config, tokenizer, dp_rank=0, dp_degree=1)
    batch = loader.next_step()
    loader.close()
    assert all((m.labels != -100).all() for m in batch.microbatches)
    assert not batch.ended


def test_the_seed_decides_the_order(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    records = [train(World(make_config(seed=s), tokenizer, 1), steps=3)[0] for s in (None, 0, 1)]
    assert records[0] == records[1] != records[2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seq_len": 47}, "seq_len was 48 and is 47"),
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"data_streams": 4}, "streams was 8 and is 4"),
    ],
)
def test_cursors_of_another_run_are_refused_with_what_changed(
    make_config: MakeConfig, tokenizer: Tokenizer, change: dict[str, int], named: str
) -> None:
    before = World(make_config(), tokenizer, 1)
    after = World(make_config(**change), tokenizer, 1)
    with pytest.raises(DataError, match=named) as caught:
        after.load(before.cursors(), before.fingerprint)
    assert str(caught.value).count(" and is ") == 1
    before.close()
    after.close()


def test_changed_data_is_noticed_on_resume(
    make_config: MakeConfig,
    tokenizer: Tokenizer,
    write_jsonl: Callable[[Iterable[str]], Path],
) -> None:
    path = write_jsonl(["one", "two"])
    before = World(make_config(dataset_path=str(path)), tokenizer, 1)
    write_jsonl(["one", "six"])
    after = World(make_config(dataset_path=str(path)), tokenizer, 1)
    with pytest.raises(DataError, match=r"other samples: data was \w+ and is \w+; put it back"):
        after.load(before.cursors(), before.fingerprint)
    before.close()
    after.close()


def test_data_moved_elsewhere_is_the_same_data(
    make_config: MakeConfig, tokenizer: Tokenizer, assets: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere" / "corpus.jsonl"
    copy.parent.mkdir()
    copy.write_bytes((assets / "text" / "corpus.jsonl").read_bytes())
    here = World(make_config(), tokenizer, 1)
    there = World(make_config(dataset_path=str(copy.parent)), tokenizer, 1)
    there.load(here.cursors(), here.fingerprint)
    here.close()
    there.close()


def test_cursors_of_a_wrong_shape_are_refused(
    make_config: MakeConfig, tokenizer: Tokenizer
) -> None:
    loader = build_loader(make_config(), tokenizer, dp_rank=0, dp_degree=1)
    with pytest.raises(DataError, match=r"shape \(7, 2\) for 8 streams"):
        loader.load_cursors(torch.zeros(7, 2, dtype=torch.int64), loader.fingerprint)


def test_a_broken_line_stops_training_when_its_turn_comes(
    make_config: MakeConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n' * 40 + '{"text": "torn\n')
    config = make_config(dataset_path=str(path), epochs=1, global_batch_size=1, seq_len=4)
    loader = build_loader(config, tokenizer, dp_rank=0, dp_degree=1)
    for _ in range(2):  # the second call must not hang or go on
        with pytest.raises(DataError, match=r"broken\.jsonl:41: not valid JSON"):
            consume(loader)
    loader.close()


def test_state_counts_steps_handed_out_not_steps_prepared(
    make_config: MakeConfig, tokenizer: Tokenizer
) -> None:
    """The thread is far ahead, if it can, before the second of two equal loaders looks."""
    eager, lazy = (build_loader(make_config(), tokenizer, dp_rank=0, dp_degree=1) for _ in "ab")
    eager.next_step()
    lazy.next_step()
    state = lazy.cursors()
    for _ in range(5):
        eager.next_step()
    assert torch.equal(lazy.cursors(), state)
    assert not torch.equal(eager.cursors(), state)
    eager.close()
    lazy.close()


def test_closing_ends_the_thread(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    before = threading.active_count()
    loader = build_loader(make_config(), tokenizer, dp_rank=0, dp_degree=1)
    loader.next_step()
    loader.close()
    assert threading.active_count() == before


def test_an_uneven_batch_is_refused(make_config: MakeConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(MeshError, match=r"training\.global_batch_size"):
        build_loader(make_config(), tokenizer, dp_rank=0, dp_degree=3)


def test_ranks_that_see_other_samples_say_what_differs(
    make_config: MakeConfig, write_jsonl: Callable[[Iterable[str]], Path], tokenizer: Tokenizer
) -> None:
    config = make_config(dataset_path=str(write_jsonl(["one", "two"])))
    first = build_loader(config, tokenizer, dp_rank=0, dp_degree=2)
    write_jsonl(["one", "two", "three"])
    second = build_loader(config, tokenizer, dp_rank=1, dp_degree=2)
    first.compare(first.fingerprint)
    with pytest.raises(DataError, match=r"samples than rank 0: data is \w+ there and \w+ here;"):
        second.compare(first.fingerprint)
