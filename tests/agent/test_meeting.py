"""The meeting and its members as pure state machines, alone and in a simulated, lossy world."""

import itertools
import random
from collections import deque

import pytest

from pretrain_agent.hang import Pulse, limits
from pretrain_agent.link import Regroup, Start
from pretrain_agent.meeting import (
    HUNG,
    MAX_FAILURES,
    PEER_LOST,
    Done,
    Go,
    Hello,
    Join,
    Leave,
    Letter,
    Meeting,
    Open,
    Opened,
    Over,
    Paused,
    Released,
    Waiting,
    root_cause,
)
from pretrain_agent.member import Member, Saying, State
from pretrain_api.wire import Assignment, ExitCode, Failure, Phase

KILLED = Failure(rank=1, exit_code=137, signal="SIGKILL")
ECHO = Failure(rank=0, exit_code=1, reason=PEER_LOST)


def to_all(message: Go | Leave | Released | Over, size: int = 2) -> list[Letter]:
    return [Letter(rank, message) for rank in range(size)]


def started(size: int = 2, number: int = 0) -> Meeting:
    """A meeting whose round ``number`` is running."""
    meeting = Meeting(1, size)
    for round_number in range(number + 1):
        for rank in range(size):
            meeting.receive(rank, Join(round=round_number))
        meeting.receive(0, Opened(round=round_number, port=1000 + round_number))
    return meeting


def test_all_join_then_the_leader_opens_a_store_then_all_go() -> None:
    meeting = Meeting(1, 2)
    assert meeting.receive(1, Join(round=0)) == []
    assert meeting.receive(0, Join(round=0)) == [Letter(0, Open(round=0))]
    assert meeting.receive(0, Opened(round=0, port=5)) == to_all(Go(round=0, port=5))
    assert meeting.round == 0


def test_the_first_to_leave_a_round_ends_it_for_all_others() -> None:
    meeting = started(3)
    assert meeting.receive(1, Join(round=1, failure=KILLED)) == [
        Letter(0, Over(round=0)),
        Letter(2, Over(round=0)),
    ]


def test_everything_can_be_said_twice() -> None:
    meeting = started()
    meeting.receive(1, Join(round=1, failure=KILLED, step=3))
    meeting.receive(1, Join(round=1, failure=KILLED, step=3))
    assert meeting.receive(0, Join(round=1)) == [Letter(0, Open(round=1))]
    assert meeting.receive(0, Join(round=1)) == [Letter(0, Open(round=1))]
    go = Go(round=1, port=7, failures=1, last_failure=KILLED)
    assert meeting.receive(0, Opened(round=1, port=7)) == to_all(go)
    assert meeting.receive(0, Opened(round=1, port=8)) == []
    assert meeting.receive(1, Join(round=1)) == [Letter(1, go)]


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, Join(round=5)),
        (0, Join(round=-1)),
        (1, Opened(round=1, port=5)),
        (0, Opened(round=1, port=5)),
        (0, Done(round=3)),
    ],
)
def test_what_makes_no_sense_gets_no_answer(rank: int, message: Join | Opened | Done) -> None:
    meeting = started()
    assert meeting.receive(rank, message) == []
    assert meeting.round == 0


def test_an_agent_that_reconnects_learns_what_it_missed() -> None:
    meeting = started()
    hello = Hello(generation=1, rank=0, nonce="")
    assert meeting.receive(0, hello) == []
    meeting.receive(1, Join(round=1, failure=KILLED))
    assert meeting.receive(0, hello) == [Letter(0, Over(round=0))]
    assert meeting.receive(1, hello) == []


def test_ranks_that_saved_and_left_end_nobody_elses_round() -> None:
    meeting = started()
    assert meeting.receive(1, Join(round=1, left=True)) == []
    assert meeting.receive(0, Hello(generation=1, rank=0, nonce="")) == []


@pytest.mark.parametrize(
    ("paused", "ends"),
    [
        (Paused(round=0, left=True), False),  # its peers save at the same step by themselves
        (Paused(round=0), True),  # its ranks were stopped, or one of them failed
        (Paused(round=-1, left=True), True),  # it was told while the round was about to start
    ],
)
def test_a_pause_ends_the_round_of_those_whose_peers_it_takes_away(
    paused: Paused, ends: bool
) -> None:
    meeting = started()
    over = [Letter(0, Over(round=0))] if ends else []
    assert meeting.receive(1, paused) == over
    assert meeting.receive(0, Hello(generation=1, rank=0, nonce="")) == over


def test_no_round_starts_without_one_that_is_paused() -> None:
    meeting = started()
    meeting.receive(1, Join(round=1, left=True))
    assert meeting.receive(1, Paused(round=0, left=True)) == []
    assert meeting.receive(0, Join(round=1, left=True)) == []
    assert meeting.receive(0, Opened(round=1, port=5)) == []
    assert meeting.round == 0


