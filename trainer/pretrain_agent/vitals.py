"""Signs of life of this worker's ranks, as its supervisor sees them on the board.

The clock of a rank that can't run goes on. When this whole pod was frozen, or the machine was, the
supervisor was too; it notices the gap between two of its looks and doesn't hold it against anybody.
"""

from pretrain_agent import process
from pretrain_agent.board import Beat
from pretrain_agent.hang import Pace, Pulse, Rear, place, suspect
from pretrain_api.wire import Phase

FROZEN_SECONDS = 2.0  # between two looks; a supervisor that can run looks far more often


class Vitals:
    """What the beats of the local ranks say, round by round."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._rear = Rear()
        self._behind: list[int] = [0]  # local ranks
        self._looked: float | None = None
        self._since = 0.0  # ages count from here: the start of the round, or the end of a gap
        self.first_rank = 0
        self.round = 0

    def begin_generation(self) -> None:
        """A world of another size has another pace."""
        self._pace = Pace()

    def begin_round(self, number: int, first_rank: int, now: float) -> None:
        """Ranks start now; the first local one has the global rank ``first_rank``."""
        self.round, self.first_rank, self._since = number, first_rank, now

    def look(self, beats: list[Beat], now: float) -> bool:
        """Note the newest beats; returns whether this process could not run since the last look."""
        gap = 0.0 if self._looked is None else now - self._looked
        self._looked = now
        self._pace.look(beats[0])
        places = {rank: place(beat.phase, beat.step) for rank, beat in enumerate(beats)}
        self._behind = self._rear.look(places, now)
        if gap > FROZEN_SECONDS:
            self._since = now
        return gap > FROZEN_SECONDS

    @property
    def step_seconds(self) -> float | None:
        """The median duration of a step, or None before there was one."""
        return self._pace.step_seconds

    def pulse(self, beats: list[Beat], now: float) -> Pulse:
        """What to tell the leader about ranks that run, after a look at the same ``beats``."""
        tied = [self._one(local_rank, beats[local_rank], now) for local_rank in self._behind]
        return suspect(tied, now - max(self._rear.since, self._since))

    def _one(self, local_rank: int, beat: Beat, now: float) -> Pulse:
        """The place of one rank. Until it reports, it is starting: its process isn't known."""
        found = process.look_up(beat.pid) if beat.pid else None
        unknown = "?" if not beat.pid else ""
        return Pulse(
            round=self.round,
            rank=self.first_rank + local_rank,
            phase=Phase.STARTING if beat.phase is Phase.WAITING else beat.phase,
            step=beat.step,
            age=round(now - max(beat.at, self._since), 3),
            state=unknown if found is None else found.state,
        )
