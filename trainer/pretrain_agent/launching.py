"""The supervisor's side of the launcher: its process, and the link to it."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from pretrain_agent import process
from pretrain_agent.link import FROM_LAUNCHER, FromLauncher, Regroup, ToLauncher
from pretrain_agent.settings import Settings
from pretrain_agent.wires import encode, receive
from pretrain_api import names

# Within which it must have stopped its ranks. One that is starting some may be importing torch once
# more, and hears nothing meanwhile.
REGROUP_SECONDS = 15.0
REGROUP_STARTING_SECONDS = 120.0
WARM_SECONDS = 900.0  # until it can start ranks; its own limit for the fork server is within that


class LauncherProcess:
    """One launcher, in a session of its own that its ranks share.

    ``fault`` says why it had to be killed.
    """

    def __init__(self, settings: Settings, board: Path, output: int) -> None:
        """``output`` is the descriptor of the pipe it writes its log to."""
        self._settings = settings
        self._board = board
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._warming: float | None = None  # since when it imports what ranks need
        self._regrouping: float | None = None  # since when it should be stopping its ranks
        self.fault = ""

    def start(self) -> socket.socket:
        """Start it; returns our end of the link."""
        ours, theirs = socket.socketpair()
        self._warming = time.monotonic()
        command = [sys.executable, "-m", "pretrain_agent.launcher"]
        command += ["--link", str(theirs.fileno())]
        command += ["--processes", str(self._settings.processes)]
        command += ["--entry-point", self._settings.entry_point]
        command += ["--config", str(self._settings.config)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={
                **os.environ,
                names.ENV_BOARD: str(self._board),
                # ranks write into pipes and can't see where these end
                names.ENV_TERMINAL: "1" if sys.stdout.isatty() else "",
            },
        )
        theirs.close()
        return ours

    @property
    def pid(self) -> int:
        """Its process, which is also the session of its ranks; 0 before the start."""
        return 0 if self._process is None else self._process.pid

    async def converse(
        self, sock: socket.socket, hear: Callable[[FromLauncher], Awaitable[None]]
    ) -> None:
        """Hand on what it says, until it ends."""
        reader, self._writer = await asyncio.open_connection(sock=sock)
        while (message := await receive(reader, FROM_LAUNCHER)) is not None:
            await hear(message)

    def tell(self, message: ToLauncher) -> None:
        """Send a command, if it listens already."""
        if isinstance(message, Regroup):
            self._regrouping = time.monotonic()
        if self._writer is not None:
            self._writer.write(encode(message))

    def is_warm(self) -> None:
        """It can start ranks."""
        self._warming = None

    def has_stopped_ranks(self) -> None:
        """It did as it was told."""
        self._regrouping = None

    def be_patient(self) -> None:
        """Count its time anew: this process could not run, and maybe nobody could."""
        self._warming = self._warming and time.monotonic()
        self._regrouping = self._regrouping and time.monotonic()

    def kill_if_stuck(self, ranks_run: bool) -> None:
        """End it if it does not do what is due. Its fork server and its ranks die with it.

        ``ranks_run`` is false while it may still be starting some.
        """
        patience = REGROUP_SECONDS if ranks_run else REGROUP_STARTING_SECONDS
        self._kill_if_late(self._regrouping, patience, "did not stop its ranks")
        self._kill_if_late(self._warming, WARM_SECONDS, "was not ready to start ranks")

    def _kill_if_late(self, since: float | None, patience: float, what: str) -> None:
        late = since is not None and time.monotonic() - since > patience
        if late and self._process is not None and self._process.returncode is None:
            self.fault = f"the launcher {what} within {patience:.0f} s"
            process.kill(self._process.pid)

    def kill_leftovers(self) -> None:
        """Kill what dead ranks have left behind in the launcher's session."""
        if self._process is not None:
            process.kill_orphans(self._process.pid, spare=self._process.pid)

    def ended(self, dead: Mapping[int, int]) -> int | None:
        """Its exit code if it is among the ``dead`` children, which are reaped behind Popen."""
        if self._process is None or self._process.pid not in dead:
            return None
        self._process.returncode = dead[self._process.pid]
        return self._process.returncode

    def forget(self) -> None:
        """It was killed and reaped with all other descendants."""
        if self._process is not None and self._process.returncode is None:
            self._process.returncode = -signal.SIGKILL
