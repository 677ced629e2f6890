"""Which rank hangs: a judgement with the whole world in view, over signs of life.

Ranks train in lockstep, so when one stands still, all of them soon do: the others wait for it in a
collective, and their last sign of life gets as old as its. Only a rank that nobody is behind can be
to blame. So every agent tells the leader about its local rank that is furthest behind (a
:class:`Pulse`), and the leader judges that one of them which is furthest behind of all, by the
deadline of the phase that this rank is in. One rank that waits for data, or writes a large part of
a checkpoint, has the time for that, however short a step is.

Of ranks at the same place none is behind, and a sign of life of one of them counts for all. Time
that a rank spent waiting is not held against it once the others have caught up and passed: only
since the same ranks have been furthest behind, at the same place, does the time count.

What can't be seen is not judged: an agent that says nothing may have the rank that all wait for.

This module is pure: the time comes in as an argument.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Literal

from pretrain_agent.board import Beat
from pretrain_api.wire import HangDeadlines, Phase, Wire

SILENT_SECONDS = 5.0  # without a pulse of an agent, five times the usual: it is not heard any more
STEP_FLOOR = 60.0  # seconds; the least deadline of a step
STEP_FACTOR = 10  # times the median step
MEDIAN_OF = 101  # steps
DEFAULT_SECONDS: Mapping[Phase, float] = {
    Phase.STARTING: 600,
    Phase.LOAD: 1800,
    Phase.FIRST_STEP: 1800,
    Phase.DATA: 1800,
    Phase.EVAL: 1800,
    Phase.SAVE: 1800,
}
# How far a rank is that has completed as many steps as the others.
WITHIN_STEP = {Phase.SAVE: 0, Phase.EVAL: 1, Phase.DATA: 2, Phase.FIRST_STEP: 3, Phase.STEP: 3}
STOPPED = ("T", "t")
STATES = {
    "": "the process is gone",
    "D": "the process is in uninterruptible sleep (state D)",
    "T": "the process is stopped (state T)",
    "t": "the process is stopped by a debugger (state t)",
    "Z": "the process has ended (state Z)",
}


class Pulse(Wire):
    """Where the slowest local rank of an agent is, and how long ago it last said so."""

    kind: Literal["pulse"] = "pulse"
    round: int
    rank: int  # global
    phase: Phase
    step: int  # completed
    age: float  # seconds since the last sign of life, or since it is furthest behind here
    state: str = "?"  # of the process, a letter as in ps(1); empty when it is gone

    @property
    def where(self) -> tuple[Phase, int]:
        """Phase and step."""
        return self.phase, self.step


class Hung(Wire):
    """The verdict: this rank gave no sign of life for ``seconds``, and ``limit`` were granted."""

    rank: int  # global
    phase: Phase
    step: int  # completed
    seconds: float
    limit: float
    state: str = "?"  # as in Pulse

    def __str__(self) -> str:
        said = f"rank {self.rank}: no sign of life for {self.seconds:.0f} s in phase {self.phase} "
        said += f"after step {self.step} (limit {self.limit:.0f} s)"
        return f"{said}; {STATES[self.state]}" if self.state in STATES else said


def limits(deadlines: HangDeadlines | None, step_seconds: float | None) -> dict[Phase, float]:
    """Seconds without a sign of life that each phase is granted.

    ``step_seconds`` is the median of a step; as long as none is known, a step may take as long as a
    first one.
    """
    asked = deadlines or HangDeadlines()
    given = {
        Phase.STARTING: asked.starting,
        Phase.LOAD: asked.load,
        Phase.FIRST_STEP: asked.first_step,
        Phase.DATA: asked.data,
        Phase.SAVE: asked.save,
    }
    found = {phase: given.get(phase) or usual for phase, usual in DEFAULT_SECONDS.items()}
    usual = found[Phase.FIRST_STEP]
    if step_seconds is not None:
        usual = max(STEP_FLOOR, STEP_FACTOR * step_seconds)
    return {**found, Phase.STEP: asked.step or usual}


Place = tuple[int, int, int]


def place(phase: Phase, step: int) -> Place:
    """How far a rank is; smaller is further behind."""
    match phase:
        case Phase.WAITING | Phase.STARTING:
            return (0, 0, 0)
        case Phase.LOAD:
            return (1, 0, 0)
        case Phase.DONE:
            return (3, 0, 0)
        case _:
            return (2, step, WITHIN_STEP[phase])


class Rear:
    """Who is furthest behind, and since when it is they and no others."""

    def __init__(self) -> None:
        self._who: tuple[Place, frozenset[int]] | None = None
        self.since = 0.0

    def look(self, places: Mapping[int, Place], now: float) -> list[int]:
        """Those furthest behind of all; several when they are at the same place."""
        last = min(places.values())
        tied = [key for key, found in places.items() if found == last]
        if (last, frozenset(tied)) != self._who:
            self._who, self.since = (last, frozenset(tied)), now
        return tied


def suspect(pulses: Iterable[Pulse], age: float) -> Pulse:
    """Of several at the same place, the one to name: a process that can't run, or the quietest.

    Its age becomes that of the youngest, and at most ``age``.
    """
    tied = list(pulses)
    named = max(tied, key=lambda pulse: (pulse.state in STATES, pulse.age, -pulse.rank))
    youngest = min(pulse.age for pulse in tied)
    return named.model_copy(update={"age": round(min(age, youngest), 3)})


def time_of(pulse: Pulse, granted: Mapping[Phase, float]) -> float:
    """Seconds that a rank is granted. One that is stopped gets no further in any phase."""
    usual = granted[pulse.phase]
    return min(usual, granted[Phase.STEP]) if pulse.state in STOPPED else usual


class Pace:
    """How long a step takes, from the beats of one rank looked at again and again."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=MEDIAN_OF)
        self._last: Beat | None = None

    def look(self, beat: Beat) -> None:
        """Note the newest beat. A first step, with whatever it compiles, is not typical."""
        if beat.phase not in (Phase.DATA, Phase.STEP, Phase.EVAL, Phase.SAVE):
            self._last = None
        elif self._last is None or beat.step < self._last.step:
            self._last = beat
        elif beat.step > self._last.step:
            self._seconds.append((beat.at - self._last.at) / (beat.step - self._last.step))
            self._last = beat

    @property
    def step_seconds(self) -> float | None:
        """The median of the newest steps, or None without any."""
        return statistics.median(self._seconds) if self._seconds else None


