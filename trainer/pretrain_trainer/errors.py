"""Errors of the training process that carry a verdict: may another attempt help?

An exception that is none of these is a failure like any other: the process exits with 1, and the
restart budget decides. These two say that restarting is pointless, each for its own reason.
"""


class BadInputError(Exception):
    """Configuration, data or tokenizer is wrong. One sentence: what is wrong and what to do."""


class HopelessError(Exception):
    """Training can't go on and a restart would end the same way. One sentence says why."""