def fail(meeting: Meeting, number: int, step: int, failure: Failure = KILLED) -> list[Letter]:
    """Round ``number`` ends by a failure at rank 1; returns what follows, or the go."""
    meeting.receive(1, Join(round=number + 1, step=step, failure=failure))
    letters = meeting.receive(0, Join(round=number + 1, step=step, failure=ECHO))
    if letters == [Letter(0, Open(round=number + 1))]:
        return meeting.receive(0, Opened(round=number + 1, port=1))
    return letters


def test_failures_without_a_new_step_end_with_the_rank_at_fault() -> None:
    meeting = started()
    for number in range(MAX_FAILURES - 1):
        assert isinstance(fail(meeting, number, step=4)[0].message, Go)
    assert fail(meeting, MAX_FAILURES - 1, step=4) == to_all(
        Leave(failures=MAX_FAILURES, failure=KILLED)
    )
    assert meeting.receive(0, Join(round=9)) == [
        Letter(0, Leave(failures=MAX_FAILURES, failure=KILLED))
    ]


def test_every_new_step_forgives() -> None:
    meeting = started()
    for number in range(5 * MAX_FAILURES):
        assert isinstance(fail(meeting, number, step=number + 1)[0].message, Go)
    assert meeting.failures == 1


def test_regrouping_without_a_failure_counts_nothing() -> None:
    meeting = started()
    for number in range(1, 2 * MAX_FAILURES):
        for rank in range(2):
            meeting.receive(rank, Join(round=number))
        assert isinstance(meeting.receive(0, Opened(round=number, port=1))[0].message, Go)
    assert meeting.failures == 0


@pytest.mark.parametrize("code", [ExitCode.CONFIG, ExitCode.DO_NOT_RETRY])
def test_a_permanent_failure_is_not_tried_again_and_waits_for_nobody(code: ExitCode) -> None:
    failure = Failure(rank=1, exit_code=code)
    letters = started().receive(1, Join(round=1, failure=failure))
    assert letters == to_all(Leave(failures=0, failure=failure))


def test_the_cause_goes_before_its_echo() -> None:
    assert root_cause([]) is None
    assert root_cause([ECHO]) == ECHO
    assert root_cause([ECHO, KILLED]) == KILLED
    other = Failure(rank=3)
    assert root_cause([other, KILLED]) == other


def test_all_are_released_when_all_are_done() -> None:
    meeting = started()
    assert meeting.receive(0, Done(round=0)) == []
    assert meeting.receive(0, Done(round=0)) == []
    assert meeting.receive(1, Done(round=0)) == to_all(Released())


# -- hangs ------------------------------------------------------------------------------------


class Watched:
    """A running round under a clock of its own, with agents that tell where their ranks are."""

    def __init__(self, size: int) -> None:
        self.now = 0.0
        self.meeting = Meeting(1, size, lambda: self.now)
        for rank in range(size):
            self.meeting.receive(rank, Join(round=0))
        self.meeting.receive(0, Opened(round=0, port=1))
        self.places = dict.fromkeys(range(size), (Phase.STEP, 3))
        self.ages = dict.fromkeys(range(size), 0.0)

    def go_on(self, seconds: int) -> list[Letter]:
        """Let time pass; returns what the leader then has to say."""
        for _ in range(seconds):
            self.now += 1
            for rank, (phase, step) in self.places.items():
                self.ages[rank] += 1
                pulse = Pulse(round=0, rank=rank, phase=phase, step=step, age=self.ages[rank])
                self.meeting.receive(rank, pulse)
            if letters := self.meeting.judge(limits(None, 1.0)):
                return letters
        return []


def test_a_hang_ends_the_round_for_all_who_are_in_it_and_is_said_again_on_a_new_connection() -> (
    None
):
    watched = Watched(4)
    watched.places[2] = (Phase.SAVE, 3)
    watched.meeting.receive(3, Paused(round=0, left=True))
    watched.places.pop(3)
    letters = watched.go_on(1900)
    over = letters[0].message
    assert isinstance(over, Over)
    assert over.hung is not None
    assert (over.hung.rank, over.hung.phase, over.hung.limit) == (2, Phase.SAVE, 1800)
    assert letters == [Letter(rank, over) for rank in range(3)]
    assert watched.go_on(100) == []  # one verdict per round
    hello = Hello(generation=1, rank=1, nonce="")
    assert watched.meeting.receive(1, hello) == [Letter(1, over)]