class Lookout:
    """What the leader has heard of the agents in one round."""

    def __init__(self, number: int, now: float) -> None:
        self.round = number
        self._since = now
        self._pulses: dict[int, tuple[Pulse, float]] = {}
        self._rear = Rear()

    def hear(self, agent: int, pulse: Pulse, now: float) -> None:
        """Note a pulse; one of another round says nothing about this one."""
        if pulse.round == self.round:
            self._pulses[agent] = (pulse, now)

    def start_over(self, now: float) -> None:
        """Forget all, after a time in which nothing could be heard."""
        self._pulses.clear()
        self._rear = Rear()
        self._since = now

    def silence(self, agent: int, now: float) -> float:
        """Seconds since the last pulse of an agent, or since its first one could have come."""
        heard = self._pulses[agent][1] if agent in self._pulses else self._since
        return now - heard

    def verdict(
        self, agents: Iterable[int], granted: Mapping[Phase, float], now: float
    ) -> Hung | None:
        """Who of these agents' ranks hangs, if anybody does and all were heard lately.

        To be asked again and again, because it depends on how long things have been as they are.
        """
        known = [agent for agent in agents if self.silence(agent, now) <= SILENT_SECONDS]
        if not known or known != list(agents) or not self._pulses.keys() >= set(known):
            return None
        places = {agent: place(*self._pulses[agent][0].where) for agent in known}
        tied = self._rear.look(places, now)
        if any(self._pulses[agent][1] <= self._rear.since for agent in tied):
            return None  # they may have got further since they said so
        # Ages as they were said: what happened since then isn't known.
        named = suspect((self._pulses[agent][0] for agent in tied), now - self._rear.since)
        if named.phase is Phase.DONE or named.age <= (limit := time_of(named, granted)):
            return None
        return Hung(
            rank=named.rank,
            phase=named.phase,
            step=named.step,
            seconds=named.age,
            limit=limit,
            state=named.state,
        )
