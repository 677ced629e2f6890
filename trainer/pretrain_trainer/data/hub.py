"""Documents streamed from the Hugging Face hub.

What arrives as a stream can't be shuffled like files: documents come in the order they are
published in (C4 is shuffled already). They are dealt out to streams all the same. A data set is
published in shards; as many lanes as shards and streams have in common (their greatest common
divisor) read the shards side by side, and the documents of a lane go to its streams in turn. C4 has
1,024 shards, so with a power of two of streams each stream reads shards of its own and a rank
fetches only what it trains on; in the worst case there is one lane, and each rank reads everything
and keeps its part.

Resuming reads over what was used before: correct, but slower the further a run has come. For long
runs a local copy in JSON lines starts faster and is shuffled.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from math import gcd
from typing import Any, NamedTuple, Protocol

import datasets
from datasets import config as hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pretrain_trainer.alive import Alive, unwatched
from pretrain_trainer.data.errors import DataError, DataUnavailableError
from pretrain_trainer.data.sources import Document

C4 = "allenai/c4"
CONFIG = "en"
SPLIT = "train"
TOO_MANY, SERVER_ERROR = 429, 500  # statuses of HTTP

Record = Mapping[str, Any]


class Streamed(Protocol):
    """The part of ``datasets.IterableDataset`` used here."""

    @property
    def num_shards(self) -> int:
        """Files, or parts of files, that can be read side by side."""
        ...

    def shard(self, num_shards: int, index: int) -> Iterable[Record]:
        """Part ``index`` of the data set cut into ``num_shards`` parts."""
        ...


class HubSource:
    """A streamed data set, in published order, over and over or for some epochs."""

    def __init__(self, name: str, dataset: Streamed, streams: int, epochs: int | None) -> None:
        self._name = name
        self._dataset = dataset
        self._streams = streams
        self._epochs = epochs
        self._lanes = gcd(dataset.num_shards, streams)

    @classmethod
    def load(cls, path: str | None, streams: int, epochs: int | None) -> "HubSource":
        """C4's English part, or another copy of it: a folder, or a name on the hub.

        Raises DataError if there is no such data set or it has no text, DataUnavailableError if
        the hub can't be reached.
        """
        name = path or C4
        try:
            configs = datasets.get_dataset_config_names(name)
            config = CONFIG if CONFIG in configs else None
            dataset = datasets.load_dataset(name, name=config, split=SPLIT, streaming=True)
            _text(name, next(iter(dataset)))
        except StopIteration:
            raise DataError(f"{name}: no document in its split {SPLIT}; add some") from None
        except DataError:
            raise
        except Exception as error:
            raise _explain(name, error) from error
        return cls(name, dataset, streams, epochs)

    @property
    def identity(self) -> dict[str, str]:
        """Name and number of shards: the content of a stream can't be compared beforehand."""
        return {"data": self._name.replace(" ", "_"), "shards": str(self._dataset.num_shards)}

    def open(
        self, first: Mapping[int, int], moved: Alive = unwatched
    ) -> dict[int, Iterator[Document]]:
        """See :class:`pretrain_trainer.data.sources.Source`; reads over what was used before."""
        share = self._streams // self._lanes
        opened: dict[int, Iterator[Document]] = {}
        for number in sorted({stream % self._lanes for stream in first}):
            seats = {s // self._lanes: s for s in first if s % self._lanes == number}
            wanted = {seat: first[stream] for seat, stream in seats.items()}
            lane = _Lane(self._arrivals(number), share, wanted, moved)
            opened |= {stream: lane.documents(seat) for seat, stream in seats.items()}
        return opened

    def close(self) -> None:
        """Nothing is held open between documents."""

    def _arrivals(self, lane: int) -> "Iterator[Arrival]":
        """The documents of a lane's shards, epoch after epoch."""
        for number, text in enumerate(self._texts(lane)):
            yield Arrival(number, number * self._lanes + lane, text)

    def _texts(self, lane: int) -> Iterator[str]:
        for epoch in count():
            if epoch == self._epochs:
                return
            found = False
            try:
                for record in self._dataset.shard(self._lanes, lane):
                    found = True
                    yield _text(self._name, record)
            except DataError:
                raise
            except Exception as error:
                raise _explain(self._name, error) from error
            if not found:
                raise DataError(f"{self._name}: no document in shard {lane}; use another data set")


class Arrival(NamedTuple):
    """The ``number``-th document of a lane."""

    number: int
    identity: int
    text: str


class _Lane:
    """Deals the documents of some shards out to the streams that share them.

    A stream that uses longer documents asks less often; what passes by is kept for it, which is
    little, since streams use up tokens at the same rate.
    """

    def __init__(
        self, arrivals: Iterator[Arrival], share: int, first: dict[int, int], moved: Alive
    ) -> None:
        """``first`` is the ordinal each wanted one of the ``share`` seats starts with."""
        self._arrivals = arrivals
        self._share = share
        self._first = first
        self._moved = moved
        self._kept: dict[int, deque[Document]] = {seat: deque() for seat in first}

    def documents(self, seat: int) -> Iterator[Document]:
        kept = self._kept[seat]
        while True:
            while not kept:
                if (arrival := next(self._arrivals, None)) is None:
                    return
                self._keep(arrival)
                self._moved()
            yield kept.popleft()

    def _keep(self, arrival: Arrival) -> None:
        ordinal, seat = divmod(arrival.number, self._share)
        if seat in self._first and ordinal >= self._first[seat]:
            self._kept[seat].append(Document(ordinal, arrival.identity, arrival.text))


def _text(name: str, record: Record) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        keys = ", ".join(sorted(record)) or "nothing"
        raise DataError(f'{name}: a document has {keys}, but no "text"; use another data set')
    return text


def _explain(name: str, error: Exception) -> DataError | DataUnavailableError:
    """One sentence for what the libraries below raise, which is documented nowhere.

    What isn't there or can't be parsed needs a person; anything else is taken for the network's
    fault, which passes, unless the network was forbidden. A hub that is busy or broken ends as a
    file that wasn't found: the reason is further down.
    """
    cause = " ".join(str(error).split()) or type(error).__name__
    lasting = isinstance(error, (FileNotFoundError, ValueError))
    if lasting and not any(_is_hubs_fault(each) for each in _chain(error)):
        return DataError(f"training.dataset_path: {name}: {cause}; name a data set that exists")
    advice = "name a local copy in training.dataset_path"
    if hub.HF_HUB_OFFLINE:
        return DataError(f"{name}: HF_HUB_OFFLINE forbids to fetch it; {advice}, or unset that")
    return DataUnavailableError(f"{name}: can't be reached now ({cause}); if that lasts, {advice}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised for or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_hubs_fault(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == TOO_MANY or error.response.status_code >= SERVER_ERROR
    return isinstance(error, (ConnectionError, TimeoutError, LocalEntryNotFoundError))
