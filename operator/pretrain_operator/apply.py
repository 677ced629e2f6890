"""Carry out a plan: the thin part that writes.

Order matters and is the same always. A plan that is written ahead writes the status, under the
resourceVersion that was read, and nothing else. Any other acts first and writes the status then, so
that the status never claims what has not happened. Events come last: whether something is news is
judged by the status, and one that could not be written must not be told again and again. Every
action may be done twice: names are deterministic, and deletions and patches name the UID they mean.
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby

from pretrain_api import names
from pretrain_api.status import JobStatus
from pretrain_operator.actions import Action, Create, Delete, Notice, Patch, Plan
from pretrain_operator.cluster import (
    Body,
    Cluster,
    ClusterError,
    ConflictError,
    Kind,
    NotFoundError,
    RefusedError,
    TakenError,
)
from pretrain_operator.judges.base import RECHECK_SECONDS
from pretrain_operator.judges.resizing import set_back
from pretrain_operator.merge import merge_patch
from pretrain_operator.metrics import Metrics
from pretrain_operator.observe import Observation, belongs, label_of
from pretrain_operator.plan import CONTROLLER
from pretrain_operator.report import unless_said
from pretrain_operator.status import condition_of, holds, is_finished, is_minor, mark, view

log = logging.getLogger(__name__)

NOTE_LIMIT = 1024  # bytes of an Event's text that the API takes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a plan."""

    wake_after: float | None  # seconds until the next look
    refused: bool = False  # whether something of it was, and is to be tried again
    wrote: bool = False  # the status


async def apply(
    cluster: Cluster,
    seen: Observation,
    body: Body,
    plan: Plan,
    metrics: Metrics,
    patience: float = 0.0,
) -> Outcome:
    """Carry out ``plan`` for the job ``body`` as it was read.

    A status in which only numbers and wording are new waits ``patience`` seconds, and is decided
    anew then. What is written is seen by the watch and causes a round, so news in every answer of a
    worker would make one write after the other.

    Raises ClusterError, ConflictError among them, if another attempt is due.
    """
    executor = _Executor(cluster, seen, body, metrics)
    status, events, wake = plan.status, plan.events, plan.wake_after
    refused = False
    try:
        await executor.act(plan.actions)
    except RefusedError as refusal:
        if is_finished(seen.status):
            raise  # nothing is said about a finished job any more
        status, events = _refused(seen, status or seen.status, events, refusal)
        wake, refused = RECHECK_SECONDS, True
    may_wait = patience > 0 and not events and not plan.write_ahead
    if may_wait and status is not None and is_minor(seen.status, status):
        return Outcome(patience if wake is None else min(wake, patience), refused)
    wrote = await executor.write(status)
    await executor.tell(events)
    return Outcome(wake, refused, wrote)


def _refused(
    seen: Observation, status: JobStatus, events: tuple[Notice, ...], refusal: RefusedError
) -> tuple[JobStatus, tuple[Notice, ...]]:
    """Quota, policy or missing rights: for people to see, and to try again now and then.

    An Event is due when the reason is new. The message may differ each time: quotas quote numbers.
    While workers train only candidates are created: without them training goes on as it is.
    """
    if seen.candidates and seen.job and holds(seen.status, names.RUNNING):
        later = set_back(seen, str(refusal))
        return later.status or status, later.events
    planned = condition_of(status, names.RUNNING)
    # The reason that would have been shown isn't, so it would be news again next time.
    events = tuple(each for each in events if not planned or each.reason != planned.reason)
    notice = Notice(refusal.reason, str(refusal), warning=True)
    events = (*events, *unless_said(seen, names.RUNNING, notice, notice.reason))
    status = mark(seen, status, names.RUNNING, False, notice.reason, notice.message)
    return view(seen, status), events


