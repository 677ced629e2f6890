"""From exit codes, last words and log tails to the one failure that is to blame."""

import signal
from collections.abc import Mapping

from pretrain_agent.meeting import root_cause
from pretrain_api.wire import ExitCode, Failure

TAIL_BYTES = 1536  # of a log, in a failure's message
FORK_SERVER_DIED = 255  # what multiprocessing reports for a child whose exit code got lost


def blame(
    exits: Mapping[int, int],
    words: Mapping[int, Failure],
    tails: Mapping[int, str],
    first_rank: int,
    out_of_memory: bool,
) -> Failure | None:
    """The local failure that stopped this agent's ranks, or None when none failed.

    ``exits`` are the exit codes of ranks that ended by themselves (negative for a signal) and
    ``words`` what ranks wrote on the board before dying, both by local rank; ``tails`` are the last
    log lines by local rank; ``first_rank`` is the global rank of local rank 0.
    """
    failures: list[Failure] = []
    for local_rank in sorted({*exits, *words}):
        code, tail = exits.get(local_rank), tails.get(local_rank, "")
        if local_rank in words:
            failure = _from_words(words[local_rank], code, tail)
        elif code is None or code == ExitCode.PREEMPTED:
            continue  # it saved and left on request
        else:
            failure = _from_exit(code, tail, out_of_memory)
        failures.append(failure.model_copy(update={"rank": first_rank + local_rank}))
    return root_cause(failures)


def _from_words(words: Failure, code: int | None, tail: str) -> Failure:
    """What the rank said itself, completed by what was seen of it."""
    exit_code = shell_code(code or 1) if words.exit_code is None else words.exit_code
    return words.model_copy(update={"exit_code": exit_code, "message": words.message or tail})


def _from_exit(code: int, tail: str, out_of_memory: bool) -> Failure:
    """A rank that ended without last words: killed, or ended by something below Python."""
    reason, message = "RankFailed", f"left with exit code {code} and no word"
    if code == FORK_SERVER_DIED:
        reason, message = "Launcher", "the fork server died"
        if out_of_memory:
            reason, message = "OOMKilled", "the fork server was killed by the kernel: out of memory"
    elif code == 0:
        message = "left with exit code 0 before the training was done"
    elif code < 0:
        message = f"killed by {signal_name(-code)}"
        if out_of_memory and -code == signal.SIGKILL:
            reason, message = "OOMKilled", "killed by the kernel: out of memory"
    return Failure(
        exit_code=shell_code(code) or 1,
        signal=signal_name(-code) if code < 0 else None,
        reason=reason,
        message=f"{tail}\n{message}".lstrip(),
    )


def of_launcher(code: int, fault: str, tail: list[str], out_of_memory: bool) -> Failure:
    """The launcher ended, with this exit code, or was killed for a ``fault``.

    ``out_of_memory`` says whether the kernel has killed a process of the container since last time.
    """
    reason, ended = "Launcher", f"the launcher left with exit code {code}"
    if out_of_memory and -code == signal.SIGKILL and not fault:
        reason, ended = "OOMKilled", "the launcher was killed by the kernel: out of memory"
    return Failure(
        exit_code=1,
        signal=signal_name(-code) if code < 0 and not fault else None,
        reason=reason,
        message=fault or tail_text(tail) or ended,
    )


def shell_code(code: int) -> int:
    """Exit code in the shell's convention: 128 plus the number of the signal."""
    return code if code >= 0 else 128 - code


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; unknown numbers keep their number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def tail_text(lines: list[str]) -> str:
    """The last lines that fit :data:`TAIL_BYTES`."""
    kept: list[str] = []
    size = 0
    for line in reversed(lines):
        size += len(line.encode()) + 1
        if size > TAIL_BYTES:
            break
        kept.append(line)
    return "\n".join(reversed(kept))
