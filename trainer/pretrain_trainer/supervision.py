"""The trainer's end of the shared memory between ranks and their supervisor.

A rank says which phase it is in, so that a hang can be seen in the age of what it said last, and
takes orders, so that a save before a shutdown needs no signal. Without an agent there is no board:
nothing is said and nothing ordered.
"""

import time

from pretrain_agent.board import Board
from pretrain_api.wire import Failure, Order, Phase, Progress
from pretrain_trainer.settings import Place

QUIET_SECONDS = 0.5  # between two signs of life in one phase


class Supervision:
    """One rank's line to its supervisor."""

    def __init__(self, place: Place) -> None:
        self._rank = place.rank
        self._local_rank = place.local_rank
        self._board = Board.open(place.board) if place.board else None
        self._obeyed = Order.NONE
        self._where = (Phase.STARTING, 0)
        self._said = -QUIET_SECONDS  # when, on the monotonic clock

    def enter(self, phase: Phase, step: int) -> None:
        """Report where this rank is, after so many finished steps; also a sign of life."""
        self._where, self._said = (phase, step), time.monotonic()
        if self._board:
            self._board.publish(self._local_rank, phase, step)

    def alive(self) -> None:
        """Give a sign of life from within a phase, if the last one was a while ago.

        For the thread that enters phases only: the board has one writer per rank.
        """
        if time.monotonic() - self._said >= QUIET_SECONDS:
            self.enter(*self._where)

    def new_order(self) -> Order:
        """The order in force if it wasn't returned before, else NONE: an order is obeyed once.

        An order to save counts at rank 0 only, whose supervisor withdraws it when it sees the
        checkpoint; elsewhere it stands, and ranks that restart would take it for a new one.
        """
        order = self._board.order if self._board else Order.NONE
        if order == Order.SAVE and self._rank != 0:
            return Order.NONE
        if order == self._obeyed:
            return Order.NONE
        self._obeyed = order
        return order

    def report(self, progress: Progress) -> None:
        """Publish how far training is; only rank 0's word counts."""
        if self._board and self._rank == 0:
            self._board.put_progress(progress)

    def known_progress(self) -> Progress:
        """What an earlier start of this worker published; empty where there was none."""
        known = self._board.progress() if self._board else None
        return known or Progress()

    def last_words(self, exit_code: int, reason: str, message: str) -> None:
        """Say why this rank is about to die."""
        if self._board:
            failure = Failure(rank=self._rank, exit_code=exit_code, reason=reason, message=message)
            self._board.put_failure(self._local_rank, failure)
