"""Errors of the training process that carry a verdict: may another attempt help?

An exception that is none of these is a failure like any other: the process exits with 1, and the
restart budget decides. These two say that restarting is pointless, each for its own reason.
"""

import errno
from typing import Final

# What storage says of a file that somebody has removed or replaced.
REPLACED: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
# The same, and of one that may never be read. Anything else, such as a stale handle, may pass.
LASTING: Final = (*REPLACED, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


class BadInputError(Exception):
    """Configuration, data or tokenizer is wrong. One sentence: what is wrong and what to do."""


class HopelessError(Exception):
    """Training can't go on and a restart would end the same way. One sentence says why."""
