"""Streamed data sets: read from local files with the real library, offline."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pretrain_api.config import Training
from pretrain_trainer.data import hub
from pretrain_trainer.data.errors import DataError, DataUnavailableError
from pretrain_trainer.data.hub import HubSource
from pretrain_trainer.data.sources import Document, open_source

SHARDS, DOCUMENTS = 4, 5


@pytest.fixture
def copy(tmp_path: Path) -> str:
    """A data set as the hub has them: four compressed shards of five documents."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for shard in range(SHARDS):
        with gzip.open(folder / f"c4-train.{shard:05}.json.gz", "wt") as stream:
            for number in range(DOCUMENTS):
                stream.write(json.dumps({"text": f"{shard}.{number}", "url": "-"}) + "\n")
    return str(folder)


def read(source: HubSource, first: dict[int, int]) -> dict[int, list[Document]]:
    return {stream: list(documents) for stream, documents in source.open(first).items()}


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 6, 8])
def test_streams_share_out_every_epoch(copy: str, streams: int) -> None:
    found = read(HubSource.load(copy, streams, epochs=2), dict.fromkeys(range(streams), 0))
    texts = sorted(document.text for documents in found.values() for document in documents)
    assert texts == sorted(2 * [f"{s}.{n}" for s in range(SHARDS) for n in range(DOCUMENTS)])
    identities = [document.identity for documents in found.values() for document in documents]
    assert len(set(identities)) == len(identities)
    for documents in found.values():
        assert [document.ordinal for document in documents] == list(range(len(documents)))


@pytest.mark.parametrize("streams", [2, 3, 8])
def test_a_rank_with_some_streams_sees_what_all_would_see(copy: str, streams: int) -> None:
    source = HubSource.load(copy, streams, epochs=1)
    whole = read(source, dict.fromkeys(range(streams), 0))
    for stream in range(streams):
        assert read(source, {stream: 0}) == {stream: whole[stream]}


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_streams_go_on_from_any_document(copy: str, streams: int) -> None:
    source = HubSource.load(copy, streams, epochs=2)
    whole = read(source, dict.fromkeys(range(streams), 0))
    first = {stream: 3 * stream % 7 for stream in range(streams)}
    assert read(source, first) == {s: whole[s][ordinal:] for s, ordinal in first.items()}


def test_a_lane_reads_only_its_own_shards(copy: str) -> None:
    found = read(HubSource.load(copy, SHARDS, epochs=1), {2: 0})
    assert [document.text for document in found[2]] == [f"2.{n}" for n in range(DOCUMENTS)]


def test_without_epochs_data_repeats(copy: str) -> None:
    documents = HubSource.load(copy, SHARDS, None).open({0: 0})[0]
    assert [next(documents).text for _ in range(12)] == [f"0.{n % 5}" for n in range(12)]


def test_the_configuration_leads_here(copy: str) -> None:
    source = open_source(Training(dataset="c4", dataset_path=copy, epochs=1), 1)
    assert source.identity == {"data": copy, "shards": str(SHARDS)}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (None, r"training\.dataset_path: \S+: .*; name a data set that exists"),
        ("", r": no document in its split train; add some"),
        ('{"content": "x"}\n', r': a document has content, but no "text"; use another data set'),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused(
    tmp_path: Path, line: str | None, sentence: str
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    if line is not None:
        (folder / "data.jsonl").write_text(line)
    with pytest.raises(DataError, match=sentence) as caught:
        HubSource.load(str(folder), 1, None)
    assert "\n" not in str(caught.value)


def test_a_hub_forbidden_by_the_environment_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "get_dataset_config_names", unreachable)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE forbids to fetch it; name a local copy in"):
        HubSource.load(None, 1, None)


def unreachable(name: str) -> Iterator[str]:
    raise ConnectionError(f"Couldn't reach '{name}'\n on the Hub")


def test_a_hub_out_of_reach_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "get_dataset_config_names", unreachable)
    with pytest.raises(
        DataUnavailableError,
        match=r"^allenai/c4: can't be reached now \(Couldn't reach 'allenai/c4' on the Hub\); "
        r"if that lasts, name a local copy in training\.dataset_path$",
    ):
        HubSource.load(None, 1, None)


def answer(status: int) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("said no", response=response)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reason", "passes"),
    [
        (answer(429), True),
        (answer(500), True),
        (answer(503), True),
        (LocalEntryNotFoundError("neither there nor here"), True),
        (TimeoutError(), True),
        (answer(404), False),
        (answer(401), False),
        (KeyError("en"), False),
    ],
)
def test_a_busy_hub_is_not_taken_for_a_missing_data_set(
    monkeypatch: pytest.MonkeyPatch, reason: Exception, passes: bool
) -> None:
    """The library says that there is no such file, whatever the hub said."""

    def look(name: str) -> list[str]:
        try:
            raise reason
        except Exception:
            raise FileNotFoundError(f"Couldn't find any data file at {name}") from None

    monkeypatch.setattr(hub.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "get_dataset_config_names", look)
    with pytest.raises(DataUnavailableError if passes else DataError, match="Couldn't find any"):
        HubSource.load(None, 1, None)


class Breaking:
    """A stream that loses its connection after one document."""

    num_shards = 1

    def shard(self, num_shards: int, index: int) -> Iterator[dict[str, str]]:
        yield {"text": f"{num_shards} {index}"}
        raise OSError("connection reset")


def test_a_connection_lost_on_the_way_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.hub, "HF_HUB_OFFLINE", False)
    documents = HubSource("some/data", Breaking(), 1, None).open({0: 0})[0]
    assert next(documents).text == "1 0"
    with pytest.raises(DataUnavailableError, match=r"some/data: .* \(connection reset\)"):
        next(documents)


class Empty(Breaking):
    def shard(self, num_shards: int, index: int) -> Iterator[dict[str, str]]:
        return iter(())


def test_a_lane_without_documents_is_no_endless_loop() -> None:
    documents = HubSource("some/data", Empty(), 1, None).open({0: 0})[0]
    with pytest.raises(DataError, match="some/data: no document in shard 0"):
        next(documents)


def test_documents_read_over_are_signs_of_life(copy: str) -> None:
    source = HubSource.load(copy, 1, epochs=1)
    used = SHARDS * DOCUMENTS - 2
    signs: list[str] = []
    documents = source.open({0: used}, lambda: signs.append("alive"))[0]
    next(documents)
    assert len(signs) == used + 1
