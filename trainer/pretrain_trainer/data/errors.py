"""What can go wrong with data, sorted by whether trying again can help."""


class DataError(ValueError):
    """The data set, the tokenizer or the configuration has to be changed by a person.

    The message is one sentence that names the file or key and what to do about it.
    """


class DataUnavailableError(RuntimeError):
    """The data can't be reached now; another attempt may succeed."""
