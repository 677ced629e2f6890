"""Save, load and prune the checkpoints of a job. A checkpoint is there or it is not.

**How a save becomes a checkpoint** (:mod:`.saving`)

1. Rank 0 creates a folder whose name nobody else can have:
   ``.saving-step-30-g3-r0-<token>-<random>``.
2. Every rank writes its parts into a file of its own in there, digests what it writes, and syncs
   the file. Digests go to rank 0 as JSON.
3. Rank 0 writes ``.metadata`` (torch's table of contents) and then ``manifest.json``, which lists
   all files and digests: written beside, synced, renamed.
4. Rank 0 syncs the folder, checks the fence (:mod:`.root`), renames the folder to ``step-30``, and
   syncs the root.
5. All ranks read back a share of the chunks, from the storage rather than from the kernel's cache.
   Only now older checkpoints may go.

**Why there is always the old or the new checkpoint, and never neither**

A reader takes a folder for a checkpoint only if it is called ``step-N``, has a manifest that
matches its own digest, and every chunk it reads matches the manifest. Until step 4 nothing is
called ``step-30``. Where renaming a folder is atomic, step 4 shows all of it at once: contents and
names inside were synced before. Where it isn't (file systems that copy, or that move files one by
one, in any order), the states between are folders with some files missing or cut; the manifest is
missing or names a file that isn't whole, so the reader skips them, and the rename ends in the state
in which nothing is missing. Where folders can't be renamed at all we move the files ourselves,
manifest last. Atomicity thus comes from the check and not from the file system. The old checkpoint
isn't touched in steps 1 to 5: pruning needs the new one read back and keeps at least one more, and
a good ``step-N`` is never replaced. A deleted checkpoint loses its name first and its manifest
next.

**Trade-offs.** Saves are synchronous, and reading back costs about as much time as writing. Each
rank writes one file. Every chunk that is used is verified in the process that uses it; parts of a
checkpoint that nobody asked for (``checkpoint.exclude_from_loading``) are not read on load.
"""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain_api.config import Checkpoint
from pretrain_api.wire import CheckpointReport, SkippedCheckpoint
from pretrain_trainer.alive import Alive, unwatched

from . import loading, manifest, planning
from .errors import (
    CheckpointConfigError,
    DamagedError,
    NothingGoodError,
    SaveFailedError,
    UncommittedError,
    UnreadableError,
    VanishedError,
)
from .files import CHUNK_BYTES, Folder
from .manifest import Manifest
from .peers import Peers
from .root import Identity, Root
from .saving import Save

logger = logging.getLogger(__name__)

MODEL = "model"  # the section of the state that holds the weights


@dataclass(frozen=True)
class LoadReport:
    """What a start began from.

    Attributes:
        step: of the checkpoint that was loaded; None where training starts afresh.
        skipped: newer ones that were passed over, newest first.
        complete: the checkpoint holds only weights, as one that was saved after the last step
            does: training had ended. Only the model was filled from it; where newer ones were
            skipped, other sections may hold parts of those.
        initial: checkpoint.initial_load_path, if that was loaded instead.
    """

    step: int | None
    skipped: tuple[SkippedCheckpoint, ...] = ()
    complete: bool = False
    initial: Path | None = None


