"""Output of the ranks: passed on line by line, with a tail kept for the case of a failure.

Every local rank writes into a named pipe that the supervisor holds open at both ends, so neither a
restart of the rank nor a slow reader loses or blocks anything but the rank itself. A thread copies
lines to standard output: global rank 0's as they are, the others' with ``[rank N]`` in front. It is
a thread of its own because a container's log may block, and the meeting must not wait for it.
"""

import contextlib
import os
import selectors
import sys
import threading
from collections import deque
from pathlib import Path
from typing import BinaryIO

LINE_BYTES = 8 * 1024  # a longer line is passed on in pieces
TAIL_LINES = 40
READ_BYTES = 64 * 1024
FLUSH_SECONDS = 1.0
LAUNCHER = -1  # the launcher's and fork server's own output


def pipe_path(directory: Path, local_rank: int) -> Path:
    """Where a rank finds the pipe for its output."""
    return directory / f"rank-{local_rank}"


class LogPump:
    """Copies output of the launcher and the ranks to ``out`` and remembers each one's tail."""

    def __init__(self, directory: Path, processes: int, out: BinaryIO | None = None) -> None:
        self._out = sys.stdout.buffer if out is None else out
        self._selector = selectors.DefaultSelector()
        self._partial: dict[int, bytes] = {}
        self._tails: dict[int, deque[str]] = {}
        self._prefix: dict[int, bytes] = {}
        self._wake_read, self._wake = os.pipe()
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._idle = threading.Event()
        self._stopping = False
        self._descriptors = [self._wake_read, self._wake]
        for local_rank in range(processes):
            path = pipe_path(directory, local_rank)
            os.mkfifo(path)
            self._add(local_rank, os.open(path, os.O_RDONLY | os.O_NONBLOCK))
            self._descriptors.append(os.open(path, os.O_WRONLY))
        read, self.launcher_end = os.pipe()
        os.set_blocking(read, False)
        self._add(LAUNCHER, read)
        self._descriptors.append(self.launcher_end)
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)

    def _add(self, source: int, descriptor: int) -> None:
        self._descriptors.append(descriptor)
        self._selector.register(descriptor, selectors.EVENT_READ, source)
        self._partial[source] = b""
        self._tails[source] = deque(maxlen=TAIL_LINES)
        self._prefix[source] = b""

    def start(self) -> None:
        """Begin to copy."""
        self._thread.start()

    def begin_round(self, first_rank: int) -> None:
        """Forget the tails; ranks are numbered from ``first_rank`` from now on."""
        for source, tail in self._tails.items():
            tail.clear()
            rank = first_rank + source
            if source != LAUNCHER:
                self._prefix[source] = b"[rank %d] " % rank if rank else b""

    def insert(self, local_rank: int, text: str) -> None:
        """Write ``text`` as if this rank had; blocks as long as the reader of our output does."""
        prefix = self._prefix[local_rank]
        # A closed standard output is no reason to fail.
        with contextlib.suppress(OSError, ValueError):
            self._out.write(b"".join(prefix + line.encode() + b"\n" for line in text.splitlines()))
            self._out.flush()

    def tail(self, source: int) -> list[str]:
        """The last lines of a local rank, or of the :data:`LAUNCHER`."""
        return list(self._tails[source])

    def flush(self) -> None:
        """Return once everything written before this call was copied, or after a second."""
        self._idle.clear()
        os.write(self._wake, b"f")
        self._idle.wait(FLUSH_SECONDS)

    def close(self) -> None:
        """Copy what is left and stop."""
        self.flush()
        self._stopping = True
        os.write(self._wake, b"q")
        self._thread.join(FLUSH_SECONDS)
        if not self._thread.is_alive():
            self._selector.close()
            for descriptor in self._descriptors:
                os.close(descriptor)

    def _run(self) -> None:
        asked = False
        while not self._stopping:
            ready = self._selector.select(0 if asked else None)
            sources = [key for key, _ in ready if key.data is not None]
            if len(sources) < len(ready):
                os.read(self._wake_read, READ_BYTES)
                asked = True
            for key in sources:
                self._copy(key.data, key.fd)
            if asked and not sources:
                asked = False
                self._idle.set()

    def _copy(self, source: int, descriptor: int) -> None:
        data = self._partial[source] + os.read(descriptor, READ_BYTES)
        *lines, rest = data.split(b"\n")
        if len(rest) > LINE_BYTES:
            lines, rest = [*lines, rest], b""
        self._partial[source] = rest
        for line in lines:
            self._tails[source].append(line[:LINE_BYTES].decode(errors="replace"))
        # A closed standard output must not end the pump: ranks would block on a full pipe.
        with contextlib.suppress(OSError):
            self._out.write(b"".join(self._prefix[source] + line + b"\n" for line in lines))
            self._out.flush()
