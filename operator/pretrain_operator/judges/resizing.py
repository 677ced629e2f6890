"""How many train together: a size changed by hand, nodes that are missing, nodes that are back.

A world that trains is never cut down or enlarged under way: its members are told to pause, save,
and meet again in a generation of the new size (:func:`~.standing.leave` sees that through). One
that has yet to meet is simply planned anew.
"""

from datetime import datetime, timedelta
from typing import Any

from pretrain_api import names
from pretrain_api.status import JobStatus, Member
from pretrain_api.wire import Order
from pretrain_operator import ledger
from pretrain_operator.actions import Notice, Plan
from pretrain_operator.judges.base import ahead, job_of
from pretrain_operator.observe import Observation
from pretrain_operator.policies import elastic, orders
from pretrain_operator.policies.diagnosis import Cause
from pretrain_operator.policies.elastic import RESIZED, World
from pretrain_operator.status import healed, holds, judged, mark, view


def watch_nodes(seen: Observation) -> Plan | None:
    """Note since when pods find no node: conditions of pods don't tell queueing from that."""
    found, since = bool(elastic.unplaced(seen)), elastic.waiting_since(seen)
    if found == (since is not None) or not seen.members:
        return None
    return ahead(seen, _amended(seen.status, unplaced=seen.now if found else None))


def shrink(seen: Observation) -> Plan | None:
    """Nodes are missing, but those who have one are enough to train."""
    world = elastic.smaller_world(seen, job_of(seen).spec)
    return rebuild(seen, world, warning=True) if world else None


def release(seen: Observation) -> Plan | None:
    """Nodes are missing for too long: all pods go, so that somebody else may use the others."""
    at, assignment = elastic.release_at(seen, job_of(seen).spec), seen.status.assignment
    if at is None or assignment is None or seen.now < at:
        return None
    wait = elastic.release_seconds(seen.uid, assignment.releases)
    said = elastic.released(seen, wait)
    status = _amended(
        ledger.without_members(seen, seen.status),
        not_before=seen.now + timedelta(seconds=wait),
        releases=assignment.releases + 1,
        unplaced=None,
    )
    status = mark(seen, status, names.RUNNING, False, "SchedulingTimeout", said)
    notice = Notice("SchedulingTimeout", said, warning=True)
    return ahead(seen, view(seen, healed(seen, status)), notice)


def resize(seen: Observation) -> Plan | None:
    """Another size is wanted, or nodes for the one that is wanted may be back."""
    assignment = seen.status.assignment
    if assignment is None or not assignment.workers:
        return None
    if assignment.leader is None:
        return _replan(seen)
    if elastic.wanted(seen) < len(seen.members):
        return _pause(seen, f"to go on with {elastic.wanted(seen)} of {len(seen.members)} workers")
    return _grow(seen)


def _replan(seen: Observation) -> Plan | None:
    """Nobody trains yet: the size that is wanted can be had without a pause."""
    assignment, size = seen.status.assignment, elastic.wanted(seen)
    before = len(seen.members)
    if assignment is None or size == before or (size > before and assignment.grow_after):
        return None
    placed = sorted(ledger.staying(seen), key=lambda each: not _is_placed(seen, each))
    kept = tuple(sorted(placed[:size], key=lambda each: each.index))
    return rebuild(seen, World(size, kept, Cause(RESIZED, f"from {before} to {size} workers")))


def _is_placed(seen: Observation, member: Member) -> bool:
    pod = seen.pod_of(member)
    return pod is not None and pod.node is not None


def _pause(seen: Observation, why: str) -> Plan:
    status = ledger.with_order(seen, seen.status, Order.PAUSE, orders.patience(seen))
    notice = Notice("Pausing", f"all workers save and stand still {why}")
    return ahead(seen, view(seen, status), notice)


def _grow(seen: Observation) -> Plan | None:
    """Candidates start beside a world that trains, and join it once they are ready."""
    spec, due = job_of(seen).spec, elastic.candidates_due(seen)
    failed = elastic.setback(seen, spec)
    if failed is not None:
        return set_back(seen, failed.message)
    if due != len(seen.candidates):
        status = ledger.with_candidates(seen, seen.status, due)
        said = f"{due} more workers start beside the {len(seen.members)} that train"
        return ahead(seen, status, *([Notice("Growing", said)] if due else []))
    if holds(seen.status, names.RUNNING) and elastic.can_grow(seen, spec):
        return _pause(seen, f"so that {len(elastic.ready(seen))} more can join")
    return None


def set_back(seen: Observation, why: str) -> Plan:
    """Drop the candidates and try again later. It costs the job nothing, and no budget."""
    assignment, spec = seen.status.assignment, job_of(seen).spec
    setbacks = assignment.setbacks + 1 if assignment else 1
    later = seen.now + elastic.snooze(spec, setbacks)
    status = _amended(
        ledger.with_candidates(seen, seen.status, 0), grow_after=later, setbacks=setbacks
    )
    said = f"{why}; tried again in {(later - seen.now).total_seconds():.0f} s"
    return ahead(seen, status, Notice("GrowFailed", said, warning=True))


def rebuild(seen: Observation, world: World, *, warning: bool = False) -> Plan:
    """The next generation, of another size. Free of charge, but in the ledger like any other."""
    before, cause = seen.status.assignment, world.cause
    charged = seen.status.restarts.charged if seen.status.restarts else 0
    # A smaller world than wanted sleeps before it seeks to grow.
    lacking = seen.job is not None and world.size < elastic.wanted(seen)
    status = ledger.with_restart(ledger.with_attempt(seen, cause), cause, charged)
    status = ledger.with_generation(
        seen,
        status,
        size=world.size,
        kept=world.kept,
        not_before=_still_waits(seen),
        grow_after=seen.now + elastic.snooze(job_of(seen).spec) if lacking else None,
        releases=before.releases if before and before.leader is None else 0,
    )
    said = f"{cause.message}; going on as generation {ledger.next_generation(seen)}"
    said += f" with {world.size} of {elastic.wanted(seen)} workers" if lacking else ""
    status = mark(seen, status, names.RUNNING, False, cause.reason, said)
    status = mark(seen, status, names.RESTARTING, True, cause.reason, said)
    notice = Notice(cause.reason, said, warning=warning)
    return ahead(seen, view(seen, judged(seen, status)), notice)


def _still_waits(seen: Observation) -> datetime | None:
    """A change of size doesn't cut the wait after a failure short."""
    assignment = seen.status.assignment
    if assignment is None or assignment.leader is not None or assignment.not_before is None:
        return None
    return assignment.not_before if assignment.not_before > seen.now else None


def _amended(status: JobStatus, **changes: Any) -> JobStatus:
    if status.assignment is None:
        return status
    return status.model_copy(update={"assignment": status.assignment.model_copy(update=changes)})
