"""What is taken down about a rank that hangs, before it is killed."""

from collections.abc import Mapping
from pathlib import Path

from pretrain_agent import stacks
from pretrain_agent.board import Board
from pretrain_agent.hang import Hung
from pretrain_agent.logs import LogPump
from pretrain_agent.meeting import HUNG
from pretrain_agent.stacks import Keeper
from pretrain_api.wire import Failure

FAILED = 1  # exit code of a worker that gives up because of ranks that hang


class Evidence:
    """Takes the stacks of the local ranks, shows them in the log and keeps them on the volume."""

    def __init__(self, directory: Path, board: Board, pump: LogPump, output: Path | None) -> None:
        """``directory`` is where ranks write, ``output`` the run's folder, if it is known."""
        self._directory = directory
        self._board = board
        self._pump = pump
        self._keeper = Keeper(output)

    async def take(self, hung: Hung, folder: str, first_rank: int, session: int) -> Failure | None:
        """Take the stacks of all local ranks, the first of which has the rank ``first_rank``.

        Returns the failure to report if the rank that hangs is one of them, after about a second at
        the latest; ``folder`` is where the stacks will be, and ``session`` where the ranks are.
        """
        taken = await stacks.take(self._directory, self._board.beats(), session)
        headed = {
            local: f"stacks of rank {first_rank + local}; {hung}\n{text}"
            for local, text in taken.items()
        }
        self._keeper.keep(
            folder,
            {first_rank + local: text for local, text in headed.items()},
            lambda: self._show(headed),
        )
        local = hung.rank - first_rank
        if local not in taken:
            return None
        where = "in the log" if self._keeper.output is None else f"in {folder}"
        message = f"{hung}; all stacks are {where}\n{stacks.innermost(taken[local])}"
        return Failure(rank=hung.rank, exit_code=FAILED, reason=HUNG, message=message)

    def _show(self, texts: Mapping[int, str]) -> None:
        for local, text in texts.items():
            self._pump.insert(local, text)

    def close(self) -> None:
        """Give what is being written a last moment."""
        self._keeper.close()
