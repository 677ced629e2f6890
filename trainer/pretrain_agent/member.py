"""This pod's place in the world: what its ranks should do, given what was heard so far.

A pure state machine between three voices: the assignment (what the operator wants), the leader
(when a round starts and when it is over) and the launcher (whether ranks run). Every method takes
one event and returns what to say to whom; the supervisor says it.

The launcher is believed about ranks, the assignment about membership, the leader about rounds. A
message about a round or generation that isn't the current one is dropped.
"""

from enum import Enum

from pretrain_agent.link import Regroup, Start
from pretrain_agent.meeting import Done, Go, Join, Leave, Open, Opened, Over, Paused, Released
from pretrain_api.wire import Assignment, Failure


class State(Enum):
    """What the launcher is doing, as far as told."""

    WARMING = "warming"  # not ready to start ranks
    STOPPED = "stopped"  # ready, no rank runs
    RUNNING = "running"
    FINISHED = "finished"  # all local ranks returned


Saying = Open | Start | Regroup | Join | Paused | Opened | Done | Leave | Released


def leader_address(assignment: Assignment) -> tuple[str, int]:
    """Host and port of the meeting point; an IPv6 host may be in brackets or not."""
    host, _, port = assignment.leader.rpartition(":")
    return host.strip("[]"), int(port)


class Member:
    """State of this agent within the newest generation it has heard of."""

    def __init__(self) -> None:
        self.assignment: Assignment | None = None
        self.state = State.WARMING
        self.round = -1  # the newest round of this generation that started here
        self.paused = False  # until the next generation
        self.started_rank: int | None = None  # of this agent, when ranks were last started
        self._started_in = 0  # generation of that
        self._report = Join(round=0)

    @property
    def rank(self) -> int | None:
        """Rank of this agent (not of a process), or None without a place in the world."""
        return None if self.assignment is None else self.assignment.rank

    def assign(self, assignment: Assignment) -> list[Saying]:
        """The operator changed its word; only a new generation moves anything here."""
        before, self.assignment = self.assignment, assignment
        if before is not None and before.generation == assignment.generation:
            return []
        self.round = -1
        self.paused = False
        self._report = Join(round=0)
        return [Regroup()] if self.state is State.RUNNING else self._join()

    def stopped(self, step: int, failure: Failure | None, left: bool) -> list[Saying]:
        """The launcher has no running ranks, and this is why; see :class:`Join`."""
        self.state = State.STOPPED
        if self.assignment is not None and self._started_in == self.assignment.generation:
            self._report = Join(round=self.round + 1, step=step, failure=failure, left=left)
        return self._join()

    def pause(self) -> list[Saying]:
        """Start no ranks before the next generation. Running ones are to be stopped first."""
        self.paused = True
        return self._join()

    def opened(self, opened: Opened) -> list[Saying]:
        """Our launcher serves a store: tell the meeting, if that is still wanted."""
        return [opened] if self._awaits(opened.round) else []

    def finished(self) -> list[Saying]:
        """All local ranks returned."""
        self.state = State.FINISHED
        return [Done(round=self.round)]

    def hear(self, message: Open | Go | Over | Leave | Released) -> list[Saying]:
        """The leader spoke."""
        match message:
            case Open() if self._awaits(message.round):
                return [message]
            case Go() if self._awaits(message.round):
                return self._start(message)
            case Over() if message.round == self.round and self.state is State.RUNNING:
                return [Regroup()]
            case Over() if message.round == self.round and self.state is State.FINISHED:
                return [Released()]  # a peer failed after we were done; it can do without us
            case Leave() | Released():
                return [message]
            case _:
                return []

    def _awaits(self, number: int) -> bool:
        """Whether round ``number`` is the one we asked for."""
        ready = self.state is State.STOPPED and not self.paused
        return self.rank is not None and ready and number == self.round + 1

    def _join(self) -> list[Saying]:
        """Ask for the next round, if there is a place for us and no rank runs."""
        if self.rank is None or self.state is not State.STOPPED:
            return []
        if self.paused:
            return [Paused(round=self.round, left=self._report.left)]
        return [self._report]

    def _start(self, go: Go) -> list[Saying]:
        assignment = self.assignment
        if assignment is None or assignment.rank is None:
            return []
        self.state = State.RUNNING
        self.round = go.round
        self.started_rank = assignment.rank
        self._started_in = assignment.generation
        start = Start(
            generation=assignment.generation,
            round=go.round,
            rank=assignment.rank,
            size=assignment.size,
            host=leader_address(assignment)[0],
            port=go.port,
            nonce=assignment.nonce,
            saved_step=assignment.saved_step,
        )
        return [start]
