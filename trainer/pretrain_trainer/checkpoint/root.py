"""The folder that holds all checkpoints of one job, and who may change it.

::

    root.json                          whose root this is
    .fence-g3-r0-5d1c9e0b              the claim of generation 3, round 0
    .saving-step-30-g3-r0-5d1c9e0b-7f  a save that was not committed (yet)
    step-20/                           a checkpoint

**The fence.** A claim is an empty file; its name says it all, so it can't be torn. A generation
creates its claim, and only then lists the others: it yields to a newer one and takes away older
ones. Two generations that start at the same time each create before they list, so at least the
older one sees the other. From then on a process may commit or delete only while its own claim is
still there and no newer one is. The check opens the own claim, because opening is what makes shared
file systems ask their server again; a claim that was taken away stays away even where listings are
stale.

Between that check and the rename it allows a process may be stopped for hours. So renames don't
rely on the check alone. A commit renames a folder that the newer generation deletes when it enters:
then there is nothing left to rename. A deletion first takes the checkpoint's name away, then checks
again, and gives the name back if the root has changed hands meanwhile. What remains, on a file
system whose clients agree, is a process that is stopped between those two renames, usually tens of
microseconds and at worst some milliseconds: it leaves one old, dispensable checkpoint without its
name until it wakes up, or for good if the newer generation clears up meanwhile. Where clients
disagree for a while about what is in a folder, a writer stopped before its commit may still add its
checkpoint: complete, valid, and of a step the newer generation computes too.

**The owner.** root.json is written at first use. A root of another job is refused, because mixing
two jobs' checkpoints would resume one from the other. So is a root that has checkpoints but no
root.json, which somebody else's trainer wrote.
"""

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Final

from pretrain_trainer.errors import REPLACED

from . import manifest
from .errors import CheckpointConfigError, CheckpointError, DamagedError, FencedError
from .files import Folder, sync_folder, write_durably

logger = logging.getLogger(__name__)

OWNER: Final = "root.json"

_STEP = re.compile(r"\Astep-(0|[1-9][0-9]{0,17})\Z")
_CLAIM = re.compile(r"\A\.fence-g([0-9]{1,18})-r([0-9]{1,18})-([0-9a-f]{8})\Z")
_LEFTOVER = re.compile(r"\A\.(saving|deleting)-step-[0-9]+-g([0-9]{1,18})-r([0-9]{1,18})-")
_LISTING_LIMIT = 100_000  # names; a root with more of them is not one of ours


@dataclass(frozen=True)
class Identity:
    """Who saves and loads.

    Args:
        job_uid: the PretrainJob's UID; empty for runs without a cluster.
        generation: of the world's membership; grows with every change.
        nonce: the generation's secret; a digest of it tells two runs of the same number apart.
        fingerprint: what a checkpoint must have been made with and tensors don't show, such as
            ``model.rope_theta`` or ``tokenizer``; stored in every manifest and compared on load,
            unless the section before the dot is excluded from loading.
        round: restarts in place within the generation.
    """

    job_uid: str = ""
    generation: int = 0
    nonce: str = ""
    fingerprint: dict[str, str] = field(default_factory=dict)
    round: int = 0

    @property
    def token(self) -> str:
        """Eight hex digits that stand for the nonce without giving it away."""
        return blake2b(self.nonce.encode(), digest_size=4).hexdigest()

    @property
    def tag(self) -> str:
        """What names of files and folders carry."""
        return f"g{self.generation}-r{self.round}-{self.token}"


