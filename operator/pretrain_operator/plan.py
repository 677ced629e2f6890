"""The decision: one observation in, one plan out. No clock, no randomness, no I/O.

The status is the operator's memory. Whatever later steps rely on (who is a member, what members
were told to do, how many failures were charged) is *written ahead*: such a plan changes the status
and does nothing else, and the next round, which has read it back, creates, tells and deletes. A
crash between any two writes therefore finds either the old decision or the new one, and plans the
same again.

:data:`CHECKLIST`, at the end, is the whole decision in order; the first judge with an answer wins.
"""

from collections.abc import Callable

from pretrain_operator.actions import Plan
from pretrain_operator.judges.ending import clear_up, complete, expire
from pretrain_operator.judges.resizing import release, resize, shrink, watch_nodes
from pretrain_operator.judges.standing import hold, leave, refuse, suspend
from pretrain_operator.judges.training import begin, converge, meet, regroup
from pretrain_operator.observe import Observation

CONTROLLER = "pretrain.dev/pretrain-operator"  # spec.managedBy of jobs that are ours


def plan(seen: Observation) -> Plan:
    """Decide what to do about one job."""
    if seen.meta.deletion_timestamp or seen.wishes.managed_by not in (None, CONTROLLER):
        return Plan()  # the garbage collector's, or another controller's
    for judge in CHECKLIST:
        verdict = judge(seen)
        if verdict is not None:
            return verdict
    return Plan()


CHECKLIST: tuple[Callable[[Observation], Plan | None], ...] = (
    clear_up,  # finished: nothing but cleaning up
    complete,  # the leader left the completion marker
    expire,  # out of time
    leave,  # members were told to stand still: see it through
    suspend,  # by wish
    refuse,  # the spec doesn't validate; below this line it does
    regroup,  # a member is gone: restart or give up
    watch_nodes,  # since when pods find no node
    shrink,  # those who have one are enough
    release,  # they are not, and have held theirs for too long
    resize,  # another size is wanted, or can be had again
    hold,  # the volume can't be used
    begin,  # nobody is a member yet
    meet,  # all are there: name the leader
    converge,  # make it so, and report
)
