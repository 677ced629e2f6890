"""How the agents of one generation agree to start the next round together.

A *generation* is one membership of the world, decided by the operator. Within it ranks may be
restarted in place; every such start is a *round*. The leader (the agent of rank 0) keeps one
:class:`Meeting` per generation:

1. an agent whose ranks are stopped says ``Join(round)`` and why they stopped;
2. the first to do so makes the meeting tell everybody else that the running round is ``Over``;
3. when all have joined, the meeting judges the failures: it either asks its own launcher to
   ``Open`` a store for the ranks and then tells everybody to ``Go``, or tells all to ``Leave``.

An agent that was told to pause says ``Paused`` instead of ``Join``: no round starts without it, so
none starts any more in this generation.

Everything said is idempotent, so that an agent whose connection broke just says it again. Because
one place judges, all agents leave with the same verdict: the exit code of the rank that failed
first, wherever it was.

This module is pure: messages in, messages out. Sockets are in :mod:`pretrain_agent.wires`.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, TypeAdapter

from pretrain_agent.hang import SILENT_SECONDS, Hung, Lookout, Pulse
from pretrain_api.wire import ExitCode, Failure, Phase, Wire

MAX_FAILURES = 3  # rank failures without a new step, before the world gives up in place
PEER_LOST = "PeerLost"  # reason of a failure that is only the echo of another rank's
HUNG = "Hung"  # reason of a failure that was found with the whole world in view
PERMANENT = frozenset({ExitCode.CONFIG, ExitCode.DO_NOT_RETRY})


class Hello(Wire):
    """First line of an agent: who it is and that it may speak at all."""

    kind: Literal["hello"] = "hello"
    generation: int
    rank: int
    nonce: str


class Join(Wire):
    """This agent has no running ranks and wants ``round`` to start.

    ``step`` is the newest step its ranks saw in the round before, ``failure`` what stopped them, if
    anything of their own did. ``left`` says that they saved and left on request: peers then do the
    same by themselves and must not be stopped while they are at it.
    """

    kind: Literal["join"] = "join"
    round: int
    step: int = 0
    failure: Failure | None = None
    left: bool = False


class Paused(Wire):
    """This agent has no running ranks and wants none before the next generation.

    ``round`` is the newest one its ranks were in, and ``left`` says that they saved and left it on
    request, as their peers then do by themselves.
    """

    kind: Literal["paused"] = "paused"
    round: int
    left: bool = False


class Opened(Wire):
    """The leader's launcher serves a fresh store for ``round`` on ``port``."""

    kind: Literal["opened"] = "opened"
    round: int
    port: Annotated[int, Field(ge=1, le=65535)]


class Done(Wire):
    """All ranks of this agent trained to the end of ``round``."""

    kind: Literal["done"] = "done"
    round: int


class Open(Wire):
    """To the leader's launcher: serve a fresh store for ``round``."""

    kind: Literal["open"] = "open"
    round: int


class Go(Wire):
    """Start ``round`` now; the ranks' store is on ``port`` of the leader's host."""

    kind: Literal["go"] = "go"
    round: int
    port: int
    failures: int = 0  # without a new step, so far
    last_failure: Failure | None = None


class Over(Wire):
    """Somebody left ``round``, or a rank ``hung`` in it: stop its ranks and join the next."""

    kind: Literal["over"] = "over"
    round: int
    hung: Hung | None = None


class Leave(Wire):
    """Restarting in place does not help: exit with this failure's code."""

    kind: Literal["leave"] = "leave"
    failures: int
    failure: Failure


class Released(Wire):
    """Every agent is done: nobody needs the leader any more."""

    kind: Literal["released"] = "released"


FromAgent = Hello | Join | Paused | Opened | Done | Pulse
FromLeader = Open | Go | Over | Leave | Released
FROM_AGENT: TypeAdapter[FromAgent] = TypeAdapter(Annotated[FromAgent, Field(discriminator="kind")])
FROM_LEADER: TypeAdapter[FromLeader] = TypeAdapter(
    Annotated[FromLeader, Field(discriminator="kind")]
)


class Letter(NamedTuple):
    """A message and the rank of the agent it goes to."""

    rank: int
    message: FromLeader


class Waiting(NamedTuple):
    """The agents that all others wait for, and for how many seconds."""

    agents: tuple[int, ...] = ()
    seconds: float | None = None


class Tally(NamedTuple):
    """Rank failures since the newest step anybody saw, and the last of them."""

    step: int
    failures: int
    failure: Failure | None


def root_cause(failures: list[Failure]) -> Failure | None:
    """The failure to blame: the first that is not the echo of another's.

    A rank that aborts may do so by itself, or because the watchdog of its process group misses a
    peer. It is blamed only if there is nobody else to blame but ranks that lost it.
    """
    return min(failures, key=_echo, default=None)


def _echo(failure: Failure) -> int:
    """How much a failure looks like an echo; of equals, the first is to blame."""
    if failure.reason == HUNG:
        return -1
    if failure.reason == PEER_LOST:
        return 2
    return int(failure.signal == "SIGABRT")


