"""Saving, reading back, loading and deleting give a sign of life for every bounded piece."""

from pathlib import Path

import pytest
import torch

from pretrain_api.config import Checkpoint
from pretrain_trainer.checkpoint.manager import CheckpointManager
from pretrain_trainer.checkpoint.root import Identity

CHUNK = 512  # bytes
CHUNKS = 20  # at least so many are in the state


@pytest.fixture
def signs(tmp_path: Path) -> list[str]:
    return []


@pytest.fixture
def manager(tmp_path: Path, signs: list[str]) -> CheckpointManager:
    config = Checkpoint(enable=True, keep_latest_k=2)
    return CheckpointManager(
        tmp_path, config, Identity(), alive=lambda: signs.append("alive"), chunk_bytes=CHUNK
    )


def state() -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"weight": torch.zeros(CHUNKS * CHUNK // 4)}}


def test_every_chunk_written_and_read_back_is_a_sign(
    manager: CheckpointManager, signs: list[str]
) -> None:
    manager.save(1, state())
    assert len(signs) > 2 * CHUNKS


def test_every_chunk_loaded_is_a_sign(
    manager: CheckpointManager, signs: list[str], tmp_path: Path
) -> None:
    manager.save(1, state())
    signs.clear()
    manager.load(state())
    assert len(signs) > CHUNKS


def test_every_checkpoint_deleted_is_a_sign(manager: CheckpointManager, signs: list[str]) -> None:
    for step in (1, 2, 3, 4):
        manager.save(step, state())
    signs.clear()
    assert manager.prune() == [2, 1]
    assert len(signs) == 2
