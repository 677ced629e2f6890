"""The operator's word to this pod, as a file that may be missing, half written or out of date.

The file is level-triggered: whatever it says now is what holds. It is read again and again, never
waited for, so a missed change is made up by the next look. Generations only ever grow; within one
generation only the orders and the deadlines for hangs may change.
"""

import logging
from pathlib import Path

from pydantic import ValidationError

from pretrain_api.wire import Assignment, Order

log = logging.getLogger(__name__)


class AssignmentFile:
    """Reads the newest assignment and remembers what was already seen."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.current: Assignment | None = None
        self._content = b""

    def poll(self) -> Assignment | None:
        """The assignment, if it is newer than what the last call returned, else None.

        A file that is missing, unreadable, incomplete or of an older generation says nothing.
        """
        try:
            content = self.path.read_bytes()
        except OSError:
            return None  # the kubelet has not projected it yet, or is just replacing it
        if content == self._content:
            return None
        self._content = content
        found = _parse(content)
        if found is None or not _succeeds(found, self.current):
            return None
        self.current = found
        return found


def _parse(content: bytes) -> Assignment | None:
    if not content.strip():
        return None
    try:
        return Assignment.model_validate_json(content)
    except ValidationError as error:
        log.warning("the assignment is not readable yet: %s", error.errors()[0]["msg"])
        return None


def _succeeds(found: Assignment, current: Assignment | None) -> bool:
    if current is None or found.generation > current.generation:
        return True
    if found.generation < current.generation:
        log.warning("ignored generation %d, seen %d", found.generation, current.generation)
        return False
    # An operator that is older than the one which began the generation doesn't know the last.
    changeable = {"orders": Order.NONE, "hang": None, "saved_step": None}
    if found.model_copy(update=changeable) == current.model_copy(update=changeable):
        return found != current
    log.warning("ignored a different assignment in the same generation %d", found.generation)
    return False