class Meeting:
    """The leader's book about one generation. See the module's docstring for the protocol.

    ``clock`` is a monotonic one, in seconds.
    """

    def __init__(
        self, generation: int, size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self.generation = generation
        self.size = size
        self.round = -1  # the newest round that was started
        self.failures = 0  # without a new step
        self.last_failure: Failure | None = None
        self._best_step = 0
        self._joined: dict[int, Join] = {}  # in order of arrival
        self._first_joined = 0.0  # when the first of them did
        self._hung: Hung | None = None  # in the running round
        self._lookout = Lookout(self.round, clock())
        self._go: Go | None = None
        self._verdict: Leave | None = None
        self._done: set[int] = set()
        self._paused: dict[int, Paused] = {}

    def receive(self, rank: int, message: FromAgent) -> list[Letter]:
        """Answer one message of the agent ``rank``; messages that make no sense get no answer."""
        match message:
            case Hello():
                return self._welcome(rank)
            case Join():
                return self._join(rank, message)
            case Paused():
                return self._pause(rank, message)
            case Opened():
                return self._opened(rank, message)
            case Done():
                return self._finish(rank, message)
            case Pulse():
                self._lookout.hear(rank, message, self._clock())
                return []

    def judge(self, granted: Mapping[Phase, float]) -> list[Letter]:
        """End the running round if a rank hangs in it.

        ``granted`` are the seconds that each phase may last without a sign of life.
        """
        if self._go is None or self._verdict is not None or self._broken():
            return []
        self._hung = self._lookout.verdict(self._working(), granted, self._clock())
        return self._end_round()

    def waiting(self) -> Waiting:
        """Who is missing: for the next round, or in the running one, where they are not heard."""
        now = self._clock()
        if self._verdict is not None:
            return Waiting()
        if self._go is not None and not self._broken():
            silent = {rank: self._lookout.silence(rank, now) for rank in self._working()}
            silent = {rank: gone for rank, gone in silent.items() if gone > SILENT_SECONDS}
            return Waiting(tuple(silent), max(silent.values())) if silent else Waiting()
        missing = tuple(self._others())
        return Waiting(missing, now - self._first_joined) if self._joined and missing else Waiting()

    def start_over(self) -> None:
        """The leader could not run for a while: what it heard before is out of date."""
        self._lookout.start_over(self._clock())

    def _others(self) -> Iterable[int]:
        """Agents that have not said that their ranks stopped."""
        gone = self._joined.keys() | self._paused.keys()
        return [rank for rank in range(self.size) if rank not in gone]

    def _working(self) -> Iterable[int]:
        """Agents whose ranks should be running."""
        return [rank for rank in self._others() if rank not in self._done]

    def _to_all(self, message: FromLeader) -> list[Letter]:
        return [Letter(rank, message) for rank in range(self.size)]

    def _welcome(self, rank: int) -> list[Letter]:
        """Tell an agent that connects again what it may have missed."""
        if self._verdict is not None:
            return [Letter(rank, self._verdict)]
        return self._end_round_of(rank)

    def _join(self, rank: int, join: Join) -> list[Letter]:
        if self._verdict is not None:
            return [Letter(rank, self._verdict)]
        if self._go is not None and join.round == self.round:
            # It missed the start and asks again; others may have left that round meanwhile.
            return [Letter(rank, self._go), *self._end_round_of(rank)]
        if join.round != self.round + 1:
            return []
        if not self._joined:
            self._first_joined = self._clock()
        self._joined.setdefault(rank, join)
        if join.failure is not None and join.failure.exit_code in PERMANENT:
            return self._leave(join.failure)
        if len(self._joined) == self.size:
            return self._judge()
        return self._end_round()

    def _pause(self, rank: int, paused: Paused) -> list[Letter]:
        """This one starts nothing any more; nor need the others, who wait for its ranks."""
        if self._verdict is not None:
            return [Letter(rank, self._verdict)]
        self._joined.pop(rank, None)
        self._paused[rank] = paused
        return self._end_round()

    def _end_round(self) -> list[Letter]:
        """Tell those who may still be in the running round that it is over, if that is so."""
        if self._go is None or not self._broken():
            return []
        over = Over(round=self.round, hung=self._hung)
        return [Letter(rank, over) for rank in self._others()]

    def _end_round_of(self, rank: int) -> list[Letter]:
        """What one agent is told of that."""
        return [letter for letter in self._end_round() if letter.rank == rank]

    def _broken(self) -> bool:
        """Whether a rank hangs in the running round, or left it in another way than by request."""
        if self._hung is not None:
            return True
        joined = any(not join.left for join in self._joined.values())
        paused = any(not (p.left and p.round == self.round) for p in self._paused.values())
        return joined or paused

    def _judge(self) -> list[Letter]:
        """All are here: give up, or have a store opened for the next round."""
        tally = self._tally()
        if tally.failure is not None and tally.failures >= MAX_FAILURES:
            self.failures = tally.failures
            return self._leave(tally.failure)
        return [Letter(0, Open(round=self.round + 1))]

    def _tally(self) -> Tally:
        """The count as it stands with what the joined agents report about the round before."""
        joins = self._joined.values()
        failure = root_cause([join.failure for join in joins if join.failure is not None])
        step = max(join.step for join in joins)
        failures = 0 if step > self._best_step else self.failures
        return Tally(max(step, self._best_step), failures + (failure is not None), failure)

    def _leave(self, failure: Failure) -> list[Letter]:
        self._verdict = Leave(failures=self.failures, failure=failure)
        return self._to_all(self._verdict)

    def _opened(self, rank: int, opened: Opened) -> list[Letter]:
        complete = len(self._joined) == self.size
        if rank != 0 or not complete or opened.round != self.round + 1:
            return []
        tally = self._tally()
        self._best_step, self.failures = tally.step, tally.failures
        self.last_failure = tally.failure or self.last_failure
        self.round = opened.round
        self._joined.clear()
        self._done.clear()
        self._hung = None
        self._lookout = Lookout(self.round, self._clock())
        self._go = Go(
            round=self.round,
            port=opened.port,
            failures=self.failures,
            last_failure=self.last_failure,
        )
        return self._to_all(self._go)

    def _finish(self, rank: int, done: Done) -> list[Letter]:
        if done.round != self.round:
            return []
        self._done.add(rank)
        return self._to_all(Released()) if len(self._done) == self.size else []
