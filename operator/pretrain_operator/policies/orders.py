"""Orders that hold for a whole generation: who is still awaited, and for how long.

An order is written ahead like any decision, and is told to every member. It has been obeyed when
every member stands still: drained ones have ended, paused ones say so. Nobody is awaited for ever:
what a member has not saved within its own grace period wouldn't be saved on SIGTERM either.
"""

from datetime import datetime

from pretrain_api.status import Member
from pretrain_api.wire import Order
from pretrain_operator.observe import Observation, Pod
from pretrain_operator.policies import cleanup, diagnosis

MARGIN_SECONDS = 10  # beyond the grace period: for the order to arrive and the end to be seen
DEFAULT_SECONDS = 120  # if no member has a pod any more


def in_force(seen: Observation) -> Order:
    """What the members were told to do."""
    assignment = seen.status.assignment
    return assignment.order if assignment and assignment.workers else Order.NONE


def until(seen: Observation) -> datetime | None:
    """When members are no longer waited for."""
    return seen.status.assignment.until if seen.status.assignment else None


def patience(seen: Observation) -> float:
    """Seconds that members have to obey: the longest of their grace periods, and a margin."""
    pods = [pod for member in seen.members if (pod := seen.pod_of(member))]
    return max((pod.grace_seconds for pod in pods), default=DEFAULT_SECONDS) + MARGIN_SECONDS


def awaited(seen: Observation) -> list[Member]:
    """Members that have yet to obey the order in force."""
    limit = until(seen)
    if limit is not None and seen.now >= limit:
        return []
    lost = cleanup.written_off(seen)
    ended = {m.pod for m in diagnosis.gone(seen) if not _may_save(seen.pod_of(m), lost)}
    return [m for m in seen.members if m.pod not in ended and not _stands_still(seen, m)]


def _may_save(pod: Pod | None, lost: set[str]) -> bool:
    """Whether it is being deleted, which takes as long as it saves."""
    return pod is not None and pod.leaving and not pod.over and pod.uid not in lost


def _stands_still(seen: Observation, member: Member) -> bool:
    report, assignment = seen.reports.get(member.pod), seen.status.assignment
    if in_force(seen) is not Order.PAUSE or report is None or assignment is None:
        return False
    return report.paused and report.generation == assignment.generation
