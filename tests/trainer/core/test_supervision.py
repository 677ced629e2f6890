"""Which orders on the board a rank brings to its peers."""

from pathlib import Path

from pretrain_agent.board import Board
from pretrain_api.wire import Order
from pretrain_trainer.settings import Place
from pretrain_trainer.supervision import Supervision


def test_an_order_is_obeyed_once_and_to_save_by_rank_0_alone(tmp_path: Path) -> None:
    board = Board.create(tmp_path / "board", 2)
    first, second = (
        Supervision(Place(rank=rank, local_rank=rank, board=tmp_path / "board")) for rank in (0, 1)
    )
    obeyed = []
    for order in (Order.SAVE, Order.NONE, Order.SAVE, Order.DRAIN):
        board.order = order
        for _ in range(2):
            obeyed.append((first.new_order(), second.new_order()))
    nothing = (Order.NONE, Order.NONE)
    save, drain = (Order.SAVE, Order.NONE), (Order.DRAIN, Order.DRAIN)
    assert obeyed == [save, nothing, nothing, nothing, save, nothing, drain, nothing]