class Root:
    """The one process (rank 0) that changes the root. Paths are plain; nothing is kept open."""

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path = path
        self._identity = identity
        self._claim = path / f".fence-{identity.tag}"
        self._age = (identity.generation, identity.round)

    def step(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.path / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps that have a folder of their name, newest first; not necessarily good ones."""
        return steps_in(self.path)

    def enter(self) -> None:
        """Claim the root for this generation, and clear away what older ones left unfinished.

        Raises:
            CheckpointConfigError: the root is another job's.
            FencedError: a newer generation holds it.
            OSError: it can't be read or written.
        """
        os.makedirs(self.path, exist_ok=True)
        self._own()
        if not self._claim.exists():
            os.close(os.open(self._claim, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644))
            sync_folder(self.path)
        for name, age in self._claims():
            if age > self._age:
                self._claim.unlink(missing_ok=True)
                raise FencedError(self._sentence(age))
            if name != self._claim.name:
                (self.path / name).unlink(missing_ok=True)
        self.check()
        self.clear_leftovers()

    def check(self) -> None:
        """Make sure that this generation still holds the root.

        Raises:
            CheckpointConfigError: another job took the root.
            FencedError: a newer generation holds it.
            OSError: the storage doesn't say.
        """
        self._compare_owner()
        for _, age in self._claims():
            if age > self._age:
                raise FencedError(self._sentence(age))
        try:
            os.close(os.open(self._claim, os.O_RDONLY | os.O_NOFOLLOW))
        except FileNotFoundError:
            raise FencedError(self._sentence(None)) from None

    def begin(self, step: int) -> Path:
        """Create the folder of an unfinished save.

        Raises:
            CheckpointConfigError, FencedError: this process may not commit; the newer generation
                needs the space that a save would take.
            OSError: the file system refused.
        """
        self.check()
        folder = self._aside("saving", step)
        os.mkdir(folder)
        return folder

    def commit(self, folder: Path, step: int) -> None:
        """Give a finished folder, manifest included, its real name; never replace another one.

        Raises:
            CheckpointConfigError, FencedError: this process may not commit.
            OSError: the file system refused.
        """
        sync_folder(folder)
        self.check()
        target = self.step(step)
        if target.is_symlink() or target.exists():
            raise FileExistsError(f"{target.name} appeared while it was being saved")
        try:
            os.rename(folder, target)
        except FileNotFoundError:
            raise  # a newer generation has cleared it away
        except OSError:
            if target.exists():
                raise
            self._move_files(folder, target)
        sync_folder(self.path)

    def remove(self, step: int) -> None:
        """Delete the checkpoint of a step: it first loses its name, then its content.

        Raises:
            CheckpointConfigError, FencedError: this process may not delete.
            OSError: the file system refused.
        """
        self.check()
        doomed = self._aside("deleting", step)
        os.rename(self.step(step), doomed)
        try:
            self.check()  # again: nobody may have come who counts on this checkpoint
        except (CheckpointError, OSError):
            os.rename(doomed, self.step(step))
            raise
        _delete(doomed)
        sync_folder(self.path)

    def discard(self, folder: Path) -> None:
        """Delete the folder of an unfinished save, as far as a failing disk lets us."""
        shutil.rmtree(folder, ignore_errors=True)

    def clear_leftovers(self) -> None:
        """Delete unfinished saves and deletions of this and of older generations.

        Called only while no save of this process is under way. An unfinished save has to go, or its
        maker could commit it; a deletion that can't be finished now can be later.

        Raises:
            CheckpointConfigError, FencedError: this process may not delete.
            OSError: the file system refused.
        """
        self.check()
        self.finish_deletions()
        for name in self._leftovers("saving"):
            with suppress(FileNotFoundError):  # its maker renames it just now
                _delete(self.path / name)

    def finish_deletions(self) -> None:
        """Delete what has lost its name and is still there, as far as storage lets us."""
        for name in self._leftovers("deleting"):
            try:
                _delete(self.path / name)
            except OSError as error:
                logger.warning("%s could not be deleted: %s", name, error)

    def _leftovers(self, verb: str) -> list[str]:
        """Folders of saves or deletions that this or older generations have begun."""
        found = ((entry, _LEFTOVER.match(entry.name)) for entry in _entries(self.path))
        return [
            entry.name
            for entry, match in found
            if match
            and match[1] == verb
            and (int(match[2]), int(match[3])) <= self._age
            and entry.is_dir(follow_symlinks=False)
        ]

    def _aside(self, verb: str, step: int) -> Path:
        unique = secrets.token_hex(4)
        return self.path / f".{verb}-step-{step}-{self._identity.tag}-{unique}"

    def _move_files(self, folder: Path, target: Path) -> None:
        """Rename for file systems that can't rename folders: file by file, the manifest last."""
        os.mkdir(target)
        names = sorted(os.listdir(folder), key=lambda name: (name == manifest.NAME, name))
        for name in names:
            if name == manifest.NAME:
                sync_folder(target)
            os.rename(folder / name, target / name)
        sync_folder(target)
        os.rmdir(folder)

    def _claims(self) -> list[tuple[str, tuple[int, int]]]:
        matches = [_CLAIM.match(entry.name) for entry in _entries(self.path)]
        return [(match[0], (int(match[1]), int(match[2]))) for match in matches if match]

    def _sentence(self, age: tuple[int, int] | None) -> str:
        holder = "another run" if age is None else f"generation {age[0]} (round {age[1]})"
        return (
            f"{holder} has taken over {self.path}: this worker, of generation "
            f"{self._identity.generation}, saves and deletes nothing any more"
        )

    def _own(self) -> None:
        """Write root.json if the root is new."""
        if not (self.path / OWNER).exists():
            strangers = self.steps()
            if strangers:
                raise CheckpointConfigError(
                    f"{self.path} has checkpoints (such as step-{strangers[0]}) but no {OWNER}, so "
                    f"this job didn't write them: {_adopt(self.step(strangers[0]))}"
                )
            content = {"job_uid": self._identity.job_uid, "version": 1}
            write_durably(self.path / OWNER, json.dumps(content).encode())
        self._compare_owner()

    def _compare_owner(self) -> None:
        """Make sure that root.json names this job.

        Raises:
            CheckpointConfigError: it doesn't, or it is no such file.
            OSError: it can't be read now.
        """
        try:
            with Folder.open(self.path) as folder:
                content = json.loads(folder.small_file(OWNER, 1 << 16))
            owner = content["job_uid"]
        except (DamagedError, ValueError, KeyError, TypeError) as error:
            if isinstance(trouble := error.__cause__, OSError) and trouble.errno not in REPLACED:
                raise trouble from error  # of the storage; it says nothing about the content
            raise CheckpointConfigError(
                f"{self.path / OWNER} can't be read ({error}): if the checkpoints beside it are "
                f'this job\'s, write {{"job_uid": "{self._identity.job_uid}"}} into it'
            ) from error
        if owner != self._identity.job_uid:
            steps = self.steps()
            advice = _adopt(self.step(steps[0] if steps else 0))
            raise CheckpointConfigError(
                f"{self.path} belongs to another job (its UID is {owner!r}, this job's is "
                f"{self._identity.job_uid!r}): {advice}"
            )


def steps_in(path: Path) -> list[int]:
    """Steps that have a folder of their name, newest first. Symbolic links don't count.

    Raises:
        CheckpointConfigError: the folder is too full to be a root of checkpoints.
    """
    folders = (each for each in _entries(path) if each.is_dir(follow_symlinks=False))
    matches = [_STEP.match(each.name) for each in folders]
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def _entries(path: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        for count, entry in enumerate(entries):
            if count == _LISTING_LIMIT:
                raise CheckpointConfigError(
                    f"{path} has more than {_LISTING_LIMIT} entries: "
                    "choose an empty folder with checkpoint.folder"
                )
            yield entry


def _adopt(example: Path) -> str:
    return (
        "to start from one of its checkpoints set checkpoint.initial_load_path (initialLoadPath in "
        f"a PretrainJob) to {example} and checkpoint.folder to a new folder"
    )


def _delete(folder: Path) -> None:
    """Remove a folder, its manifest first: a half-deleted checkpoint must not look whole."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
        return
    (folder / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)
