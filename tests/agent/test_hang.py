"""Who hangs: the judgement alone, over single cases and over simulated worlds in lockstep."""

import random
from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from pretrain_agent.board import Beat
from pretrain_agent.hang import (
    SILENT_SECONDS,
    Hung,
    Lookout,
    Pace,
    Pulse,
    Rear,
    limits,
    place,
    suspect,
)
from pretrain_agent.vitals import FROZEN_SECONDS, Vitals
from pretrain_api.wire import HangDeadlines, Phase

USUAL = limits(None, step_seconds=1.0)


def test_every_phase_that_can_hang_has_a_deadline_of_its_own() -> None:
    assert USUAL[Phase.STARTING] == 600
    assert {USUAL[phase] for phase in (Phase.LOAD, Phase.FIRST_STEP, Phase.DATA, Phase.SAVE)} == {
        1800
    }
    assert set(USUAL) == set(Phase) - {Phase.WAITING, Phase.DONE}
    asked = HangDeadlines(starting=1, load=2, first_step=3, data=4, step=5, save=6)
    given = limits(asked, step_seconds=100.0)
    assert [given[phase] for phase in (Phase.STARTING, Phase.LOAD, Phase.FIRST_STEP)] == [1, 2, 3]
    assert [given[phase] for phase in (Phase.DATA, Phase.STEP, Phase.SAVE)] == [4, 5, 6]


@pytest.mark.parametrize(
    ("step_seconds", "expected"), [(None, 1800), (0.01, 60), (6.0, 60), (7.0, 70)]
)
def test_a_step_gets_ten_times_the_median_and_at_least_a_minute(
    step_seconds: float | None, expected: float
) -> None:
    assert limits(None, step_seconds)[Phase.STEP] == expected


def test_the_pace_is_the_median_without_first_steps() -> None:
    pace = Pace()
    pace.look(Beat(Phase.STARTING, 0, 0))
    pace.look(Beat(Phase.FIRST_STEP, 10, 5))
    assert pace.step_seconds is None
    pace.look(Beat(Phase.STEP, 11, 905))  # compiled for 15 minutes
    assert pace.step_seconds is None
    pace.look(Beat(Phase.STEP, 12, 907))
    pace.look(Beat(Phase.SAVE, 12, 908))
    pace.look(Beat(Phase.STEP, 14, 911))  # two steps between two looks
    pace.look(Beat(Phase.STEP, 15, 1911))
    assert pace.step_seconds == 2
    pace.look(Beat(Phase.DATA, 3, 2000))  # ranks started again from a checkpoint
    pace.look(Beat(Phase.STEP, 4, 2002))
    assert pace.step_seconds == 2


def test_places_are_ordered_as_ranks_pass_them() -> None:
    passed = [
        (Phase.STARTING, 0),
        (Phase.LOAD, 0),
        (Phase.DATA, 7),
        (Phase.STEP, 7),
        (Phase.SAVE, 8),
        (Phase.EVAL, 8),
        (Phase.DATA, 8),
        (Phase.STEP, 8),
        (Phase.DONE, 9),
    ]
    places = [place(phase, step) for phase, step in passed]
    assert places == sorted(set(places))
    assert place(Phase.FIRST_STEP, 8) == place(Phase.STEP, 8)


def test_time_counts_while_the_same_ones_are_furthest_behind() -> None:
    rear, data, step = Rear(), place(Phase.DATA, 3), place(Phase.STEP, 3)
    assert rear.look({0: step, 1: data}, 10.0) == [1]
    assert rear.look({0: step, 1: data}, 50.0) == [1]
    assert rear.since == 10
    assert rear.look({0: step, 1: step}, 60.0) == [0, 1]
    assert rear.look({0: step, 1: place(Phase.DATA, 4)}, 61.0) == [0]
    assert rear.since == 61  # it waited for the other one until now


def pulse(rank: int, age: float, state: str = "S") -> Pulse:
    return Pulse(round=0, rank=rank, phase=Phase.STEP, step=3, age=age, state=state)


def test_the_suspect_is_a_process_that_can_not_run_before_the_quietest() -> None:
    assert suspect([pulse(0, 70), pulse(1, 90)], 1000).rank == 1
    assert suspect([pulse(0, 70), pulse(1, 90)], 1000).age == 70  # the other's life is its life
    assert suspect([pulse(0, 70), pulse(1, 90)], 5).age == 5
    for state in ("T", "t", "D", "Z", ""):
        assert suspect([pulse(0, 70, state), pulse(1, 90)], 1000).rank == 0


