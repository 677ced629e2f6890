"""Run commands, wait for conditions, report progress: the only I/O helpers the package shares."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class DevclusterError(Exception):
    """Something the user can act on; the message is one sentence that says what to do."""


class CommandError(DevclusterError):
    """A command ended with a non-zero exit status.

    Attributes:
        argv: the command.
        returncode: its exit status.
        output: what it wrote to stdout and stderr, trimmed.
    """

    def __init__(self, argv: Sequence[str], returncode: int, output: str) -> None:
        self.argv = tuple(argv)
        self.returncode = returncode
        self.output = output.strip()
        shown = " ".join(self.argv[:6]) + (" ..." if len(self.argv) > 6 else "")
        super().__init__(f"`{shown}` failed with status {returncode}: {self.output[-2000:]}")


def run(
    *argv: str | Path,
    text: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Runs a command to its end and returns its stdout.

    Args:
        argv: program and arguments.
        text: what the program reads on stdin; nothing when None.
        env: the whole environment; inherited when None.
        cwd: working directory.

    Raises:
        CommandError: the command ended with a non-zero status.
        DevclusterError: the program is not installed.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words, input=text or "", capture_output=True, text=True, env=env, cwd=cwd, check=False
        )
    except FileNotFoundError as error:
        raise DevclusterError(f"{error.filename} is not there: run `up` to install it") from error
    if done.returncode != 0:
        raise CommandError(words, done.returncode, done.stderr + done.stdout)
    return done.stdout


def stream(argv: Sequence[str], on_line: Callable[[str], None]) -> None:
    """Runs a long command and hands over each line of its output as it comes.

    Raises:
        CommandError: the command ended with a non-zero status.
    """
    kept: list[str] = []
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            kept = [*kept[-30:], line]
            on_line(line.rstrip())
    if process.returncode != 0:
        raise CommandError(argv, process.returncode, "".join(kept))


def succeeds(*argv: str | Path) -> bool:
    """Runs a command and tells whether it ended with status zero."""
    try:
        run(*argv)
    except DevclusterError:
        return False
    return True


def wait_until(condition: Callable[[], bool], what: str, seconds: float, poll: float = 0.1) -> None:
    """Blocks until `condition()` holds.

    Raises:
        DevclusterError: it did not hold within `seconds`; `what` names it in the message.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise DevclusterError(f"gave up after {seconds:.0f} s waiting until {what}")
        time.sleep(poll)


class Progress:
    """Prints lines with the seconds since the start, to stderr so that stdout stays parseable."""

    def __init__(self, quiet: bool = False) -> None:
        self._start = time.monotonic()
        self._quiet = quiet
        self._lock = threading.Lock()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def say(self, message: str) -> None:
        """Prints one line; threads may call it at the same time."""
        if self._quiet:
            return
        with self._lock:
            print(f"[{self.elapsed:6.1f} s] {message}", file=sys.stderr, flush=True)
