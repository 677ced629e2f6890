"""What can go wrong with data, sorted by whether trying again can help."""

from pretrain_trainer.errors import LASTING


class DataError(ValueError):
    """The data set, the tokenizer or the configuration has to be changed by a person.

    The message is one sentence that names the file or key and what to do about it.
    """


class DataUnavailableError(RuntimeError):
    """The data can't be reached now; another attempt may succeed."""


def unread(path: str, error: OSError, remedy: str) -> DataError | DataUnavailableError:
    """The error for a file that storage doesn't give out; ``remedy`` is for people."""
    said = error.strerror or str(error)
    if error.errno in LASTING:
        return DataError(f"{path}: can't be read ({said}); {remedy}")
    return DataUnavailableError(f"{path}: can't be read now ({said})")
