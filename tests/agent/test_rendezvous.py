"""What torch's elastic agent is given in place of its own rendezvous, where that has traps."""

import os
import socket
import threading
from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.api import SignalException

from pretrain_agent.link import FROM_LAUNCHER, Finished, FromLauncher, Regroup, Start, Stopped
from pretrain_agent.meeting import Open, Opened
from pretrain_agent.rendezvous import ExitBarrier, Link, Rendezvous
from pretrain_api import names

START = Start(generation=3, round=1, rank=0, size=2, host="127.0.0.1", port=9, nonce="n")


class Supervisor:
    """The other end of the link."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(20)
        self._lines = sock.makefile("rwb")

    def say(self, message: Open | Start | Regroup) -> None:
        self._lines.write(message.to_json().encode() + b"\n")
        self._lines.flush()

    def hear(self) -> FromLauncher:
        return FROM_LAUNCHER.validate_json(self._lines.readline())


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Link, Supervisor]]:
    gone = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: gone.set())  # what a link does at its end
    ours, theirs = socket.socketpair()
    link, supervisor = Link(ours), Supervisor(theirs)
    yield link, supervisor
    theirs.shutdown(socket.SHUT_RDWR)
    assert gone.wait(20)
    theirs.close()


def test_a_signal_gets_through_every_wait(
    ends: tuple[Link, Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch turns SIGTERM into an Exception, which a broad except would swallow."""
    link, _ = ends

    def signalled(timeout: float) -> None:
        raise SignalException("SIGTERM", sigval=15)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(link, "_inbox", type("Inbox", (), {"get": staticmethod(signalled)}))
    with pytest.raises(SignalException):
        Rendezvous(link, {}).next_rendezvous()
    with pytest.raises(SignalException):
        ExitBarrier(link).wait(["done"])


def test_the_end_is_waited_for_in_python_and_told_to_the_supervisor(
    ends: tuple[Link, Supervisor],
) -> None:
    """torch's own barrier blocks in C++ for minutes, and then reports success."""
    link, supervisor = ends
    barrier = ExitBarrier(link)
    assert barrier.add("arrived", 1) == 0  # never the last one, who would not wait
    threading.Thread(target=barrier.wait, args=(["done"],), daemon=True).start()
    assert supervisor.hear() == Finished()


def test_every_round_has_a_store_of_its_own(ends: tuple[Link, Supervisor]) -> None:
    """One server per process would keep the old keys, on a port that may be somebody else's now."""
    link, supervisor = ends
    environment: dict[str, str] = {}
    rendezvous = Rendezvous(link, environment)
    thread = threading.Thread(target=rendezvous.next_rendezvous, daemon=True)
    thread.start()
    assert supervisor.hear() == Stopped()
    ports: list[int] = []
    for number in (0, 0, 1):
        supervisor.say(Open(round=number))
        opened = supervisor.hear()
        assert isinstance(opened, Opened)
        ports.append(opened.port)
        if number == 0:
            client = TCPStore("127.0.0.1", opened.port, is_master=False)
            client.set("left", "over")
            del client
    assert ports[0] == ports[1] != ports[2]
    assert not TCPStore("127.0.0.1", ports[2], is_master=False).check(["left"])
    supervisor.say(START)
    thread.join(20)
    assert not thread.is_alive()
    told = {names.ENV_GENERATION: "3", names.ENV_ROUND: "1", names.ENV_NONCE: "n"}
    assert environment == told


def test_ranks_know_which_checkpoint_must_be_there(ends: tuple[Link, Supervisor]) -> None:
    link, supervisor = ends
    environment: dict[str, str] = {}
    rendezvous = Rendezvous(link, environment)
    for saved, told in ((500, "500"), (0, "0"), (None, None)):
        supervisor.say(START.model_copy(update={"saved_step": saved}))
        rendezvous.next_rendezvous()
        assert environment.get(names.ENV_SAVED_STEP) == told


def test_an_order_to_stop_from_before_a_start_does_not_stop_it(
    ends: tuple[Link, Supervisor],
) -> None:
    link, supervisor = ends
    rendezvous = Rendezvous(link, {})
    supervisor.say(Regroup())
    supervisor.say(START)
    rendezvous.next_rendezvous()
    assert rendezvous.num_nodes_waiting() == 0
    supervisor.say(Regroup())
    assert link.regroup.wait(20)
    assert rendezvous.num_nodes_waiting() == 1
