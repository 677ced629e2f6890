"""Which models there are, and how a configuration becomes one."""

import dataclasses
from collections.abc import Callable

import torch

from pretrain_api.config import Model
from pretrain_api.flavors import llama3 as llama3_flavors
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.models.llama3 import Llama3

Builder = Callable[[str, int, int], LanguageModel]


def build_model(model: Model, vocab_size: int, seq_len: int, dtype: torch.dtype) -> LanguageModel:
    """The model of a configuration on the meta device: shapes without memory.

    Args:
        model: the configuration's section.
        vocab_size: the tokenizer's; used by flavors without a vocabulary of their own.
        seq_len: tokens per sequence.
        dtype: of the parameters.

    Raises:
        BadInputError: for an unknown family, or a tokenizer or sequence that doesn't fit.
    """
    build = FAMILIES.get(model.name)
    if build is None:
        known = ", ".join(sorted(FAMILIES))
        raise BadInputError(f"model.name: there is no model {model.name!r}; there is {known}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return build(model.flavor, vocab_size, seq_len)
    finally:
        torch.set_default_dtype(before)


def build_llama3(flavor: str, vocab_size: int, seq_len: int) -> Llama3:
    """A Llama 3.1 of a published or debug size."""
    shape = llama3_flavors.FLAVORS[flavor]  # the configuration was checked against the table
    if shape.vocab_size is None:
        shape = dataclasses.replace(shape, vocab_size=vocab_size)
    elif vocab_size > shape.vocab_size:
        raise BadInputError(
            f"model.hf_assets_path: the tokenizer has {vocab_size} tokens, but llama3 {flavor} has "
            f"room for {shape.vocab_size}; use the tokenizer the flavor was made for"
        )
    if seq_len > shape.max_seq_len:
        raise BadInputError(
            f"training.seq_len: {seq_len} is beyond llama3 {flavor}'s context of "
            f"{shape.max_seq_len} tokens"
        )
    return Llama3(shape, seq_len)


FAMILIES: dict[str, Builder] = {"llama3": build_llama3}