def test_hangs_count_as_failures_and_those_of_one_round_say_nothing_about_the_next() -> None:
    watched, failure = Watched(2), Failure(rank=1, exit_code=1, reason=HUNG)
    assert watched.go_on(100)
    meeting = watched.meeting
    meeting.receive(0, Join(round=1, failure=KILLED))  # killed by whoever ended the round
    meeting.receive(1, Join(round=1, failure=failure))
    go = Go(round=1, port=2, failures=1, last_failure=failure)
    assert meeting.receive(0, Opened(round=1, port=2)) == to_all(go)
    assert meeting.receive(0, Hello(generation=1, rank=0, nonce="")) == []
    assert meeting.judge(limits(None, 1.0)) == []


def test_the_leader_knows_whom_all_wait_for() -> None:
    watched = Watched(3)
    meeting = watched.meeting
    assert watched.go_on(10) == []
    assert meeting.waiting() == Waiting()
    watched.places.pop(1)
    watched.go_on(8)
    assert meeting.waiting() == Waiting((1,), 8.0)  # it is not heard
    meeting.start_over()
    assert meeting.waiting() == Waiting()  # maybe because the leader could not listen
    watched.now += 100
    meeting.receive(0, Join(round=1, failure=KILLED))
    watched.now += 2
    meeting.receive(1, Join(round=1))
    watched.now += 2
    assert meeting.waiting() == Waiting((2,), 4.0)  # it has not joined
    meeting.receive(2, Join(round=1))
    assert meeting.waiting() == Waiting()
    meeting.receive(0, Opened(round=1, port=2))
    assert meeting.waiting() == Waiting()


# -- a member -----------------------------------------------------------------------------------


def assignment(generation: int = 1, rank: int | None = 0, size: int = 1) -> Assignment:
    return Assignment(
        generation=generation, rank=rank, size=size, leader="10.0.0.1:8477", nonce="n"
    )


def running(generation: int = 1) -> Member:
    member = Member()
    member.assign(assignment(generation))
    member.stopped(0, None, False)
    member.hear(Go(round=0, port=5))
    return member


def test_a_member_waits_for_both_the_assignment_and_the_launcher() -> None:
    member = Member()
    assert member.assign(assignment()) == []
    assert member.stopped(0, None, False) == [Join(round=0)]
    (start,) = member.hear(Go(round=0, port=5))
    assert isinstance(start, Start)
    assert (start.host, start.port, start.rank, start.round) == ("10.0.0.1", 5, 0, 0)

    member = Member()
    assert member.stopped(0, None, False) == []
    assert member.assign(assignment()) == [Join(round=0)]


def test_a_member_without_a_place_is_parked_until_it_gets_one() -> None:
    member = Member()
    member.stopped(0, None, False)
    assert member.assign(assignment(1, rank=None)) == []
    assert member.hear(Go(round=0, port=5)) == []
    assert member.assign(assignment(2, rank=1, size=2)) == [Join(round=0)]


def test_a_new_generation_stops_running_ranks_and_forgets_the_old_ones_troubles() -> None:
    member = running()
    assert member.assign(assignment(2)) == [Regroup()]
    assert member.hear(Over(round=0)) == []
    assert member.stopped(9, KILLED, False) == [Join(round=0)]


def test_an_order_alone_moves_nothing() -> None:
    member = running()
    assert member.assign(assignment(1)) == []
    assert member.state is State.RUNNING


def test_a_failure_is_reported_with_the_next_join() -> None:
    member = running()
    assert member.stopped(9, KILLED, False) == [Join(round=1, step=9, failure=KILLED)]
    assert member.hear(Go(round=0, port=5)) == []
    assert member.hear(Open(round=1)) == [Open(round=1)]
    assert member.opened(Opened(round=1, port=3)) == [Opened(round=1, port=3)]
    assert member.opened(Opened(round=0, port=3)) == []


def test_only_the_end_of_the_running_round_regroups() -> None:
    member = running()
    assert member.hear(Over(round=-1)) == []
    assert member.hear(Over(round=0)) == [Regroup()]


def test_a_member_that_is_done_does_not_go_back_to_work() -> None:
    member = running()
    assert member.finished() == [Done(round=0)]
    assert member.hear(Over(round=0)) == [Released()]
    assert member.assign(assignment(2)) == []


def test_a_paused_member_starts_nothing_before_the_next_generation() -> None:
    member = running()
    member.stopped(9, None, True)
    assert member.pause() == [Paused(round=0, left=True)]
    assert member.hear(Go(round=1, port=5)) == []
    assert member.hear(Open(round=1)) == []
    assert member.assign(assignment(1)) == []
    assert member.assign(assignment(2)) == [Join(round=0)]
    assert not member.paused


def test_a_member_may_be_paused_before_it_is_warm_or_has_a_place() -> None:
    member = Member()
    assert member.pause() == []
    member.assign(assignment(1))
    assert member.pause() == []
    assert member.stopped(0, None, False) == [Paused(round=-1)]


# -- all together -------------------------------------------------------------------------------


