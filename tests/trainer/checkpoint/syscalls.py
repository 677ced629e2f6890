"""Steps through the system calls of the checkpoint code that change something."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


class Calls:
    """Stands between the checkpoint code and the system calls that change something.

    Args:
        act: called with (number, name, arguments) before every call; what it raises is raised.
    """

    def __init__(self, act: Callable[[int, str, tuple[Any, ...]], None]) -> None:
        self.count = 0
        self.names: list[str] = []
        self.unsynced: dict[int, int] = {}  # inode -> bytes known to be on the disk
        self._act = act
        self._real = {name: getattr(os, name) for name in CALLS}

    @contextmanager
    def watching(self) -> Iterator["Calls"]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._watched(name))
            yield self

    def real(self, name: str, *arguments: Any) -> Any:
        return self._real[name](*arguments)

    def _watched(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return self._real[name](*arguments, **keywords)
            self.count += 1
            self.names.append(name)
            self._act(self.count, name, arguments)
            result = self._real[name](*arguments, **keywords)
            self._note(name, arguments)
            return result

        return call

    def _note(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name not in ("write", "fsync"):
            return
        found = os.fstat(arguments[0])
        if not stat.S_ISREG(found.st_mode):
            return
        if name == "write":
            self.unsynced.setdefault(found.st_ino, 0)
        else:
            self.unsynced.pop(found.st_ino, None)


def only_whole_folders(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a call renames a folder, which some file systems can't."""
    return name == "rename" and Path(arguments[0]).is_dir()
