"""The first and the last thing that happens in a rank, around the trainer's entry point.

First: the signal dispositions and the output that a forked process must not share with its parent.
Last: a rank that fails says why on the board and is gone at once, because every peer waits for its
sockets to close; a rank that returns must have left the completion marker.
"""

import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from pretrain_agent import stacks
from pretrain_agent.board import Board
from pretrain_agent.logs import pipe_path
from pretrain_agent.meeting import PEER_LOST
from pretrain_agent.process import die_with_parent
from pretrain_api import names
from pretrain_api.wire import ExitCode, Failure, Phase

CUDA_INITIALIZED = 3  # exit code of the probe
FAILED = 1
# Name of what the trainer raises where another rank failed to load or save; its subclasses are
# errors of the rank's own. By name, because this package doesn't know the trainer.
VERDICT = "CheckpointError"


def load_entry_point(entry_point: str) -> Callable[[str], None]:
    """The function behind ``module:name``."""
    module, _, name = entry_point.partition(":")
    return getattr(importlib.import_module(module), name)


def probe() -> None:
    """Run once in a fresh fork: tells by its exit code whether forks can use CUDA."""
    import torch  # deferred: this module is imported by processes that need no torch

    if getattr(torch.cuda, "_is_in_bad_fork", bool)():
        sys.exit(CUDA_INITIALIZED)


def run(entry_point: str, config: str, environment: Mapping[str, str]) -> None:
    """Run one rank. ``environment`` is added to the process's: a fork server's is out of date."""
    # The launcher's handlers turn signals into exceptions; a rank is to die of them, at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()
    os.environ.update(environment)
    local_rank = int(os.environ["LOCAL_RANK"])
    path = Path(os.environ[names.ENV_BOARD])
    _redirect(pipe_path(path.parent, local_rank))
    stacks.answer_signal(path.parent, local_rank)
    board = Board.open(path)
    board.publish(local_rank, Phase.STARTING, 0)
    try:
        load_entry_point(entry_point)(config)
    except SystemExit as leave:
        if leave.code not in (None, 0):
            _note_exit(board, local_rank, leave.code)
            raise
    except BaseException as error:  # torch's CheckpointException, for one, is no Exception
        _fail(board, local_rank, error)
    if board.read(local_rank).phase is not Phase.DONE:
        text = "the trainer returned without its completion marker"
        _fail(board, local_rank, RuntimeError(text))


def _redirect(pipe: Path) -> None:
    """Send standard output and error, of C++ code as well, into this rank's pipe."""
    descriptor = os.open(pipe, os.O_WRONLY)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(descriptor, number)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    os.close(descriptor)


def _note_exit(board: Board, local_rank: int, code: str | int) -> None:
    """Note that the trainer chose this exit code; its reason is what it printed last."""
    if code == ExitCode.PREEMPTED:
        return
    message = code if isinstance(code, str) else ""
    number = FAILED if isinstance(code, str) else code & 0xFF
    reason = "Config" if number == ExitCode.CONFIG else "RankFailed"
    _put_words(board, local_rank, Failure(exit_code=number, reason=reason, message=message))


def _put_words(board: Board, local_rank: int, failure: Failure) -> None:
    if local_rank not in board.failures():  # what the trainer itself has left is better
        board.put_failure(local_rank, failure)


def _fail(board: Board, local_rank: int, error: BaseException) -> None:
    """Leave last words and go, without waiting for threads that wait for lost peers."""
    print(f"rank {os.environ['RANK']} failed:", file=sys.stderr)
    traceback.print_exception(error)
    sys.stderr.flush()
    sys.stdout.flush()
    message = "".join(traceback.format_exception_only(error)).strip()
    reason = PEER_LOST if _is_echo(error) else "RankFailed"
    _put_words(board, local_rank, Failure(exit_code=FAILED, reason=reason, message=message))
    os._exit(FAILED)


def _is_echo(error: BaseException) -> bool:
    """Whether this is what a rank sees when a peer dies, rather than an error of its own."""
    import torch.distributed  # deferred: see probe()

    lost = (
        torch.distributed.DistNetworkError,
        torch.distributed.DistBackendError,
        torch.distributed.DistStoreError,
        ConnectionError,
    )
    return (
        isinstance(error, lost)
        or (isinstance(error, RuntimeError) and "gloo" in str(error))
        or type(error).__name__ == VERDICT
    )
