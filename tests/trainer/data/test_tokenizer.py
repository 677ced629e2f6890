"""Tokenizers as models ship them, and a sentence for each way they can be broken."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain_trainer.data.errors import DataError
from pretrain_trainer.data.tokenizer import Tokenizer, load_tokenizer

TEXT = "Tom's fence,  « été »\n\t😀"


@pytest.fixture
def folder(assets: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(assets / "tokenizer", tmp_path / "tokenizer"))


def write(folder: Path, name: str, **content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def change(folder: Path, **content: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | content))


def test_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT, add_bos=True, add_eos=True)) == TEXT


def test_begin_and_end_are_added_when_asked(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode(TEXT)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 1024)
    assert tokenizer.encode(TEXT, add_bos=True) == [0, *plain]
    assert tokenizer.encode(TEXT, add_eos=True) == [*plain, 1]


def test_a_batch_is_each_text_between_begin_and_end(tokenizer: Tokenizer) -> None:
    texts = [TEXT, "", "a b"]
    found = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert found == [tokenizer.encode(text, add_bos=True, add_eos=True) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_special_tokens_may_be_written_as_objects(folder: Path) -> None:
    write(
        folder,
        "tokenizer_config.json",
        eos_token={"content": "<|end_of_text|>", "lstrip": False, "special": True},
        bos_token=None,
    )
    found = load_tokenizer(str(folder))
    assert (found.bos_id, found.eos_id) == (None, 1)
    assert found.encode("a", add_bos=True) == found.encode("a")
    assert found.encode_batch(["a"])[0].tolist() == [*found.encode("a"), 1]


def test_special_tokens_map_stands_in_for_the_configuration(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    write(
        folder,
        "special_tokens_map.json",
        eos_token="<|end_of_text|>",
        bos_token={"content": "<|begin_of_text|>"},
    )
    found = load_tokenizer(str(folder))
    assert (found.bos_id, found.eos_id) == (0, 1)


def test_a_tokenizer_that_adds_begin_itself_adds_it_once(folder: Path) -> None:
    special = {"id": "<|begin_of_text|>", "ids": [0], "tokens": ["<|begin_of_text|>"]}
    template = [
        {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    change(
        folder,
        post_processor={
            "type": "TemplateProcessing",
            "single": template,
            "pair": template,
            "special_tokens": {"<|begin_of_text|>": special},
        },
    )
    assert load_tokenizer(str(folder)).encode_batch(["a"])[0].tolist().count(0) == 1


def test_truncation_and_padding_of_the_file_are_ignored(folder: Path) -> None:
    change(
        folder,
        truncation={
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 16},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<|end_of_text|>",
        },
    )
    found = load_tokenizer(str(folder))
    assert found.decode(found.encode("a longer sentence than four tokens")).endswith("tokens")
    assert len(found.encode("a")) == 1


def test_the_size_covers_the_largest_id(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder, added_tokens=[*added, added[0] | {"id": 1024, "content": "<|extra|>"}])
    assert load_tokenizer(str(folder)).vocab_size == 1025


def test_the_digest_tells_tokenizers_apart(folder: Path, tokenizer: Tokenizer) -> None:
    assert load_tokenizer(str(folder)).digest == tokenizer.digest
    write(folder, "tokenizer_config.json", eos_token="<|begin_of_text|>")
    assert load_tokenizer(str(folder)).digest != tokenizer.digest


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.hf_assets_path: \S+/absent is no folder; name"):
        load_tokenizer(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tokenizer.json", None, r"tokenizer\.json: missing; model\.hf_assets_path must be"),
        ("tokenizer.json", "{", r"tokenizer\.json: not a usable tokenizer \(.+\); fetch it again"),
        ("tokenizer.json", '{"model": 3}', r"tokenizer\.json: not a usable tokenizer \(.+\)"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not valid JSON \(.+\); fetch"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: a JSON list, not an object"),
        ("tokenizer_config.json", "{}", r'no "eos_token" in tokenizer_config\.json; name there'),
        ("tokenizer_config.json", None, r'no "eos_token" in tokenizer_config\.json; name there'),
        (
            "tokenizer_config.json",
            '{"eos_token": "</s>"}',
            r"\"eos_token\" is '</s>', which tokenizer\.json doesn't know; use files of one model",
        ),
    ],
)
def test_a_broken_file_is_named(
    folder: Path, file: str, content: str | None, sentence: str
) -> None:
    path = folder / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=sentence) as caught:
        load_tokenizer(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"tokenizer\.json: can't be read"):
        load_tokenizer(str(folder))
