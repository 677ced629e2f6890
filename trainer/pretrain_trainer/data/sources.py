"""Where documents come from, behind one interface.

A source hands each stream its documents in a fixed order, from any point on: that is all packing
needs, and all that resuming needs. Documents in local files can be reached at random, so their
order is the shuffle of :mod:`.order`; what a hub sends comes in the order it is published in.
"""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from pretrain_api.config import Training
from pretrain_trainer.alive import Alive, unwatched
from pretrain_trainer.data.corpus import JSONL, TEXT, Corpus
from pretrain_trainer.data.errors import DataError
from pretrain_trainer.data.order import Order, Place

READ_AHEAD = 64  # documents of a stream whose places are computed at once


class Document(NamedTuple):
    """A document's turn: the ``ordinal``-th of its stream; ``identity`` is unique in the run."""

    ordinal: int
    identity: int
    text: str


class Source(Protocol):
    """An ordered supply of documents, dealt out to streams."""

    @property
    def identity(self) -> dict[str, str]:
        """What must be equal for two runs to see the same documents in the same order."""
        ...

    def open(
        self, first: Mapping[int, int], moved: Alive = unwatched
    ) -> dict[int, Iterator[Document]]:
        """The documents of each stream in ``first``, from that ordinal on.

        The iterators belong together and are used by one thread, in which they call ``moved`` when
        they read over documents. They raise DataError or DataUnavailableError, and end after the
        last epoch.
        """
        ...

    def close(self) -> None:
        """Let go of files; the source isn't used afterwards."""
        ...


def open_source(training: Training, streams: int, alive: Alive = unwatched) -> Source:
    """The source that ``training.dataset`` and ``training.dataset_path`` name.

    ``alive`` is called while files are indexed.

    Raises DataError if it is missing or can't be used, DataUnavailableError if it can't be reached.
    """
    match training.dataset, training.dataset_path:
        case "c4", path:
            # Hugging Face datasets takes seconds to import, and only this source needs it.
            from pretrain_trainer.data.hub import HubSource

            return HubSource.load(path, streams, training.epochs)
        case "text", str(path):
            return _local(Corpus(path, TEXT, alive), _decode_text, training, streams)
        case "jsonl", str(path):
            return _local(Corpus(path, JSONL, alive), _decode_json, training, streams)
        case other, path:
            raise DataError(
                f'training.dataset: "{other}" can\'t be read with dataset_path {path}; '
                "use c4, or text or jsonl with a path"
            )


class LocalSource:
    """Documents of local files, shuffled anew in every epoch."""

    def __init__(self, corpus: Corpus, decode: "Decode", order: Order) -> None:
        """Raises DataError if the first document of the files isn't usable.

        A wrong key or encoding shows in the first document as a rule, and should be told before
        training starts rather than when the shuffle comes across it.
        """
        self._corpus = corpus
        self._decode = decode
        self._order = order
        self._text(0)

    @property
    def identity(self) -> dict[str, str]:
        """Digest of names and content of all files, their documents, and the shuffle's seed."""
        order = self._order
        return {
            "data": self._corpus.digest,
            "documents": str(order.documents),
            "seed": str(order.seed),
        }

    def open(
        self, first: Mapping[int, int], moved: Alive = unwatched
    ) -> dict[int, Iterator[Document]]:
        """See :class:`Source`; reads over nothing."""
        return {stream: self._documents(stream, ordinal) for stream, ordinal in first.items()}

    def close(self) -> None:
        """Close all files."""
        self._corpus.close()

    def _documents(self, stream: int, ordinal: int) -> Iterator[Document]:
        while places := self._order.places(stream, ordinal, READ_AHEAD):
            for place in places:
                yield Document(ordinal, self._identity(place), self._text(place.document))
                ordinal += 1

    def _identity(self, place: Place) -> int:
        return place.epoch * self._order.documents + place.document

    def _text(self, document: int) -> str:
        return self._decode(self._corpus, document)


class Decode(Protocol):
    """Reads one document of a corpus as text."""

    def __call__(self, corpus: Corpus, document: int, /) -> str:
        """Raises DataError if the document isn't what it should be."""
        ...


def _decode_text(corpus: Corpus, document: int) -> str:
    try:
        return corpus.read(document).decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _not_unicode(corpus, document, error) from error


def _decode_json(corpus: Corpus, document: int) -> str:
    try:
        record = json.loads(corpus.read(document).decode("utf-8").removeprefix("\ufeff").rstrip())
    except UnicodeDecodeError as error:
        raise _not_unicode(corpus, document, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{corpus.line(document)}: not valid JSON ({_reason(error)}); {_EXPECTED}"
        ) from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{corpus.line(document)}: {_found(record)}; {_EXPECTED}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{corpus.line(document)}: the text holds half of a surrogate pair at character "
            f"{error.start}; mend or drop the line"
        ) from error
    return text


_EXPECTED = 'each line must be an object such as {"text": "..."}'


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error)


def _found(record: object) -> str:
    """What a line without usable text has instead."""
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__} instead of an object"
    if "text" in record:
        return f'"text" is of type {type(record["text"]).__name__}'
    keys = ", ".join(sorted(map(str, record))[:8]) or "none"
    return f'no key "text" (its keys: {keys})'


def _not_unicode(corpus: Corpus, document: int, error: UnicodeDecodeError) -> DataError:
    line = corpus.line(document)
    bad = error.object[error.start]
    return DataError(
        f"{line}: byte {error.start} from the start of this document (0x{bad:02x}) is not UTF-8; "
        "convert the file to UTF-8"
    )


def _local(corpus: Corpus, decode: Decode, training: Training, streams: int) -> LocalSource:
    order = Order(len(corpus), streams, training.seed or 0, training.epochs)
    return LocalSource(corpus, decode, order)