def test_a_verdict_says_what_was_seen_and_what_was_granted() -> None:
    hung = Hung(rank=3, phase=Phase.DATA, step=12, seconds=1801.2, limit=1800, state="T")
    assert str(hung) == (
        "rank 3: no sign of life for 1801 s in phase data after step 12 (limit 1800 s); "
        "the process is stopped (state T)"
    )
    assert str(hung.model_copy(update={"state": "S"})).endswith("(limit 1800 s)")


# -- the leader -----------------------------------------------------------------------------------


def heard(*pulses: Pulse, now: float = 0.0) -> Lookout:
    lookout = Lookout(0, now)
    for agent, said in enumerate(pulses):
        lookout.hear(agent, said, now)
    return lookout


def verdict_after(lookout: Lookout, seconds: int, *pulses: Pulse) -> Hung | None:
    """What comes of it when all go on saying the same."""
    found = None
    for second in range(1, seconds + 1):
        found = lookout.verdict(range(len(pulses)), USUAL, second - 0.5)
        for agent, said in enumerate(pulses):
            aged = said.model_copy(update={"age": said.age + second})
            lookout.hear(agent, aged, float(second))
    return found


@pytest.mark.parametrize(("state", "limit"), [("S", 1800), ("D", 1800), ("T", 60), ("t", 60)])
def test_a_stopped_process_is_not_granted_the_time_of_a_save(state: str, limit: float) -> None:
    def hung_after(seconds: float) -> Hung | None:
        lookout = Lookout(0, now=0.0)
        for now in (1.0, 2.0, seconds):
            saving = Pulse(round=0, rank=0, phase=Phase.SAVE, step=5, age=now, state=state)
            lookout.hear(0, saving, now)
            found = lookout.verdict([0], USUAL, now)
        return found

    assert hung_after(limit) is None
    found = hung_after(limit + 3)
    assert found is not None
    assert found.limit == limit


def test_an_agent_that_says_nothing_may_have_the_one_that_all_wait_for() -> None:
    pulses = [pulse(0, 0), pulse(1, 0)]
    assert verdict_after(heard(*pulses), 70, *pulses) is not None
    lookout = heard(*pulses)
    assert verdict_after(lookout, 70, pulses[0]) is not None  # of one agent alone
    assert lookout.verdict([0, 1], USUAL, 70.5) is None
    assert lookout.silence(1, 70.5) > SILENT_SECONDS
    lookout.start_over(100.0)
    assert lookout.silence(1, 100.5) == 0.5
    assert lookout.verdict([0], USUAL, 100.5) is None


def test_what_was_said_in_another_round_counts_for_nothing() -> None:
    late = pulse(0, 900).model_copy(update={"round": 4})
    assert verdict_after(heard(late), 70, late) is None


def test_ranks_that_are_done_hang_never() -> None:
    done = Pulse(round=0, rank=0, phase=Phase.DONE, step=9, age=10**6)
    saving = Pulse(round=0, rank=1, phase=Phase.SAVE, step=9, age=0)
    assert verdict_after(heard(done), 100, done) is None
    assert verdict_after(heard(done, saving), 100, done, saving) is None
    found = verdict_after(heard(done, saving), 1900, done, saving)
    assert found is not None
    assert (found.rank, found.phase) == (1, Phase.SAVE)


# -- a worker -------------------------------------------------------------------------------------


def test_a_worker_tells_of_its_slowest_rank_and_forgives_what_it_could_not_see() -> None:
    vitals = Vitals()
    vitals.begin_round(2, 8, now=100.0)
    waiting, step = Beat(Phase.WAITING, 0, 0), Beat(Phase.STEP, 5, 104.0)
    assert not vitals.look([step, waiting], 105.0)
    said = vitals.pulse([step, waiting], 105.0)
    assert (said.round, said.rank, said.phase, said.age) == (2, 9, Phase.STARTING, 0)
    vitals.look([step, waiting], 106.0)
    assert vitals.pulse([step, waiting], 106.0).age == 1
    for second in range(107, 117):
        assert not vitals.look([step, step], float(second))
    assert vitals.pulse([step, step], 116.0).age == 9  # since none was behind
    assert vitals.look([step, step], 116.0 + 100 * FROZEN_SECONDS)
    assert vitals.pulse([step, step], 117.0 + 100 * FROZEN_SECONDS).age == 1


# -- worlds in lockstep ---------------------------------------------------------------------------

LIMITS = limits(HangDeadlines(starting=20, load=40, first_step=60, data=40, step=2, save=5), None)
LENGTHS: Mapping[Phase, tuple[float, float]] = {  # at most what is granted, often nearly nothing
    Phase.STARTING: (0.1, 15),
    Phase.LOAD: (0.1, 30),
    Phase.FIRST_STEP: (0.5, 50),
    Phase.DATA: (0.001, 30),
    Phase.STEP: (0.01, 1.5),
    Phase.SAVE: (0.1, 60),  # of which each piece is a sign of life
}


