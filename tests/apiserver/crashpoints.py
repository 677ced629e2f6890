"""Kill the operator after its k-th write, for every k, and compare the ends."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .api import Body
from .endstate import blurred, difference
from .faults import Kill
from .lab import Lab, NewLab
from .operators import Operator
from .workflows import Workflow

AT_A_TIME = 6  # labs; most of the time they wait
SETTLE_SECONDS = 30.0
STILL_LOOKS = 4  # with nothing to compare with; what follows from a write takes several hops
# Told once per generation, if the leader was asked while it was so.
SEEN_BY_CHANCE = ("Training", "ResumedFrom")


@dataclass
class Findings:
    """What came out for one workflow."""

    workflow: str
    writes: list[str] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)  # every k at which the operator died
    deviations: dict[int, list[str]] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class End:
    """How a run ended."""

    state: Body
    events: Counter[str]


async def end_of(
    lab: Lab, workflow: Workflow, expected: End | None = None, operator: Operator | None = None
) -> End:
    """The end, once the operator has seen it and nothing moves, or once it is as expected.

    ``operator`` is who has seen it, if not the lab's own.
    """
    gone = await lab.status() is None  # then nothing brings an operator to make a round
    deadline = time.monotonic() + SETTLE_SECONDS
    before: End | None = None
    still = 0  # looks in a row at which nothing had moved
    while True:
        rounds = await (operator or lab.operator).rounds()
        end = End(blurred(await lab.state(), workflow.blurred), await lab.events())
        still = still + 1 if end == before else 0
        settled = still >= STILL_LOOKS if expected is None else end.state == expected.state
        if (settled and (rounds > 0 or gone)) or time.monotonic() > deadline:
            return end
        before = end
        await asyncio.sleep(0.5 if expected is None else 0.1)


def deviations(expected: End, found: End) -> list[str]:
    """What a disturbed run may not do: end elsewhere, or tell the same news more often."""
    lines = difference(expected.state, found.state)
    # An Event that was lost in a crash is not told again, by design; one too many is a mistake.
    more = found.events - expected.events
    more = Counter({reason: n for reason, n in more.items() if reason not in SEEN_BY_CHANCE})
    return [*lines, *(f"event {reason} was told {n} times more" for reason, n in more.items())]


async def undisturbed(new_lab: NewLab, workflow: Workflow) -> tuple[End, list[str]]:
    """The end all others are compared with, and the writes on the way."""
    async with new_lab(workflow.script) as lab:
        lab.operator.start()
        await workflow.run(lab)
        return await end_of(lab, workflow), lab.proxy.writes


async def with_crash(
    new_lab: NewLab, workflow: Workflow, number: int, expected: End
) -> tuple[bool, list[str]]:
    """Whether the operator died after that write, and how the end deviates."""
    async with new_lab(workflow.script) as lab:
        kill = Kill(number, lab.operator.kill)
        lab.proxy.faults.append(kill)
        lab.operator.start()
        try:
            await workflow.run(lab)
            found = await end_of(lab, workflow, expected)
        except AssertionError as error:
            return kill.done, [kill.after, str(error)]
        lines = deviations(expected, found)
        return kill.done, [kill.after, *lines] if lines else []


async def crash_points(
    new_lab: NewLab, workflow: Workflow, picked: Sequence[int] | None = None
) -> Findings:
    """Runs with a crash after the writes of the given numbers; after every one if none is given.

    The number of writes varies by one or two, because progress is written by time. So without a
    choice the numbers go on until a run comes to its end before the operator is killed.
    """
    started = time.monotonic()
    expected, writes = await undisturbed(new_lab, workflow)
    findings = Findings(workflow.name, writes)
    numbers = iter(picked if picked is not None else range(1, 10 * len(writes)))
    ended = False

    async def work() -> None:
        nonlocal ended
        while not ended and (number := next(numbers, None)) is not None:
            died, lines = await with_crash(new_lab, workflow, number, expected)
            ended = ended or (not died and picked is None)
            if died:
                findings.killed.append(number)
            if lines:
                findings.deviations[number] = lines

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_A_TIME):
            group.create_task(work())
    findings.killed.sort()
    findings.seconds = time.monotonic() - started
    return findings
