"""What a supervisor does about ranks that hang: tell the leader, judge as one, take evidence.

The judgement itself is in :mod:`pretrain_agent.hang`. It may take a while, so it is not made in
every turn of the supervisor's loop.
"""

import logging

from pretrain_agent import stacks
from pretrain_agent.board import Beat
from pretrain_agent.evidence import Evidence
from pretrain_agent.hang import Hung, limits
from pretrain_agent.meeting import Waiting
from pretrain_agent.vitals import Vitals
from pretrain_agent.wires import MeetingClient, MeetingServer
from pretrain_api.wire import Failure, HangDeadlines

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0  # between two pulses, and between two judgements


class HangWatch:
    """Watches the local ranks for the leader, and everybody's as the leader."""

    def __init__(self, server: MeetingServer, evidence: Evidence) -> None:
        self._server = server
        self._evidence = evidence
        self._vitals = Vitals()
        self._ticked = 0.0
        self._condemned: tuple[int, int] | None = None  # generation and round that end by a hang
        self.waiting = Waiting()  # for whom, as the leader; read by other threads

    def begin_generation(self) -> None:
        """A new world: how long its steps take is not known yet."""
        self._vitals.begin_generation()

    def begin_round(self, number: int, first_rank: int, now: float) -> None:
        """Ranks are told to start; the first one here has the global rank ``first_rank``."""
        self._vitals.begin_round(number, first_rank, now)

    def look(self, beats: list[Beat], now: float) -> bool:
        """See how the ranks are; returns whether this process could not run since the last look."""
        frozen = self._vitals.look(beats, now)
        if frozen:
            self._server.start_over()
        return frozen

    def tick(
        self,
        beats: list[Beat],
        client: MeetingClient | None,
        deadlines: HangDeadlines | None,
        now: float,
    ) -> None:
        """Tell the leader about ranks that run, through ``client``; judge, if we are the leader."""
        if now - self._ticked < TICK_SECONDS:
            return
        self._ticked = now
        if client is not None:
            client.say(self._vitals.pulse(beats, now))
        self._server.judge(limits(deadlines, self._vitals.step_seconds))
        self.waiting = self._server.waiting()

    def is_news(self, generation: int, number: int) -> bool:
        """Whether the verdict about this round was not heard before; the leader may repeat it."""
        news = self._condemned != (generation, number)
        self._condemned = (generation, number)
        return news

    async def take_evidence(self, hung: Hung, generation: int, session: int) -> Failure | None:
        """Take the stacks of the local ranks, which run in ``session``.

        Returns the failure to report if one of them is the rank that hangs, after about a second.
        """
        log.warning("%s", hung)
        folder = stacks.folder_name(generation, self._vitals.round)
        return await self._evidence.take(hung, folder, self._vitals.first_rank, session)
