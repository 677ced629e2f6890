"""What a plan consists of. An action carries the reason it was taken for."""

from dataclasses import dataclass

from pretrain_api.status import JobStatus
from pretrain_operator.cluster import Body, Kind


@dataclass(frozen=True, slots=True)
class Create:
    """Create an object; that it is there already is fine."""

    kind: Kind
    body: Body
    reason: str


@dataclass(frozen=True, slots=True)
class Patch:
    """Merge patch of an object."""

    kind: Kind
    name: str
    patch: Body
    reason: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete an object; that it is gone already is fine.

    With its own grace period, unless ``grace_seconds`` is given: 0 doesn't wait for its node.
    """

    kind: Kind
    name: str
    uid: str
    reason: str
    grace_seconds: int | None = None


Action = Create | Patch | Delete


@dataclass(frozen=True, slots=True)
class Notice:
    """An Event for people."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do: actions in order, then events, then the status, then look again.

    ``status`` is None if it is to stay as it is. ``write_ahead`` plans have no actions. Without
    ``wake_after`` (seconds) only a change in the cluster starts another round.
    """

    actions: tuple[Action, ...] = ()
    status: JobStatus | None = None
    events: tuple[Notice, ...] = ()
    wake_after: float | None = None
    write_ahead: bool = False
