"""How fast checkpoints are on this storage: ``python -m pretrain_trainer.checkpoint.bench FOLDER``.

Saves and loads a state and compares with the plainest that the storage can do: one file written
front to back and synced, and read front to back past the kernel's cache. One process and one file;
real jobs have as many of both as ranks.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pretrain_api.config import Checkpoint

from .files import CHUNK_BYTES
from .manager import CheckpointManager
from .root import Identity

_TENSOR_BYTES = 32 << 20  # about a weight matrix of an 8B model on 8 ranks


def measure(folder: Path, count: int) -> dict[str, float]:
    """MB/s at which ``count`` tensors of 32 MiB move; all in a new folder that is removed."""
    state = {"model": {str(i): torch.randn(_TENSOR_BYTES // 4) for i in range(count)}}
    section = Checkpoint(enable=True)
    saver = CheckpointManager(folder / "checkpoint", section, Identity(generation=1))
    loader = CheckpointManager(folder / "checkpoint", section, Identity(generation=2))
    raw = folder / "raw"
    ways: dict[str, Callable[[], object]] = {
        "raw write and sync": lambda: _write(raw, state["model"]),
        "save, commit and read back": lambda: saver.save(1, state),
        "raw read": lambda: _read(raw),
        "verified load": lambda: (_forget(folder / "checkpoint/step-1"), loader.load(state)),
    }
    return {name: count * _TENSOR_BYTES / 1e6 / _seconds(way) for name, way in ways.items()}


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with open(path, "wb", buffering=0) as file:
        for tensor in tensors.values():
            file.write(tensor.view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    _forget(path.parent)
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(CHUNK_BYTES)
        while file.readinto(buffer):
            pass


def _forget(folder: Path) -> None:
    """Let the kernel drop what it has cached of the folder's files."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(way: Callable[[], object]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def main(arguments: list[str] | None = None) -> int:
    """Print MB/s of each way."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure checkpoint speed.")
    parser.add_argument("folder", type=Path, help="a folder on the storage in question")
    parser.add_argument("--tensors", type=int, default=32, help="of 32 MiB each (default: 32)")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=options.folder))
    try:
        for name, speed in measure(folder, options.tensors).items():
            print(f"{name:<27}{speed:8.0f} MB/s")
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
