"""What keeps a job from training: an order to stand still, a wish, a broken spec, its volume."""

from pretrain_api import names
from pretrain_api.status import JobStatus
from pretrain_api.wire import Order
from pretrain_operator import children, ledger
from pretrain_operator.actions import Notice, Plan
from pretrain_operator.judges.base import (
    RECHECK_SECONDS,
    STARTING_POLL_SECONDS,
    ahead,
    job_of,
    seconds_until,
)
from pretrain_operator.judges.resizing import rebuild
from pretrain_operator.observe import Observation
from pretrain_operator.policies import deadline, diagnosis, elastic, orders, volume
from pretrain_operator.policies.diagnosis import Cause
from pretrain_operator.progress import with_report
from pretrain_operator.report import reported, unless_said
from pretrain_operator.status import INVALID, healed, judged, mark, view

SUSPENDED = Cause("Suspended", "spec.suspend was set")


def leave(seen: Observation) -> Plan | None:
    """An order is in force: wait until every member stands still, or has had its time.

    A drain that began is completed, whatever is wished by now: who has been told to leave can't be
    called back. A pause gives way to a suspension, and to the loss of a member, which brings a new
    generation anyway.
    """
    order = orders.in_force(seen)
    if order is Order.NONE:
        return None
    if order is Order.PAUSE and (seen.wishes.suspend or diagnosis.diagnose(seen)):
        return None
    if orders.awaited(seen):
        return _wait(seen)
    return _drained(seen) if order is Order.DRAIN else _paused(seen)


def _wait(seen: Observation) -> Plan:
    wakes = [at for at in (orders.until(seen),) if at]
    status = view(seen, judged(seen, with_report(seen, seen.status)))
    return Plan(
        actions=(*children.retain(seen), *children.announce(seen)),
        status=status,
        events=reported(seen, status),
        wake_after=min(STARTING_POLL_SECONDS, seconds_until(seen, wakes) or STARTING_POLL_SECONDS),
    )


def _drained(seen: Observation) -> Plan:
    """What the leader's last message says goes into the status before its pod goes."""
    status = ledger.without_members(seen, ledger.with_attempt(seen, SUSPENDED))
    return ahead(seen, view(seen, judged(seen, status)))


def _paused(seen: Observation) -> Plan:
    """All members stand still: a generation of the size that is due, with those that stay."""
    return rebuild(seen, elastic.next_world(seen))


def suspend(seen: Observation) -> Plan | None:
    """Suspended: the members save and leave, then nobody is one, and every pod is a stray."""
    if not seen.wishes.suspend:
        return None
    notice = Notice("Suspended", "workers save and leave; training goes on when resumed")
    assignment = seen.status.assignment
    if assignment and assignment.workers:
        if assignment.leader:
            status = ledger.with_order(seen, seen.status, Order.DRAIN, orders.patience(seen))
        else:  # they were told nothing yet, so there is nobody who could save
            status = ledger.without_members(seen, ledger.with_attempt(seen, SUSPENDED))
        return ahead(seen, _suspended(seen, status), notice, *_complaint(seen))
    return Plan(
        actions=(*children.retain(seen), *children.tidy(seen, "Suspended")),
        status=_suspended(seen, seen.status),
        events=(*unless_said(seen, names.SUSPENDED, notice), *_complaint(seen)),
    )


def _suspended(seen: Observation, status: JobStatus) -> JobStatus:
    status = status.model_copy(update={"start_time": None})
    status = mark(seen, status, names.SUSPENDED, True, "Suspended", "spec.suspend is set")
    for other in (names.RUNNING, names.RESTARTING):
        status = mark(seen, status, other, False, "Suspended", "spec.suspend is set")
    return view(seen, judged(seen, status))


def refuse(seen: Observation) -> Plan | None:
    """A spec that doesn't validate gets no pods, and says why until it is mended.

    Workers that train already are left alone: they go by the configuration they started with.
    """
    if not seen.problems:
        return None
    status = judged(seen, seen.status)
    status = mark(seen, status, names.RUNNING, False, INVALID, "; ".join(seen.problems))
    status = mark(seen, status, names.SUSPENDED, False, "Resumed")
    return Plan(
        actions=children.retain(seen),
        status=view(seen, status),
        events=_complaint(seen),
        wake_after=seconds_until(seen, [item.at for item in deadline.deadlines(seen)]),
    )


def _complaint(seen: Observation) -> tuple[Notice, ...]:
    if not seen.problems:
        return ()
    warning = Notice(INVALID, "; ".join(seen.problems), warning=True)
    return unless_said(seen, names.FAILED, warning)


def hold(seen: Observation) -> Plan | None:
    """No new worker while its volume can't be used; those that train are left alone."""
    around = seen.surroundings
    found = volume.obstacle(seen, job_of(seen), around) if around else None
    if found is None or (all(seen.pod_of(member) for member in seen.members) and seen.members):
        return None
    status = mark(seen, seen.status, names.RUNNING, False, found.reason, found.message)
    warning = Notice(found.reason, found.message, warning=True)
    return Plan(
        actions=(*children.retain(seen), *children.tidy(seen, found.reason)),
        status=view(seen, healed(seen, status)),
        events=unless_said(seen, names.RUNNING, warning, found.reason),
        wake_after=RECHECK_SECONDS,
    )