class _Executor:
    def __init__(self, cluster: Cluster, seen: Observation, body: Body, metrics: Metrics) -> None:
        self._cluster = cluster
        self._seen = seen
        self._body = body
        self._metrics = metrics

    async def act(self, actions: Iterable[Action]) -> None:
        """Actions of one kind at once, kinds one after another: a pod needs its ConfigMap."""
        for _, group in groupby(actions, key=lambda action: (type(action), action_kind(action))):
            results = await asyncio.gather(
                *(self._perform(action) for action in group), return_exceptions=True
            )
            failures = [result for result in results if isinstance(result, BaseException)]
            if failures:
                # One refusal must not hide a lost connection: the others are worth a retry now.
                raise min(failures, key=lambda error: isinstance(error, RefusedError))

    async def _perform(self, action: Action) -> None:
        match action:
            case Create(kind, body, _):
                await self._create(kind, body)
            case Patch(kind, name, patch, _):
                await self._patch(kind, name, patch)
            case Delete(kind, name, uid, _, grace_seconds):
                await self._delete(kind, name, uid, grace_seconds)
        log.info("%s: %s", self._where(), describe(action))

    async def _create(self, kind: Kind, body: Body) -> None:
        name = body["metadata"]["name"]
        try:
            await self._cluster.create(kind, self._seen.namespace, body)
            self._metrics.writes.labels(kind.plural, "create").inc()
        except ConflictError:
            # Ours already, and the cache is behind? Or somebody else's, then wait until it goes.
            try:
                there = await self._cluster.get(kind, self._seen.namespace, name)
            except NotFoundError as error:
                raise ConflictError(f"{kind.plural} {name} was there, and is gone") from error
            # A retained claim has no owner: its label alone says whose it is.
            labelled = label_of(there, names.LABEL_JOB_UID) == self._seen.uid
            if not (labelled if kind is Kind.CLAIM else belongs(there, self._seen.uid)):
                message = f"{kind.plural} {name} exists and doesn't belong to this job"
                raise TakenError(f"{message}; delete it or rename the job") from None

    async def _patch(self, kind: Kind, name: str, patch: Body) -> None:
        try:
            await self._cluster.patch(kind, self._seen.namespace, name, patch)
            self._metrics.writes.labels(kind.plural, "patch").inc()
        except NotFoundError:
            pass  # gone since it was seen; its end is about to start another round

    async def _delete(self, kind: Kind, name: str, uid: str, grace_seconds: int | None) -> None:
        try:
            await self._cluster.delete(kind, self._seen.namespace, name, uid, grace_seconds)
            self._metrics.writes.labels(kind.plural, "delete").inc()
        except (NotFoundError, ConflictError):
            pass  # gone, or another object of that name: either way not there any more

    async def write(self, status: JobStatus | None) -> bool:
        """Write what differs, on the condition that nobody wrote since. Returns whether any did."""
        if status is None or status == self._seen.status:
            return False
        meta = self._body["metadata"]
        difference = merge_patch(self._body.get("status") or {}, status.to_dict())
        patch = {
            "metadata": {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]},
            "status": difference,
        }
        namespace, name = self._seen.namespace, self._seen.name
        try:
            await self._cluster.patch_status(Kind.JOB, namespace, name, patch)
        except NotFoundError as error:  # it was deleted since it was read
            raise ConflictError(str(error)) from error
        self._metrics.writes.labels(Kind.JOB.plural, "patch").inc()
        self._metrics.count_restarts(self._seen.status, status)
        return True

    async def tell(self, events: Iterable[Notice]) -> None:
        """Post Events. They are for people: one that can't be posted stops nothing."""
        for notice in events:
            try:
                body = build_event(self._body, notice)
                await self._cluster.create(Kind.EVENT, self._seen.namespace, body)
            except ClusterError as error:
                log.warning("%s: event %s not posted: %s", self._where(), notice.reason, error)

    def _where(self) -> str:
        return f"{self._seen.namespace}/{self._seen.name}"


def action_kind(action: Action) -> Kind:
    """The kind of object an action is about."""
    return action.kind


def describe(action: Action) -> str:
    """One line for the log."""
    match action:
        case Create(kind, body, reason):
            return f"create {kind.plural}/{body['metadata']['name']} ({reason})"
        case Patch(kind, name, _, reason):
            return f"patch {kind.plural}/{name} ({reason})"
        case Delete(kind, name, _, reason, grace_seconds):
            how = "force-delete" if grace_seconds == 0 else "delete"
            return f"{how} {kind.plural}/{name} ({reason})"


def build_event(job: Body, notice: Notice) -> Body:
    """An Event about the job, as ``kubectl describe`` shows it."""
    meta = job["metadata"]
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{meta['name']}-", "namespace": meta["namespace"]},
        "eventTime": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "reportingController": CONTROLLER,
        "reportingInstance": names.MANAGED_BY,
        "action": notice.reason,
        "reason": notice.reason,
        "note": notice.message.encode()[:NOTE_LIMIT].decode(errors="ignore"),
        "type": "Warning" if notice.warning else "Normal",
        "regarding": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": meta["name"],
            "namespace": meta["namespace"],
            "uid": meta["uid"],
            "resourceVersion": meta["resourceVersion"],
        },
    }
