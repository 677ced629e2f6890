"""How a rank dies: every error becomes an exit code, one sentence, and last words on the board."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain_api.wire import ExitCode
from pretrain_trainer.data.errors import DataError
from pretrain_trainer.errors import BadInputError, HopelessError
from pretrain_trainer.supervision import Supervision

logger = logging.getLogger(__name__)


@contextmanager
def verdicts(supervision: Supervision) -> Iterator[None]:
    """Turn errors that carry a verdict into exit codes; all others go through.

    Those are reported by whoever started this process, who also knows an error from the echo of a
    peer's.
    """
    try:
        yield
    except (BadInputError, DataError) as error:
        _leave(supervision, ExitCode.CONFIG, "Config", error)
    except HopelessError as error:
        _leave(supervision, ExitCode.DO_NOT_RETRY, "DoNotRetry", error)


def _leave(supervision: Supervision, code: ExitCode, reason: str, error: Exception) -> None:
    supervision.last_words(code, reason, str(error))
    logger.error("%s", error)
    sys.exit(code)