class Simulation:
    """Members and a meeting in one process; connections break at random and messages get lost."""

    def __init__(self, size: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.meeting = Meeting(1, size)
        self.members = [Member() for _ in range(size)]
        self.standing: list[Join | Paused | Done | None] = [None] * size
        self.up: list[deque[Join | Paused | Opened | Done | Hello]] = [deque() for _ in range(size)]
        self.down: list[deque[Open | Go | Over | Leave | Released]] = [deque() for _ in range(size)]
        self.left: set[int] = set()
        for rank in range(size):
            self.carry_out(rank, self.members[rank].assign(assignment(1, rank, size)))
            self.carry_out(rank, self.members[rank].stopped(0, None, False))

    def carry_out(self, rank: int, sayings: list[Saying]) -> None:
        for saying in sayings:
            match saying:
                case Join() | Paused() | Done():
                    self.standing[rank] = saying
                    self.up[rank].append(saying)
                case Opened():
                    self.up[rank].append(saying)
                case Open():
                    port = self.random.randint(1, 65535)
                    self.carry_out(
                        rank, self.members[rank].opened(Opened(round=saying.round, port=port))
                    )
                case Regroup():
                    self.carry_out(rank, self.members[rank].stopped(0, None, False))
                case Leave() | Released():
                    self.left.add(rank)
                case Start():
                    pass

    def reconnect(self, rank: int) -> None:
        self.up[rank].clear()
        self.down[rank].clear()
        self.up[rank].append(Hello(generation=1, rank=rank, nonce="n"))
        if (standing := self.standing[rank]) is not None:
            self.up[rank].append(standing)

    def deliver(self, rank: int) -> None:
        if self.up[rank]:
            for letter in self.meeting.receive(rank, self.up[rank].popleft()):
                self.down[letter.rank].append(letter.message)
        if self.down[rank]:
            self.carry_out(rank, self.members[rank].hear(self.down[rank].popleft()))

    def settle(self) -> None:
        """Let everybody reconnect once and every message arrive."""
        for rank in range(len(self.members)):
            self.reconnect(rank)
        for _ in range(50 * len(self.members)):
            for rank in range(len(self.members)):
                self.deliver(rank)


def test_who_missed_a_start_is_told_that_the_round_is_over() -> None:
    """Its connection was broken meanwhile; the others have failed in that round and left it."""
    world = Simulation(3, 0)
    turns = itertools.cycle(range(3))
    while world.meeting.round < 0:
        world.deliver(next(turns))
    assert Go in map(type, world.down[2])
    world.down[2].clear()  # never arrives
    for _ in range(9):
        world.deliver(0)
        world.deliver(1)
    world.carry_out(1, world.members[1].stopped(1, KILLED, False))
    for _ in range(9):
        world.deliver(0)
        world.deliver(1)
    assert world.members[0].state is State.STOPPED
    world.reconnect(2)
    for _ in range(60):
        for rank in range(3):
            world.deliver(rank)
    assert {(member.state, member.round) for member in world.members} == {(State.RUNNING, 1)}


@pytest.mark.parametrize("seed", range(60))
def test_whatever_breaks_everybody_ends_up_in_the_same_round(seed: int) -> None:
    size = 1 + seed % 4
    world = Simulation(size, seed)
    for _ in range(300):
        rank = world.random.randrange(size)
        member = world.members[rank]
        choice = world.random.random()
        if choice < 0.05:
            world.reconnect(rank)
        elif choice < 0.08 and member.state is State.RUNNING:
            step = world.meeting.round + 1  # every round trains a step, so nobody gives up
            world.carry_out(rank, member.stopped(step, KILLED, False))
        else:
            world.deliver(rank)
    world.settle()
    assert not world.left
    assert {member.state for member in world.members} == {State.RUNNING}
    assert {member.round for member in world.members} == {world.meeting.round}


@pytest.mark.parametrize("seed", range(40))
def test_whatever_breaks_no_rank_runs_on_without_one_that_is_paused(seed: int) -> None:
    size = 2 + seed % 3
    world = Simulation(size, seed)
    for turn in range(120):
        rank = world.random.randrange(size)
        if turn == seed:
            while world.members[rank].state is State.RUNNING:  # its ranks have left, or failed
                left = world.random.random() < 0.5
                world.carry_out(rank, world.members[rank].stopped(turn, None, left))
            world.carry_out(rank, world.members[rank].pause())
        elif world.random.random() < 0.1:
            world.reconnect(rank)
        else:
            world.deliver(rank)
    world.settle()
    left = any(isinstance(standing, Paused) and standing.left for standing in world.standing)
    states = {member.state for member in world.members}
    assert states <= {State.RUNNING, State.STOPPED}
    assert left or states == {State.STOPPED}
    assert world.meeting.round <= 1
