"""Sample text and tokenizer on this machine, for jobs that name those of the image.

Examples are written for the cluster, where the image has the samples at a fixed path. The same
files are in a checkout of this repository; a path into the image's folder is replaced by theirs,
and said so. Nothing else about a configuration is ever changed.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from pretrain_api import names
from pretrain_api.config import Model, RunConfig

_IN_CHECKOUT = Path("tests/assets")
_DEFAULT_TOKENIZER = Model().hf_assets_path


def substituted(config: RunConfig) -> RunConfig:
    """The configuration with paths that exist here, where only the image's were named."""
    found = next(_samples(), None)
    if found is None:
        return config
    model, training = config.model, config.training
    tokenizer = _local(model.hf_assets_path, found)
    if tokenizer == _DEFAULT_TOKENIZER and not Path(tokenizer).exists():
        tokenizer = str(found / "tokenizer")
    data = training.dataset_path and _local(training.dataset_path, found)
    for before, after in ((model.hf_assets_path, tokenizer), (training.dataset_path, data)):
        if before != after:
            print(f"using {after} for {before}", file=sys.stderr)
    return config.model_copy(
        update={
            "model": model.model_copy(update={"hf_assets_path": tokenizer}),
            "training": training.model_copy(update={"dataset_path": data}),
        }
    )


def _local(path: str, samples: Path) -> str:
    """The path, moved from the image's folder to ``samples`` if it is not there."""
    inside = Path(path).is_relative_to(names.SAMPLE_DIR)
    if not inside or Path(path).exists():
        return path
    return str(samples / Path(path).relative_to(names.SAMPLE_DIR))


def _samples() -> Iterator[Path]:
    """Folders of samples in the checkouts that hold the current folder or this file."""
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / _IN_CHECKOUT / "tokenizer").is_dir():
                yield folder / _IN_CHECKOUT
