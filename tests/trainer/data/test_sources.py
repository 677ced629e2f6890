"""Bad data gets one sentence that names file, line and remedy; good data comes in order."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from pretrain_api.config import RunConfig
from pretrain_trainer.data.errors import DataError
from pretrain_trainer.data.order import Order
from pretrain_trainer.data.sources import Document, open_source

MakeConfig = Callable[..., RunConfig]
WriteLines = Callable[[Iterable[str]], Path]


def all_documents(config: RunConfig, streams: int = 1) -> list[list[Document]]:
    source = open_source(config.training, streams)
    opened = source.open(dict.fromkeys(range(streams), 0))
    found = [list(opened[stream]) for stream in range(streams)]
    source.close()
    return found


def line_of(content: bytes, tmp_path: Path, make_config: MakeConfig) -> str:
    """The sentence about a file whose second line is ``content``."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + content + b"\n")
    with pytest.raises(DataError) as caught:
        all_documents(make_config(dataset_path=str(path), epochs=1))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(tmp_path), "")


EXPECTED = 'each line must be an object such as {"text": "..."}'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b'{"text": "torn',
            f"not valid JSON (Unterminated string starting at column 10); {EXPECTED}",
        ),
        (b"   ", f"not valid JSON (Expecting value at column 1); {EXPECTED}"),
        (b"[" * 100_000, "not valid JSON (maximum recursion depth exceeded"),
        (b"9" * 5000, "not valid JSON (Exceeds the limit (4300 digits)"),
        (b'["text"]', f"a JSON list instead of an object; {EXPECTED}"),
        (b'{"content": "x", "id": 1}', f'no key "text" (its keys: content, id); {EXPECTED}'),
        (b"{}", f'no key "text" (its keys: none); {EXPECTED}'),
        (b'{"text": null}', f'"text" is of type NoneType; {EXPECTED}'),
        (b'{"text": 7}', f'"text" is of type int; {EXPECTED}'),
        (b'{"text": "a\xffb"}', "byte 11 from the start of this document (0xff) is not UTF-8; "),
        (b'{"text": "a\\ud800"}', "the text holds half of a surrogate pair at character 1; "),
    ],
)
def test_a_bad_line_is_named(
    content: bytes, sentence: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    assert line_of(content, tmp_path, make_config).startswith(f"/bad.jsonl:2: {sentence}")


def test_a_first_line_that_is_bad_is_found_before_training(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"content": "x"}\n')
    with pytest.raises(DataError, match=r'bad\.jsonl:1: no key "text"'):
        open_source(make_config(dataset_path=str(path)).training, 1)


def test_text_that_is_not_utf8_is_named(tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt:1: byte 3 .* \(0xe9\) is not UTF-8; convert"):
        open_source(make_config(dataset="text", dataset_path=str(path)).training, 1)


def test_a_data_set_without_a_reader_is_refused(make_config: MakeConfig) -> None:
    training = make_config().training.model_copy(update={"dataset_path": None})
    with pytest.raises(DataError, match=r'training\.dataset: "jsonl" can\'t be read with dataset'):
        open_source(training, 1)


def test_a_byte_order_mark_is_not_text(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffwords".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "words"}\n'.encode())
    for dataset in ["text", "jsonl"]:
        config = make_config(dataset=dataset, dataset_path=str(tmp_path), epochs=1)
        assert [document.text for document in all_documents(config)[0]] == ["words"]


def test_empty_and_huge_documents_are_documents(tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": ""}\n{"text": "%s"}\n' % ("huge " * 300_000))
    config = make_config(dataset_path=str(path), epochs=1)
    assert sorted(len(document.text) for document in all_documents(config)[0]) == [0, 1_500_000]


def test_streams_follow_the_order(make_config: MakeConfig, write_jsonl: WriteLines) -> None:
    path = write_jsonl(map(str, range(150)))
    config = make_config(dataset_path=str(path), epochs=2, seed=3)
    order = Order(documents=150, streams=4, seed=3, epochs=2)
    for stream, documents in enumerate(all_documents(config, streams=4)):
        places = order.places(stream, 0, 1000)
        assert [document.text for document in documents] == [str(p.document) for p in places]
        assert [document.ordinal for document in documents] == list(range(len(places)))
        assert [d.identity for d in documents] == [150 * p.epoch + p.document for p in places]


def test_a_stream_opens_at_any_document(make_config: MakeConfig, write_jsonl: WriteLines) -> None:
    path = write_jsonl(map(str, range(90)))
    config = make_config(dataset_path=str(path), epochs=1)
    whole = all_documents(config, streams=2)
    source = open_source(config.training, 2)
    opened = source.open({0: 40, 1: 45})
    assert list(opened[0]) == whole[0][40:]
    assert list(opened[1]) == []
