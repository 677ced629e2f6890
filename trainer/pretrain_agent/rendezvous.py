"""torch's rendezvous interface over the link to our supervisor.

torch asks ``next_rendezvous`` when no rank runs and ``num_nodes_waiting`` while all are healthy.
Both are answered from what the supervisor said; nothing here decides, and nothing blocks in C++:
waiting is done in short steps of Python, so that signals are seen.
"""

import os
import queue
import socket
import threading
from datetime import timedelta
from typing import NoReturn

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # documented
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from pretrain_agent.link import (
    TO_LAUNCHER,
    Finished,
    FromLauncher,
    Regroup,
    Start,
    Stopped,
    ToLauncher,
)
from pretrain_agent.meeting import Open, Opened
from pretrain_api import names

POLL_SECONDS = 0.05
STORE_TIMEOUT = timedelta(seconds=300)


class Link:
    """The launcher's end of the socket pair; a thread listens, so that an end is noticed at once.

    When the supervisor is gone there is nothing left to do and nobody to tell.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._lines = sock.makefile("rwb")
        self._inbox: queue.SimpleQueue[Open | Start] = queue.SimpleQueue()
        self.regroup = threading.Event()
        threading.Thread(target=self._listen, name="link", daemon=True).start()

    def say(self, message: FromLauncher) -> None:
        """Send one message to the supervisor."""
        self._lines.write(message.to_json().encode() + b"\n")
        self._lines.flush()

    def hear(self) -> Open | Start:
        """Wait for the next command in a loop that signal handlers can interrupt."""
        while True:
            try:
                return self._inbox.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue

    def _listen(self) -> None:
        for line in self._lines:
            self._take(TO_LAUNCHER.validate_json(line))
        os._exit(1)

    def _take(self, message: ToLauncher) -> None:
        if isinstance(message, Regroup):
            self.regroup.set()
            return
        if isinstance(message, Start):
            self.regroup.clear()  # what was said before it concerned an older round
        self._inbox.put(message)


class ExitBarrier:
    """What torch takes for its store, and uses to wait for the other agents at the end.

    torch's own would block in C++ for minutes, deaf to SIGTERM and to new generations. This one
    tells the supervisor that the ranks are done and then waits to be ended by it.
    """

    timeout = STORE_TIMEOUT

    def __init__(self, link: Link) -> None:
        self._link = link

    def set_timeout(self, timeout: timedelta) -> None:
        """Accepted and ignored: the supervisor sets the limits."""

    def add(self, key: str, amount: int) -> int:
        """Never the last to arrive: who is, is decided elsewhere."""
        return 0

    def set(self, key: str, value: str) -> None:
        """Nothing is stored."""

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> NoReturn:
        """Announce the end; the supervisor kills this process when it may go."""
        self._link.say(Finished())
        while True:
            self._link.hear()


class Rendezvous(RendezvousHandler):
    """See the module's docstring. ``environment`` is what the next ranks get to know."""

    def __init__(self, link: Link, environment: dict[str, str]) -> None:
        self._link = link
        self._environment = environment
        self._store: TCPStore | None = None
        self._store_round: int | None = None
        self.exits: dict[int, int] = {}  # filled by the agent when ranks end by themselves

    @property
    def use_agent_store(self) -> bool:
        """Ranks are clients only: the leader's launcher serves their store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Report that no rank runs, and wait to be told to start some."""
        self._store = None  # the round's ranks are gone, and nobody else uses its store
        self._store_round = None
        self._link.say(Stopped(exits=self.exits))
        self.exits = {}
        while not isinstance(command := self._link.hear(), Start):
            self._link.say(Opened(round=command.round, port=self._open(command.round)))
        self._environment[names.ENV_GENERATION] = str(command.generation)
        self._environment[names.ENV_ROUND] = str(command.round)
        self._environment[names.ENV_NONCE] = command.nonce
        self._environment.pop(names.ENV_SAVED_STEP, None)
        if command.saved_step is not None:
            self._environment[names.ENV_SAVED_STEP] = str(command.saved_step)
        store_info = RendezvousStoreInfo(command.host, command.port)
        # torch's annotation asks for its C++ store, its code for what ExitBarrier has
        barrier: object = ExitBarrier(self._link)
        return RendezvousInfo(barrier, command.rank, command.size, store_info)  # pyright: ignore[reportArgumentType]

    def _open(self, number: int) -> int:
        """Serve a fresh store for the ranks of round ``number``, once; returns its port."""
        if self._store is None or self._store_round != number:
            store = TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT
            )
            self._store, self._store_round = store, number
        return self._store.port

    def num_nodes_waiting(self) -> int:
        """1 when the ranks are to be stopped and started anew."""
        return int(self._link.regroup.is_set())

    def get_backend(self) -> str:
        """Name for torch's logs."""
        return "pretrain"

    def get_run_id(self) -> str:
        """Name for torch's logs: ids that matter are generation and round."""
        return "pretrain"

    def is_closed(self) -> bool:
        """Never: the supervisor ends this process instead."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def shutdown(self) -> bool:
        """Nothing to shut down."""
        return True
