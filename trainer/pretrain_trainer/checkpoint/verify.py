"""Check checkpoints from the command line: ``python -m pretrain_trainer.checkpoint.verify PATH``.

PATH is a root with ``step-N`` folders, or one step folder. Every byte is read and compared with the
manifest; nothing is unpickled and nothing is changed. The exit code is 0 if there is a good
checkpoint.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from . import manifest
from .errors import DamagedError
from .files import Folder
from .loading import reading
from .manifest import Manifest
from .root import steps_in


def verified(path: Path) -> Manifest:
    """The manifest of a step folder all of whose bytes are as promised.

    Raises:
        DamagedError: something is not.
    """
    with reading(), Folder.open(path) as folder:
        promised = manifest.read(folder)
        manifest.verify(folder, promised)
    return promised


def step_folders(path: Path) -> list[Path]:
    """The step folders below a root, newest first; or the path itself where it is one."""
    if (path / manifest.NAME).exists() or (path / manifest.METADATA).exists():
        return [path]
    return [path / f"step-{step}" for step in steps_in(path)] if path.is_dir() else []


def newest_good(path: Path) -> Path:
    """The newest step folder that is wholly good.

    Raises:
        DamagedError: there is none.
    """
    for folder in step_folders(path):
        try:
            verified(folder)
            return folder
        except DamagedError:
            continue
    raise DamagedError(f"{path} has no good checkpoint")


def report(path: Path) -> Iterator[tuple[Path, Manifest | str]]:
    """Every step folder, with its manifest or with what is wrong."""
    for folder in step_folders(path):
        try:
            yield folder, verified(folder)
        except DamagedError as error:
            yield folder, str(error)


def main(arguments: list[str] | None = None) -> int:
    """Print one line for each checkpoint, and the newest good one last."""
    parser = argparse.ArgumentParser(prog="verify", description="Verify all bytes of checkpoints.")
    parser.add_argument("path", type=Path, help="root of step-N folders, or one of them")
    newest = None
    for folder, found in report(parser.parse_args(arguments).path):
        if isinstance(found, str):
            print(f"{folder.name}: bad: {found}")
            continue
        newest = newest or folder
        print(
            f"{folder.name}: good: {found.total_bytes} bytes in {len(found.files)} files, "
            f"generation {found.generation}, world size {found.world_size}"
        )
    print(f"newest good: {newest.name if newest else 'none'}")
    return 0 if newest else 1


if __name__ == "__main__":
    sys.exit(main())
