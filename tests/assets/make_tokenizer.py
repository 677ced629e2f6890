"""Make the sample data set and its tokenizer from the texts beside this file.

Writes ``text/corpus.jsonl`` (the same texts as ``text/*.txt``, cut into short documents) and
``tokenizer/`` (a byte-level BPE of 1,024 tokens trained on them, in the files that Hugging Face
models ship). The result depends on the texts alone: running it again changes no byte, which a test
checks, so a change of a text has to come with the files made from it.

    python tests/assets/make_tokenizer.py [target folder]
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ASSETS = Path(__file__).resolve().parent
VOCABULARY = 1024
DOCUMENT_CHARACTERS = 400  # a document ends with the paragraph that reaches this length
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def main(target: Path) -> None:
    """Write the corpus and the tokenizer below ``target``."""
    texts = {path.name: path.read_text("utf-8") for path in sorted((ASSETS / "text").glob("*.txt"))}
    write_corpus(texts, target / "text" / "corpus.jsonl")
    write_tokenizer(list(texts.values()), target / "tokenizer")


def write_corpus(texts: dict[str, str], path: Path) -> None:
    """One JSON object a line: ``text``, and ``source``, the file it was cut from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": document, "source": name}, ensure_ascii=False)
        for name, text in texts.items()
        for document in documents(text)
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8", newline="\n")


def documents(text: str) -> Iterator[str]:
    """Join paragraphs until they are long enough; the last document may be shorter."""
    held: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        held.append(paragraph)
        if sum(map(len, held)) >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def write_tokenizer(texts: list[str], folder: Path) -> None:
    """Train a byte-level BPE: no text is unknown to it, and decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", "utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS)