class Moment(NamedTuple):
    """A beat of a simulated rank."""

    at: float
    phase: Phase
    step: int


class Lockstep:
    """Ranks that wait for each other after every phase but that of data."""

    def __init__(self, ranks: int, steps: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.beats: list[list[Moment]] = [[] for _ in range(ranks)]
        self.clock = [0.0] * ranks
        for phase in (Phase.STARTING, Phase.LOAD):
            self._pass(phase, 0)
        for step in range(7, 7 + steps):
            self._pass(Phase.DATA, step, meet=False)
            self._pass(Phase.FIRST_STEP if step == 7 else Phase.STEP, step)
            if self.random.random() < 0.2:
                self._pass(Phase.SAVE, step + 1)
        self.end = max(self.clock)

    def _pass(self, phase: Phase, step: int, *, meet: bool = True) -> None:
        for rank in range(len(self.clock)):
            shortest, longest = LENGTHS[phase]
            slow = self.random.random() < 0.15
            length = self.random.uniform(shortest, longest if slow else 2 * shortest)
            pieces = int(length) + 1 if phase is Phase.SAVE else 1
            for piece in range(pieces):
                moment = self.clock[rank] + piece * length / pieces
                self.beats[rank].append(Moment(moment, phase, step))
            self.clock[rank] += length
        if meet:
            met = max(self.clock)
            self.clock = [met + self.random.uniform(0, 0.3) for _ in self.clock]

    def freeze(self, rank: int, moment: float) -> None:
        """One rank stops for good, and soon all others wait for it."""
        kept = [beat for beat in self.beats[rank] if beat.at <= moment]
        self.beats[rank] = kept
        last = place(kept[-1].phase, kept[-1].step)
        for other, beats in enumerate(self.beats):
            if other == rank:
                continue
            # they may pass the phases that don't wait for anybody, up to the next meeting
            self.beats[other] = [
                b for b in beats if place(b.phase, b.step) <= last or self._alone(b, kept[-1])
            ]

    @staticmethod
    def _alone(beat: Moment, last: Moment) -> bool:
        return (
            last.phase is Phase.DATA
            and beat.phase in (Phase.STEP, Phase.FIRST_STEP)
            and (beat.step == last.step)
        )

    def watch(self, until: float, frozen: int | None = None, since: float = 0.0) -> Hung | None:
        """What the leader says, with pulses that are lost and late, once a second."""
        vitals = [Vitals() for _ in self.beats]
        lookout = Lookout(0, 0.0)
        offset = [self.random.random() for _ in self.beats]
        for agent, one in enumerate(vitals):
            one.begin_round(0, agent, 0.0)
        tenths = range(1, int(until * 10))
        for now in (tenth / 10 for tenth in tenths):
            for agent, one in enumerate(vitals):
                beats = [self._beat(agent, now)]
                one.look(beats, now)
                due = int(now - 0.1 + offset[agent]) != int(now + offset[agent])
                if due and self.random.random() < 0.9:
                    state = "T" if agent == frozen and now >= since else "S"
                    said = one.pulse(beats, now).model_copy(update={"state": state})
                    lookout.hear(agent, said, now)
            if int(now - 0.1) != int(now):
                found = lookout.verdict(range(len(vitals)), LIMITS, now)
                if found is not None:
                    return found
        return None

    def _beat(self, rank: int, now: float) -> Beat:
        moments = self.beats[rank]
        number = bisect_right(moments, now, key=lambda moment: moment.at) - 1
        at, phase, step = moments[max(number, 0)]
        return Beat(phase, step, at)


@pytest.mark.parametrize("seed", range(30))
def test_whoever_is_slow_nobody_is_killed(seed: int) -> None:
    world = Lockstep(ranks=1 + seed % 4, steps=40, seed=seed)
    assert world.watch(world.end) is None


@pytest.mark.parametrize("seed", range(30))
def test_whenever_a_rank_freezes_it_is_found_and_named(seed: int) -> None:
    world = Lockstep(ranks=2 + seed % 3, steps=40, seed=seed)
    rank, moment = seed % 2, world.random.uniform(0, world.end)
    world.freeze(rank, moment)
    last = world.beats[rank][-1]
    longest = max(longest for _, longest in LENGTHS.values())  # that others take to catch up
    found = world.watch(moment + longest + LIMITS[last.phase] + 5, frozen=rank, since=moment)
    assert found is not None
    assert (found.rank, found.phase, found.step) == (rank, last.phase, last.step)
