"""Hugging Face tokenizers, read from the files that models are published with.

``tokenizer.json`` says how text is cut; which of its tokens begin and end a document is written in
``tokenizer_config.json`` or in ``special_tokens_map.json``. Tokenizers differ in whether they add
those by themselves, so they are always added here.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Engine

from pretrain_trainer.data.errors import DataError, unread

TOKENIZER = "tokenizer.json"
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")  # the first that knows a token wins


class Tokenizer:
    """Text to token ids and back.

    ``bos_id`` is None for models that begin documents with nothing. ``vocab_size`` is one more than
    the largest id. ``digest`` is equal for tokenizers that encode equally.
    """

    def __init__(self, engine: Engine, bos_id: int | None, eos_id: int) -> None:
        self._engine = engine
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.vocab_size = max(engine.get_vocab(with_added_tokens=True).values()) + 1
        content = f"{engine.to_str()}\0{bos_id}\0{eos_id}"
        self.digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Token ids of a text."""
        ids = self._engine.encode(text, add_special_tokens=False).ids
        begin = [self.bos_id] if add_bos and self.bos_id is not None else []
        return begin + ids + ([self.eos_id] if add_eos else [])

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """Token ids of each text, with begin and end tokens; int64, uses all cores."""
        begin = [] if self.bos_id is None else [self.bos_id]
        encodings = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*begin, *found.ids, self.eos_id], np.int64) for found in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; begin and end tokens are left out."""
        return self._engine.decode(ids, skip_special_tokens=True)


def load_tokenizer(hf_assets_path: str) -> Tokenizer:
    """Read the tokenizer in a folder.

    Raises DataError if the folder or a file is missing or broken, or no token ends a document.
    """
    folder = Path(hf_assets_path)
    if not folder.is_dir():
        raise DataError(
            f"model.hf_assets_path: {folder} is no folder; name one with {TOKENIZER} in it"
        )
    engine = _load_engine(folder / TOKENIZER)
    configs = {name: _load_json(folder / name) for name in CONFIGS if (folder / name).exists()}
    eos_id = _special(engine, configs, folder, "eos_token")
    if eos_id is None:
        where = " or ".join(configs) or CONFIGS[0]
        raise DataError(
            f'{folder}: no "eos_token" in {where}; name there the token that ends a document'
        )
    return Tokenizer(engine, _special(engine, configs, folder, "bos_token"), eos_id)


def _load_engine(path: Path) -> Engine:
    if not path.is_file():
        raise DataError(f"{path}: missing; model.hf_assets_path must be a folder that has it")
    content = _read(path)
    try:
        engine = Engine.from_str(content)
    except Exception as error:  # the library raises nothing more precise
        raise DataError(f"{path}: not a usable tokenizer ({error}); fetch it again") from error
    # Settings some files carry for inference: documents are cut and filled up by packing alone.
    engine.no_truncation()
    engine.no_padding()
    return engine


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON {type(content).__name__}, not an object; fetch it again")
    return content


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise unread(str(path), error, "fetch it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: can't be read ({error}); fetch it again") from error


def _special(
    engine: Engine, configs: dict[str, dict[str, Any]], folder: Path, key: str
) -> int | None:
    """Id of a special token, which is written as a string or as an object with ``content``."""
    for name, config in configs.items():
        value = config.get(key)
        token = value.get("content") if isinstance(value, dict) else value
        if token is None:
            continue
        if (found := engine.token_to_id(str(token))) is None:
            raise DataError(
                f'{folder / name}: "{key}" is {token!r}, which {TOKENIZER} doesn\'t know; '
                "use files of one model"
            )
        return found
    return None
