"""When the ranks of this worker passed which stage of their newest start.

Times are taken where they are known best: what the supervisor does from its clock, what ranks do
from their beats. A beat is looked at every 50 ms, so a stage shorter than that may be seen only in
its end.
"""

import logging
import time

from pretrain_agent.board import Beat
from pretrain_api.wire import Phase, Timeline

log = logging.getLogger(__name__)

BEFORE_LOAD = (Phase.WAITING, Phase.STARTING)


class Stages:
    """The newest timeline. Arguments called ``now`` are on the monotonic clock."""

    def __init__(self) -> None:
        self.newest: Timeline | None = None  # read by other threads, so replaced as a whole
        self.restart_seconds: float | None = None  # of the last restart after a failure
        self._stopped: float | None = None  # monotonic, if by a failure
        self._steps: dict[int, int] = {}  # that each local rank had completed at its first beat
        self._seen: dict[str, dict[int, float]] = {}

    def stopped(self, now: float, *, failed: bool) -> None:
        """Ranks were found dead, as ``failed`` says, or are told to stop."""
        self.newest = Timeline(stopped=_epoch(now))
        self._seen = {}
        self._stopped = now if failed else None

    def joined(self, generation: int, number: int, now: float) -> None:
        """No rank runs any more, and this agent asks for a round."""
        before = self.newest if self.newest and self.newest.started is None else Timeline()
        self.newest = before.model_copy(
            update={"generation": generation, "round": number, "joined": _epoch(now)}
        )

    def started(self, generation: int, number: int, now: float) -> None:
        """Ranks are told to start."""
        before = self.newest if self.newest and self.newest.started is None else Timeline()
        self.newest = before.model_copy(
            update={"generation": generation, "round": number, "started": _epoch(now)}
        )
        self._steps.clear()
        self._seen = {"load": {}, "first_step": {}, "trained": {}}

    def look(self, beats: list[Beat]) -> None:
        """Note the stages that local ranks have reached; the slowest one counts."""
        if self.newest is None or self.newest.trained is not None or not self._seen:
            return
        self._time_restart(beats)
        for local_rank, beat in enumerate(beats):
            for stage in self._reached(local_rank, beat):
                self._seen[stage].setdefault(local_rank, beat.at)
        passed = {
            stage: _epoch(max(times.values()))
            for stage, times in self._seen.items()
            if len(times) == len(beats) and getattr(self.newest, stage) is None
        }
        if passed:
            self.newest = self.newest.model_copy(update=passed)

    def _reached(self, local_rank: int, beat: Beat) -> list[str]:
        if beat.phase in BEFORE_LOAD:
            return []
        if beat.phase is Phase.LOAD:
            return ["load"]
        first = self._steps.setdefault(local_rank, beat.step)
        trained = beat.step > first or beat.phase in (Phase.SAVE, Phase.EVAL, Phase.DONE)
        return ["first_step", "trained"] if trained else ["first_step"]

    def _time_restart(self, beats: list[Beat]) -> None:
        """Note how long a restart in place took, once every rank runs again."""
        if self._stopped is not None and all(beat.phase is not Phase.WAITING for beat in beats):
            self.restart_seconds = max(beat.at for beat in beats) - self._stopped
            log.info("all ranks run again after %.2f s", self.restart_seconds)
            self._stopped = None


def _epoch(monotonic: float) -> float:
    """A moment of the monotonic clock in seconds since the epoch."""
    return round(time.time() - time.monotonic() + monotonic, 3)
