"""Log lines: JSON where a machine reads them, one aligned line where a person does.

A supervised rank writes into a pipe whatever is at its end, so the supervisor tells it.
"""

import json
import logging
import os
import sys
import time
from typing import Any

from pretrain_api import names

LOGGER = "pretrain_trainer"


class JsonLines(logging.Formatter):
    """One JSON object per line; what the record carries as ``fields`` becomes its keys."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """The line, without line breaks inside."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "rank": self._rank,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class HumanLines(logging.Formatter):
    """Time and message; the level only where it is worth a look."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback below it if there is one."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}  {level}"
        text = line + record.getMessage()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def set_up_logs(rank: int) -> None:
    """Send this package's log to standard error; ranks other than 0 say only what is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    watched = sys.stderr.isatty() or os.environ.get(names.ENV_TERMINAL) == "1"
    handler.setFormatter(HumanLines() if watched else JsonLines(rank))
    logger = logging.getLogger(LOGGER)
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
