"""How a worker ends: result, exit code, and the message it leaves for the operator."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pretrain_api.wire import ExitCode, Failure, Phase, Result, TerminationMessage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The end of a worker."""

    result: Result
    exit_code: int
    failure: Failure | None = None


COMPLETE = Outcome(Result.COMPLETE, ExitCode.OK)


def preempted(failure: Failure | None = None) -> Outcome:
    """Left on request; ``failure`` says why the last save may be missing."""
    return Outcome(Result.PREEMPTED, ExitCode.PREEMPTED, failure)


def left(failure: Failure | None) -> Outcome:
    """Left on request, but maybe for a failure: free of charge, unless trying again is idle."""
    if failure is not None and failure.exit_code in (ExitCode.CONFIG, ExitCode.DO_NOT_RETRY):
        return failed(failure)
    return preempted(failure)


def completion(phases: Iterable[Phase]) -> Outcome:
    """All ranks here returned: complete, if every one of them left the completion marker."""
    if all(phase is Phase.DONE for phase in phases):
        return COMPLETE
    text = "all ranks returned, but not all left the completion marker"
    return failed(Failure(message=text))


def failed(failure: Failure) -> Outcome:
    """The exit code is the failing rank's, unless that code would mean something better."""
    code = failure.exit_code or 1
    if code == ExitCode.CONFIG:
        return Outcome(Result.CONFIG, code, failure)
    if code == ExitCode.PREEMPTED:
        code = 1
    return Outcome(Result.FAILED, code, failure)


def write(path: Path, message: TerminationMessage) -> None:
    """Leave the message. A path that can't be written costs the message, not the exit code."""
    try:
        path.write_bytes(message.to_bytes())
    except OSError as error:
        log.error("could not write the termination message: %s", error)
