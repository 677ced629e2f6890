"""What can go wrong with a checkpoint, told apart by what the trainer should do about it.

Every message is one sentence that names the folder or file and, where a person has to act, what to
do. The exit code follows from the bases: ``BadInputError`` and ``HopelessError`` are never retried.
Errors travel between ranks as text (see :mod:`.peers`), so all ranks raise the same class.
"""

from pretrain_trainer.errors import BadInputError, HopelessError


class CheckpointError(RuntimeError):
    """Base of all errors of this package; itself raised when a peer failed unforeseen."""


class CheckpointConfigError(CheckpointError, BadInputError):
    """The root, the step asked for or the model doesn't fit this job: retrying can't help."""


class FencedError(CheckpointError, HopelessError):
    """A newer generation of the world holds the root: this process must stop and save nothing."""


class SaveFailedError(CheckpointError):
    """A save was not committed; what was there before is untouched and training may go on."""


class DamagedError(CheckpointError):
    """One checkpoint is not what its manifest promises, or it was never committed."""


class UnreadableError(DamagedError):
    """The storage doesn't give a checkpoint out now. That may pass, and says nothing of it."""


class UncommittedError(DamagedError):
    """A folder has the name of a checkpoint, but the manifest that would make it one is missing."""


class VanishedError(CheckpointError):
    """Checkpoints were committed and none is there: going on would silently start afresh."""


class NothingGoodError(CheckpointError, HopelessError):
    """Committed checkpoints exist, but all are damaged: going on would silently start afresh."""


BY_NAME: dict[str, type[CheckpointError]] = {
    kind.__name__: kind
    for kind in (
        CheckpointError,
        CheckpointConfigError,
        FencedError,
        SaveFailedError,
        DamagedError,
        UnreadableError,
        UncommittedError,
        VanishedError,
        NothingGoodError,
    )
}
