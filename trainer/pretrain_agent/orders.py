"""What the operator and SIGTERM want, and what ranks are told of it through the board.

A rank knows three wishes: save and go on, save and leave, leave. The difference between a pause and
a drain is what this worker does once its ranks have left: wait for its next generation, or end.
"""

import logging

from pretrain_agent.board import Board
from pretrain_api.wire import Order, Progress

log = logging.getLogger(__name__)

MARGIN_SECONDS = 5.0  # of the grace period, kept for leaving the message and killing what is left


class Orders:
    """The order in force, and when it has to be carried out."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._deadline: float | None = None  # of a drain by SIGTERM, on the monotonic clock
        self._save_from = 0  # a checkpoint of this step or a later one answers an order to save
        self.wanted = Order.NONE  # by the operator; stands when the board's is carried out

    @property
    def terminating(self) -> bool:
        """Whether SIGTERM came. The operator's word doesn't count any more."""
        return self._deadline is not None

    @property
    def leaving(self) -> bool:
        """Whether this worker ends when its ranks have left."""
        return self.terminating or self.wanted in (Order.DRAIN, Order.STOP)

    @property
    def pausing(self) -> bool:
        """Whether this worker stays when its ranks have left, and waits for its next generation."""
        return not self.terminating and self.wanted is Order.PAUSE

    def obey(self, order: Order) -> None:
        """Pass the operator's order on to the ranks. A drain that SIGTERM began is not taken back.

        An order to save that stands is not passed on again.
        """
        if self.terminating:
            return
        if order is not self.wanted:
            log.info("order: %s", order)
            progress = self._board.progress() or Progress()
            self._save_from = max(progress.step, *(beat.step for beat in self._board.beats()))
        if order is not self.wanted or order is not Order.SAVE:
            self._board.order = Order.DRAIN if order is Order.PAUSE else order
        self.wanted = order

    def terminate(self, now: float, grace_seconds: float) -> None:
        """SIGTERM at ``now`` on the monotonic clock: ranks save and leave within the grace."""
        self._deadline = now + grace_seconds - min(MARGIN_SECONDS, grace_seconds / 5)
        self._board.order = Order.DRAIN

    def overdue(self, now: float) -> bool:
        """Whether the grace period is nearly over."""
        return self._deadline is not None and now > self._deadline

    def end_pause(self) -> None:
        """The ranks have left: those of the next generation are not to follow them."""
        self._board.order = Order.NONE

    def end_save(self) -> None:
        """An order to save ends with the save, or ranks that restart would obey it once more.

        Global rank 0 knows, and only its vote to save counts.
        """
        if self._board.order is not Order.SAVE:
            return
        progress = self._board.progress() or Progress()
        if progress.checkpoint is not None and progress.checkpoint.step >= self._save_from:
            self._board.order = Order.NONE
