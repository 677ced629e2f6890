"""A pool of ranks: gloo processes that are forked once and reused by every test that needs them.

Importing torch takes seconds, forking a process that has it takes none. ``ranks(4, function, ...)``
runs a function of the test's own file as four ranks of a fresh world and returns their results in
order. A test that kills a rank, or leaves one hanging, costs its successor one fork per rank.
"""

import contextlib
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).with_name("pool_server.py")
FORK_SECONDS = 60  # for a forked rank to connect
ECHO_SECONDS = 20  # after one rank failed, for the others to say what they saw


class RankError(AssertionError):
    """A rank raised, died or hung; the message has the ranks' tracebacks."""


class Pool:
    """See the module's docstring. Everything is started when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._address = str(folder / "pool.sock")
        self._listener = socket.socket(socket.AF_UNIX)  # a Listener would know no deadline
        self._listener.bind(self._address)
        self._listener.listen()
        self._listener.settimeout(FORK_SECONDS)
        self._server: subprocess.Popen[str] | None = None
        self._ranks: dict[int, tuple[Connection, int]] = {}

    def __call__(
        self,
        size: int,
        function: Callable[..., Any],
        *arguments: Any,
        timeout: float = 120,
        environment: dict[str, str] | None = None,
    ) -> list[Any]:
        """Run ``function(*arguments)`` as ``size`` ranks; results in the order of ranks.

        Arguments and results must be of types that both processes can import.

        Raises RankError if any rank does not return. Raising ranks are told apart by their
        tracebacks, dead and hanging ones by having none.
        """
        from torch.distributed import TCPStore  # deferred: most tests need no torch here

        self._ensure(size)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(size):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            task = (inspect.getfile(function), function.__name__, arguments)
            self._ranks[rank][0].send((*task, place | (environment or {})))
        answers = self._collect(size, timeout)
        failed = {rank: text for rank, (good, text) in answers.items() if not good}
        if failed or len(answers) < size:
            self._kill_ranks()
            lost = [rank for rank in range(size) if rank not in answers]
            text = "\n".join(f"rank {rank}: {failed[rank]}" for rank in sorted(failed))
            raise RankError(f"{text}\nwithout an answer: {lost}")
        return [answers[rank][1] for rank in range(size)]

    def close(self) -> None:
        """End every process of the pool."""
        self._kill_ranks()
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(timeout=30)
        self._listener.close()

    def _ensure(self, size: int) -> None:
        """Have ranks 0 to ``size - 1`` connected and idle."""
        server = self._server = self._server or self._start_server()
        missing = [rank for rank in range(size) if rank not in self._ranks]
        assert server.stdin is not None
        for rank in missing:
            server.stdin.write(f"{rank}\n")
        server.stdin.flush()
        for _ in missing:
            try:
                connection = Connection(self._listener.accept()[0].detach())
                number, pid = connection.recv()
            except (TimeoutError, EOFError):
                died = [rank for rank in missing if rank not in self._ranks]
                raise RankError(f"ranks {died} were forked, but some died before a task") from None
            self._ranks[number] = (connection, pid)

    def _start_server(self) -> subprocess.Popen[str]:
        server = subprocess.Popen(
            [sys.executable, str(SERVER), self._address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        assert server.stdout is not None
        if not server.stdout.readline():
            raise RuntimeError("the server of the pool of ranks died while it imported the trainer")
        return server

    def _collect(self, size: int, timeout: float) -> dict[int, tuple[bool, Any]]:
        """Answers by rank; those that don't come in time, or whose rank died, are left out."""
        deadline = time.monotonic() + timeout
        waiting = {self._ranks[rank][0]: rank for rank in range(size)}
        answers: dict[int, tuple[bool, Any]] = {}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ready in wait(list(waiting), left):
                assert isinstance(ready, Connection)
                rank = waiting.pop(ready)
                with contextlib.suppress(EOFError, ConnectionError):
                    answers[rank] = pickle.loads(ready.recv_bytes())
                if rank not in answers or not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + ECHO_SECONDS)
        return answers

    def _kill_ranks(self) -> None:
        for connection, pid in self._ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            connection.close()
        self._ranks.clear()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Runs a function of the test's file as so many ranks."""
    with tempfile.TemporaryDirectory() as folder:  # short: a socket's path has 107 characters
        pool = Pool(Path(folder))
        yield pool
        pool.close()