class CheckpointManager:
    """The checkpoints below one root. All methods are collective: every rank calls them alike.

    Args:
        root: folder of the ``step-N`` folders, shared by all ranks.
        config: the run's ``checkpoint`` section.
        identity: who this is; see :class:`Identity`.
        group: ranks that save together, with a gloo backend; None is a world of one.
        alive: called by each rank whenever its reading, writing or deleting gets on.
        recovering: this start goes on from where the run was, which is its newest checkpoint as a
            whole. checkpoint.load_step and, of the run's own checkpoints, exclude_from_loading are
            about a beginning: they are ignored. A run that has no checkpoint yet begins again.
        began: the generation in which a run begins that finds checkpoints of earlier runs in its
            root; None where a root belongs to one run. Until this generation has committed a
            checkpoint, a recovery is as good as a beginning.
        saved_step: the run has committed a checkpoint of this step, as rank 0 knows; so a root
            without any has lost what was in it.
        chunk_bytes: how much one digest covers.
    """

    def __init__(
        self,
        root: Path,
        config: Checkpoint,
        identity: Identity,
        group: dist.ProcessGroup | None = None,
        *,
        alive: Alive = unwatched,
        recovering: bool = False,
        began: int | None = None,
        saved_step: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._config = config
        self._recovering = recovering
        self._began = began
        self._saved_step = saved_step
        self._excluded: tuple[str, ...] = ()  # sections of our own steps that are not loaded
        self._identity = identity
        self._root = Root(root, identity)
        self._peers = Peers(group, alive)
        self._chunk_bytes = chunk_bytes
        self._entered = False
        self._safe: int | None = None  # newest step that was read back after it was saved
        self._bad: set[int] = set()  # steps that turned out to be damaged, though they look good

    def save(self, step: int, state: dict[str, Any], *, last: bool = False) -> CheckpointReport:
        """Write the state, commit it, and read it back.

        Args:
            step: number of finished optimizer steps.
            state: nested dicts of tensors and DTensors; each rank passes what it holds of them.
            last: training ends with this. With checkpoint.last_save_model_only, only the model is
                saved then, in checkpoint.export_dtype and without the prefix ``model.``.

        Returns:
            what was committed. If a good checkpoint of this step exists already, it is kept and
            reported instead.

        Raises:
            SaveFailedError: nothing was committed, or it reads back wrongly. Older checkpoints are
                untouched: training may go on and try again at the next interval.
            FencedError: a newer generation holds the root; stop.
            CheckpointConfigError: the root belongs to another job.
            TypeError: the state holds something that is no tensor.
        """
        started = time.monotonic()
        self._enter()
        committed, damaged = self._present(step)
        if committed is None:
            model_only = last and self._config.last_save_model_only
            content = self._export(state) if model_only else state
            save = Save(
                self._peers, self._root, self._identity, step, model_only, self._chunk_bytes
            )
            self._bad.add(step)  # until it was read back
            committed = save.run(content, replace=damaged)
        self._bad.discard(step)
        self._safe = max(step, self._safe or 0)
        return CheckpointReport(
            step=step,
            time=committed.time,
            path=f"{self._config.folder}/{self._root.step(step).name}",
            bytes=committed.total_bytes,
            seconds=time.monotonic() - started,
        )

    def load(self, state: dict[str, Any], step: int | None = None) -> LoadReport:
        """Fill the state's tensors in place from the newest good checkpoint.

        Without any checkpoint, from checkpoint.initial_load_path; without that, not at all.

        Args:
            state: as for :meth:`save`; sections in checkpoint.exclude_from_loading stay as they
                are.
            step: load exactly this one; None means checkpoint.load_step, and -1 the newest good.

        Raises:
            NothingGoodError: there are committed checkpoints, but none is good. Tensors may have
                been filled from one that turned out to be damaged: don't train with them.
            UnreadableError: the same, but storage didn't give some of them out: it may pass.
            VanishedError: there are none any more.
            CheckpointConfigError: root, step or model don't fit this job, or training on would run
                into newer checkpoints that are there already.
            FencedError: a newer generation holds the root.
        """
        if not self._config.load_only:
            self._enter()
        begins = not self._recovering or not self._peers.first(self._under_way)
        self._excluded = tuple(self._config.exclude_from_loading) if begins else ()
        asked = step if step is not None else self._config.load_step if begins else -1
        wanted = {name: part for name, part in state.items() if name not in self._excluded}
        skipped: list[SkippedCheckpoint] = []
        lost, unreadable = asked >= 0, False
        for candidate in self._candidates(asked):
            try:
                complete = self._fill(candidate, wanted)
                return LoadReport(candidate, tuple(skipped), complete)
            except DamagedError as error:
                lost = lost or not isinstance(error, UncommittedError)
                unreadable = unreadable or isinstance(error, UnreadableError)
                self._bad.add(candidate)
                logger.warning("step-%d is passed over: %s", candidate, error)
                skipped.append(SkippedCheckpoint(step=candidate, reason=str(error)))
        if skipped and lost:
            reasons = "; ".join(f"step-{each.step}: {each.reason}" for each in skipped)
            if unreadable:
                raise UnreadableError(f"no checkpoint in {self._root.path} can be read ({reasons})")
            raise NothingGoodError(
                f"no good checkpoint is left in {self._root.path} ({reasons}): restore one, or set "
                "checkpoint.folder to a new folder to start afresh"
            )
        self._peers.first(self._expect_nothing)
        return LoadReport(None, tuple(skipped), initial=self._load_initial(state))

    def prune(self) -> list[int]:
        """Delete old checkpoints beyond checkpoint.keep_latest_k and return their steps.

        Nothing happens before this process has saved a checkpoint and read it back, and that one
        and newer ones are never deleted. What storage refuses is logged and tried again the next
        time: a run doesn't end because something old can't be deleted.

        Raises:
            FencedError: a newer generation holds the root.
        """
        if self._safe is None or self._config.keep_latest_k == 0:
            return []
        return self._peers.first(self._prune)

    def _enter(self) -> None:
        """Claim the root, once."""

        def enter() -> None:
            try:
                self._root.enter()
            except OSError as error:
                raise SaveFailedError(
                    f"{self._root.path} can't be claimed: {error.strerror}"
                ) from error

        if not self._entered:
            self._peers.first(enter)
            self._entered = True

    def _present(self, step: int) -> tuple[Manifest | None, bool]:
        """A good checkpoint of this step that exists already, and whether a bad one does."""
        path = self._root.step(step)
        if not self._peers.first(lambda: os.path.lexists(path)):
            return None, False
        try:
            promised = self._promise(step)
            loading.verify(self._peers, path, promised)
        except UnreadableError as error:
            raise SaveFailedError(f"step-{step} exists and can't be read now: {error}") from error
        except DamagedError as error:
            logger.warning("step-%d is damaged (%s) and is saved anew", step, error)
            return None, True
        logger.warning("step-%d exists already and is good: it is kept", step)
        return promised, False

    def _export(self, state: dict[str, Any]) -> dict[str, Any]:
        return planning.cast_floating(state[MODEL], getattr(torch, self._config.export_dtype))

    def _candidates(self, asked: int) -> list[int]:
        def look() -> list[int]:
            return self._root.steps() if self._root.path.is_dir() else []

        steps = self._peers.first(look)
        if asked >= 0 and asked not in steps:
            raise CheckpointConfigError(
                f"checkpoint.load_step asks for step {asked}, but {self._root.path} has "
                f"{', '.join(f'step-{step}' for step in steps) or 'no checkpoint at all'}"
            )
        self._refuse_overtaking(steps, asked)
        return steps if asked < 0 else [asked]

    def _expect_nothing(self) -> None:
        """Make sure that the run, of which nothing could be loaded, had nothing to lose."""
        if self._saved_step is not None:
            raise VanishedError(
                f"{self._root.path} has no checkpoint, but step-{self._saved_step} was committed "
                "there: bring back the volume's content; a new job starts afresh"
            )

    def _refuse_overtaking(self, steps: list[int], asked: int) -> None:
        """Refuse a start behind checkpoints of this root.

        Good checkpoints are never replaced, so those that training reaches again would stand for
        what it did this time, and the next recovery would go back to the old course.
        """
        restarts = "train_state" in self._excluded
        start = 0 if restarts else asked
        newer = [step for step in steps if step > start]
        if self._config.load_only or start < 0 or not newer:
            return
        option = "checkpoint.exclude_from_loading" if restarts else "checkpoint.load_step"
        raise CheckpointConfigError(
            f"{option} starts training at step {start}, but {self._root.path} has newer "
            f"checkpoints ({', '.join(f'step-{step}' for step in newer)}), which are never "
            "replaced: move them away, or use checkpoint.initial_load_path with a new folder"
        )

    def _under_way(self) -> bool:
        """Whether there is something to recover: a checkpoint of the run that is to go on."""
        if self._began is None or not self._root.path.is_dir():
            return self._began is None
        return any(self._made_in(step) == self._began for step in self._root.steps())

    def _made_in(self, step: int) -> int | None:
        """The generation that saved a step; None where its manifest doesn't say."""
        try:
            with loading.reading(), Folder.open(self._root.step(step)) as folder:
                return manifest.read(folder).generation
        except DamagedError:
            return None

    def _promise(self, step: int) -> Manifest:
        """The manifest of one of our own steps."""
        promised = loading.promise(self._peers, self._root.step(step))
        if promised.step != step:
            raise DamagedError(f"its manifest is that of step {promised.step}")
        if promised.job_uid != self._identity.job_uid:
            raise DamagedError(f"it was made by another job (UID {promised.job_uid!r})")
        return promised

    def _fill(self, step: int, wanted: dict[str, Any]) -> bool:
        """Load one step; True if it held only the model."""
        promised = self._promise(step)
        self._compare_fingerprint(step, promised)
        content = wanted.get(MODEL, {}) if promised.model_only else wanted
        loading.fill(self._peers, self._root.step(step), promised, content)
        return promised.model_only

    def _compare_fingerprint(self, step: int, promised: Manifest) -> None:
        for part, now in self._identity.fingerprint.items():
            then = promised.fingerprint.get(part, now)
            if then != now and part.split(".")[0] not in self._excluded:
                raise CheckpointConfigError(
                    f"step-{step} was made with another {part} ({then} instead of {now}): restore "
                    "that setting, or start a new job that adopts the weights with "
                    f"checkpoint.initial_load_path = {self._root.step(step)}"
                )

    def _load_initial(self, state: dict[str, Any]) -> Path | None:
        options = self._config
        if options.initial_load_path is None:
            return None
        path = Path(options.initial_load_path)
        names = {MODEL} if options.initial_load_model_only else state.keys()
        wanted = {name: state[name] for name in names - set(options.exclude_from_loading)}
        try:
            loading.fill_foreign(self._peers, path, wanted, MODEL)
        except UnreadableError as error:
            raise UnreadableError(
                f"checkpoint.initial_load_path can't be read now: {error}"
            ) from error
        except (DamagedError, CheckpointConfigError) as error:
            raise CheckpointConfigError(
                f"checkpoint.initial_load_path can't be loaded: {error}"
            ) from error
        return path

    def _prune(self) -> list[int]:
        try:
            self._root.finish_deletions()
            doomed = self._dispensable()
        except OSError as error:
            logger.warning("old checkpoints could not be listed for deletion: %s", error)
            return []
        removed = []
        for step in doomed:
            try:
                self._root.remove(step)
                removed.append(step)
                self._peers.alive()
            except OSError as error:
                logger.warning("step-%d could not be deleted: %s", step, error)
        return removed

    def _dispensable(self) -> list[int]:
        """Steps beyond checkpoint.keep_latest_k good ones, older than the one read back."""
        assert self._safe is not None
        steps = self._root.steps()
        kept = [step for step in steps if self._looks_good(step)][: self._config.keep_latest_k]
        if len(kept) < self._config.keep_latest_k:
            return []
        return [step for step in steps if step < min(kept[-1], self._safe)]

    def _looks_good(self, step: int) -> bool:
        """Whether a start would try to load it, as far as is known without reading all of it."""
        try:
            with loading.reading(), Folder.open(self._root.step(step)) as folder:
                promised = manifest.read(folder)
                manifest.check_sizes(folder, promised)
        except DamagedError:
            return False
        ours = (promised.step, promised.job_uid) == (step, self._identity.job_uid)
        return ours and step not in self._bad
