"""Decisions of a supervisor, made in this process: its launcher is a socket, its ranks a board."""

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain_agent import launching, process
from pretrain_agent.hang import Hung
from pretrain_agent.link import Finished, Regroup, Start, Stopped
from pretrain_agent.meeting import Go, Join, Over
from pretrain_agent.member import State
from pretrain_agent.settings import Settings
from pretrain_agent.supervisor import Supervisor
from pretrain_api import names
from pretrain_api.wire import (
    Assignment,
    CheckpointReport,
    Failure,
    Order,
    Phase,
    Progress,
    Result,
    TerminationMessage,
)


@pytest.fixture
def unpatched(tmp_path: Path) -> Iterator[Supervisor]:
    environment = {
        names.ENV_ASSIGNMENT: str(tmp_path / "assignment"),
        names.ENV_TERMINATION_LOG: str(tmp_path / "termination"),
        names.ENV_HTTP_PORT: "0",
        names.ENV_MEETING_PORT: "0",
        names.ENV_HOST: "127.0.0.1",
    }
    created = Supervisor(Settings.from_environment(environment))
    yield created
    shutil.rmtree(created.directory, ignore_errors=True)


@pytest.fixture
def supervisor(unpatched: Supervisor, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """A supervisor that starts nothing and kills nothing."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(unpatched.launcher, "start", lambda: ours)
    monkeypatch.setattr(process, "adopt_orphans", lambda: None)
    monkeypatch.setattr(process, "reap", dict)
    monkeypatch.setattr(process, "kill_descendants", lambda timeout: [])
    with theirs:
        yield unpatched


def message(supervisor: Supervisor) -> TerminationMessage:
    return TerminationMessage.model_validate_json(supervisor.settings.termination_log.read_bytes())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.005)


async def while_running(
    supervisor: Supervisor, scenario: Callable[[], Coroutine[None, None, None]]
) -> int:
    """Run it, let something happen, send SIGTERM; returns the exit code."""
    turn = supervisor.turn
    task = asyncio.create_task(supervisor.run())
    await until(lambda: supervisor.turn != turn)
    await scenario()
    signal.raise_signal(signal.SIGTERM)
    async with asyncio.timeout(20):
        return await task


def test_the_message_is_there_before_processes_stuck_in_storage_are_waited_for(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TerminationMessage] = []

    def stuck(timeout: float) -> list[process.Process]:
        seen.append(message(supervisor))
        supervisor.board.put_progress(Progress(step=9))  # its save ended after all
        return []

    monkeypatch.setattr(process, "kill_descendants", stuck)
    supervisor.board.put_progress(Progress(step=8))

    async def nothing() -> None: ...

    assert asyncio.run(while_running(supervisor, nothing)) == 143
    assert [(early.result, early.progress.step) for early in seen] == [(Result.PREEMPTED, 8)]
    assert message(supervisor).progress.step == 9


@pytest.mark.parametrize(("done", "result"), [(True, Result.COMPLETE), (False, Result.FAILED)])
def test_a_launcher_that_dies_after_its_ranks_are_done_spoils_nothing(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, done: bool, result: Result
) -> None:
    launcher = subprocess.Popen(["sleep", "300"])
    monkeypatch.setattr(supervisor.launcher, "_process", launcher)
    monkeypatch.setattr(process, "reap", lambda: {launcher.pid: launcher.wait()})

    async def scenario() -> None:
        if done:
            supervisor.board.publish(0, Phase.DONE, 5)
            supervisor.member.state = State.FINISHED
        launcher.kill()
        await until(lambda: supervisor._outcome is not None and supervisor._outcome.done())

    asyncio.run(while_running(supervisor, scenario))
    assert message(supervisor).result is result


def assign(supervisor: Supervisor, generation: int, rank: int | None, **extra: Any) -> None:
    assignment = Assignment(
        generation=generation, rank=rank, size=2, leader="127.0.0.1:9", nonce="n", **extra
    )
    supervisor.settings.assignment.write_text(assignment.to_json())


@pytest.mark.parametrize(("rank", "known"), [(0, 8), (1, 0), (None, 0)])
@pytest.mark.parametrize("running", [True, False])
def test_progress_is_forgotten_where_rank_0_is_no_longer(
    supervisor: Supervisor, rank: int | None, known: int, running: bool
) -> None:
    async def scenario() -> None:
        assign(supervisor, 1, rank=0)
        await until(lambda: supervisor.status().generation == 1)
        supervisor.member.state = State.RUNNING if running else State.STOPPED
        supervisor.board.put_progress(Progress(step=8))
        assign(supervisor, 2, rank=rank)
        await until(lambda: supervisor.status().generation == 2)
        if running:
            assert supervisor.status().progress.step == 8  # its writer may still be at it
            await supervisor._hear_launcher(Stopped())
        assert supervisor.status().progress.step == known

    asyncio.run(while_running(supervisor, scenario))
    assert message(supervisor).progress.step == known


def test_an_order_to_save_ends_with_the_save(supervisor: Supervisor) -> None:
    board = supervisor.board

    def at(step: int, saved: int) -> None:
        checkpoint = CheckpointReport(step=saved, time=1.0, path="here", bytes=1)
        board.put_progress(Progress(step=step, checkpoint=checkpoint))

    async def watched() -> None:
        """A whole turn of the loop later."""
        for _ in range(2):
            turn = supervisor.turn
            await until(lambda turn=turn: supervisor.turn != turn)

    async def scenario() -> None:
        at(step=8, saved=6)
        assign(supervisor, 1, rank=0, orders=Order.SAVE)
        await until(lambda: board.order is Order.SAVE)
        at(step=9, saved=7)  # what was on its way when the order came does not answer it
        await watched()
        assert board.order is Order.SAVE
        at(step=9, saved=9)
        await until(lambda: board.order is Order.NONE)
        assign(supervisor, 2, rank=0, orders=Order.SAVE)  # stands in the operator's word
        await until(lambda: supervisor.status().generation == 2)
        assert board.order is Order.NONE
        assign(supervisor, 2, rank=0)
        await until(lambda: supervisor.orders.wanted is Order.NONE)
        at(step=20, saved=9)
        assign(supervisor, 2, rank=0, orders=Order.SAVE)  # is another one
        await until(lambda: board.order is Order.SAVE)
        await watched()
        assert board.order is Order.SAVE

    asyncio.run(while_running(supervisor, scenario))


@pytest.mark.parametrize("failure", [None, Failure(exit_code=5, message="broken")])
def test_a_pause_keeps_the_worker_for_its_next_generation(
    supervisor: Supervisor, failure: Failure | None
) -> None:
    board = supervisor.board

    async def scenario() -> None:
        assign(supervisor, 1, rank=0)
        await until(lambda: supervisor.status().generation == 1)
        supervisor.member.state = State.RUNNING
        assign(supervisor, 1, rank=0, orders=Order.PAUSE)
        await until(lambda: board.order is Order.DRAIN)  # what ranks know
        assert not supervisor.status().paused
        if failure is not None:
            board.put_failure(0, failure)
        await supervisor._hear_launcher(Stopped(exits={0: 143 if failure is None else 5}))
        status = supervisor.status()
        assert (status.paused, status.draining) == (True, False)
        assert supervisor._outcome is not None
        assert not supervisor._outcome.done()
        assert (status.last_failure is None) == (failure is None)
        assert board.order is Order.NONE  # the next generation's ranks are to stay
        assign(supervisor, 1, rank=0)
        await until(lambda: supervisor.orders.wanted is Order.NONE)
        assert supervisor.status().paused  # taken back too late
        assign(supervisor, 2, rank=0)
        await until(lambda: not supervisor.status().paused)

    assert asyncio.run(while_running(supervisor, scenario)) == 143


@pytest.mark.parametrize("state", [State.WARMING, State.STOPPED])
def test_a_worker_without_running_ranks_pauses_at_once(
    supervisor: Supervisor, state: State
) -> None:
    async def scenario() -> None:
        supervisor.member.state = state
        assign(supervisor, 1, rank=0, orders=Order.PAUSE)
        await until(lambda: supervisor.status().paused)
        assert supervisor.board.order is Order.NONE

    assert asyncio.run(while_running(supervisor, scenario)) == 143
    assert message(supervisor).result is Result.PREEMPTED


@pytest.mark.parametrize("order", [Order.DRAIN, Order.STOP])
def test_a_paused_worker_leaves_at_once_when_asked(supervisor: Supervisor, order: Order) -> None:
    async def scenario() -> None:
        supervisor.member.state = State.STOPPED
        assign(supervisor, 1, rank=0, orders=Order.PAUSE)
        await until(lambda: supervisor.status().paused)
        assign(supervisor, 1, rank=0, orders=order)
        await until(lambda: supervisor._outcome is not None and supervisor._outcome.done())

    assert asyncio.run(while_running(supervisor, scenario)) == 143


HUNG = Hung(rank=0, phase=Phase.STEP, step=5, seconds=61, limit=60)


@pytest.mark.parametrize("mine", [True, False])
def test_a_hang_is_reported_by_the_worker_of_the_rank_after_all_have_stopped(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, mine: bool
) -> None:
    said: list[object] = []
    hung = HUNG if mine else HUNG.model_copy(update={"rank": 1})

    async def scenario() -> None:
        monkeypatch.setattr(supervisor.launcher, "tell", said.append)
        assign(supervisor, 1, rank=0)
        await until(lambda: supervisor.client is not None)
        assert supervisor.client is not None
        monkeypatch.setattr(supervisor.client, "say", said.append)
        await supervisor._hear_launcher(Stopped())
        supervisor._hear_leader(Go(round=0, port=5))
        supervisor.board.publish(0, Phase.STEP, 5)
        supervisor._hear_leader(Over(round=0, hung=hung))
        supervisor._hear_leader(Over(round=0, hung=hung))  # the leader repeats itself
        await until(lambda: Regroup() in said)
        await supervisor._hear_launcher(Stopped())
        assert said.count(Regroup()) == 1
        (join,) = [m for m in said if isinstance(m, Join) and m.round == 1]
        assert (join.failure is not None) is mine
        if join.failure is not None:
            assert (join.failure.reason, join.failure.rank) == ("Hung", 0)
        # it was about that round only
        supervisor._hear_leader(Go(round=1, port=5))
        await supervisor._hear_launcher(Stopped(exits={0: 7}))
        joins = [m for m in said if isinstance(m, Join) and m.round == 2]
        assert [m.failure and m.failure.exit_code for m in joins] == [7]

    asyncio.run(while_running(supervisor, scenario))


def test_a_verdict_that_a_new_generation_overtakes_stops_nothing(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []
    taken = asyncio.Event()

    async def take(*_: object) -> Failure:
        await taken.wait()
        return Failure(reason="Hung")

    async def scenario() -> None:
        monkeypatch.setattr(supervisor.launcher, "tell", said.append)
        monkeypatch.setattr(supervisor.evidence, "take", take)
        assign(supervisor, 1, rank=0)
        await until(lambda: supervisor.client is not None)
        await supervisor._hear_launcher(Stopped())
        supervisor._hear_leader(Go(round=0, port=5))
        supervisor._hear_leader(Over(round=0, hung=HUNG))
        assign(supervisor, 2, rank=0)
        await until(lambda: supervisor.status().generation == 2)
        await supervisor._hear_launcher(Stopped())
        supervisor._hear_leader(Go(round=0, port=6))
        said.clear()
        taken.set()
        assert supervisor._condemning is not None
        await supervisor._condemning
        assert said == []
        assert supervisor.member.state is State.RUNNING
        supervisor.member.state = State.STOPPED  # so that SIGTERM waits for nobody

    asyncio.run(while_running(supervisor, scenario))


@pytest.mark.parametrize("ranks_run", [True, False])
def test_a_launcher_that_does_not_stop_its_ranks_is_killed(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, ranks_run: bool
) -> None:
    stuck = subprocess.Popen(["sleep", "300"])
    launcher = supervisor.launcher
    monkeypatch.setattr(launcher, "_process", stuck)
    limit = "REGROUP_SECONDS" if ranks_run else "REGROUP_STARTING_SECONDS"
    monkeypatch.setattr(launching, limit, 0.0)

    def reap() -> dict[int, int]:
        return {} if (code := stuck.poll()) is None else {stuck.pid: code}

    monkeypatch.setattr(process, "reap", reap)

    async def scenario() -> None:
        assert supervisor._outcome is not None
        if ranks_run:
            supervisor.board.publish(0, Phase.STEP, 5)
        launcher.tell(Start(generation=1, round=0, rank=0, size=1, host="h", port=1, nonce=""))
        launcher.kill_if_stuck(ranks_run)
        assert stuck.poll() is None  # it was not told to stop any
        launcher.tell(Regroup())
        await until(supervisor._outcome.done)

    asyncio.run(while_running(supervisor, scenario))
    failure = message(supervisor).failure
    assert failure is not None
    assert (failure.reason, failure.signal) == ("Launcher", None)
    assert "did not stop its ranks within 0 s" in failure.message


@pytest.mark.parametrize("who", ["leader", "operator"])
def test_ranks_that_have_stopped_are_not_stopped_again(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Nobody would say that they have: the launcher would be killed for it in the next round."""
    logs_are_read = threading.Event()
    monkeypatch.setattr(supervisor.pump, "flush", lambda: logs_are_read.wait(20))

    async def scenario() -> None:
        assign(supervisor, 1, rank=0)
        await until(lambda: supervisor.status().generation == 1)
        supervisor.member.state, supervisor.member.round = State.RUNNING, 0
        stopping = asyncio.create_task(supervisor._hear_launcher(Stopped(exits={0: 1})))
        await asyncio.sleep(0)
        if who == "leader":  # another worker was faster
            supervisor._hear_leader(Over(round=0))
        else:
            assign(supervisor, 2, rank=0)
            await until(lambda: supervisor.status().generation == 2)
        logs_are_read.set()
        await stopping
        assert supervisor.member.state is State.STOPPED
        assert supervisor.launcher._regrouping is None

    assert asyncio.run(while_running(supervisor, scenario)) == 143


def running(supervisor: Supervisor, phase: Phase, step: int) -> None:
    """Its ranks run in round 0 of the generation it was assigned."""
    supervisor.member.state, supervisor.member.round = State.RUNNING, 0
    supervisor.member._started_in = supervisor.status().generation
    supervisor.board.publish(0, phase, step)


@pytest.mark.parametrize("code", [1, -signal.SIGABRT])
def test_ranks_that_fail_after_they_are_done_have_trained_to_the_end(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Taking process groups down may fail; restarted, they would find nothing to train."""
    monkeypatch.setattr("pretrain_agent.supervisor.BARRIER_SECONDS", 0.0)

    async def scenario() -> None:
        assign(supervisor, 1, rank=0)
        await until(lambda: supervisor.status().generation == 1)
        running(supervisor, Phase.DONE, 100)
        await supervisor._hear_launcher(Stopped(exits={0: code}))
        assert supervisor.member.state is State.FINISHED
        assert supervisor._outcome is not None
        await until(supervisor._outcome.done)

    assert asyncio.run(while_running(supervisor, scenario)) == 0
    assert message(supervisor).result is Result.COMPLETE


@pytest.mark.parametrize("how", ["grace", "again", "stop"])
def test_who_has_trained_to_the_end_is_not_preempted(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def scenario() -> None:
        assign(supervisor, 1, rank=0)
        await until(lambda: supervisor.status().generation == 1)
        running(supervisor, Phase.SAVE, 100)
        assert supervisor._outcome is not None
        if how == "stop":
            supervisor.board.publish(0, Phase.DONE, 100)
            assign(supervisor, 1, rank=0, orders=Order.STOP)
        else:
            signal.raise_signal(signal.SIGTERM)
            await until(lambda: supervisor.orders.terminating)
            supervisor.board.publish(0, Phase.DONE, 100)
            await supervisor._hear_launcher(Finished())  # and waits for the others
            if how == "again":
                signal.raise_signal(signal.SIGTERM)
            else:
                monkeypatch.setattr(supervisor.orders, "overdue", lambda _: True)
        await until(supervisor._outcome.done)

    assert asyncio.run(while_running(supervisor, scenario)) == 0
    said = message(supervisor)
    assert (said.result, said.failure) == (Result.COMPLETE, None)


def test_a_rank_that_hangs_in_the_kernel_is_blamed_and_not_the_launcher(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = subprocess.Popen(["sleep", "300"])
    monkeypatch.setattr(supervisor.launcher, "_process", launcher)
    hung = Failure(rank=0, exit_code=1, reason="Hung", message="no sign of life for 61 s")

    async def scenario() -> None:
        assign(supervisor, 1, rank=0)
        await until(lambda: supervisor.status().generation == 1)
        running(supervisor, Phase.STEP, 7)
        supervisor._hung = hung
        supervisor._say([Regroup()])
        monkeypatch.setattr(launching, "REGROUP_SECONDS", 0.0)
        monkeypatch.setattr(launching, "REGROUP_STARTING_SECONDS", 0.0)
        assert supervisor._outcome is not None
        await until(lambda: launcher.poll() is not None)
        monkeypatch.setattr(process, "reap", lambda: {launcher.pid: -signal.SIGKILL})
        signal.raise_signal(signal.SIGCHLD)
        await until(supervisor._outcome.done)

    asyncio.run(while_running(supervisor, scenario))
    assert message(supervisor).failure == hung


def test_a_launcher_that_never_gets_warm_ends_the_worker(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = supervisor.launcher
    stuck = subprocess.Popen(["sleep", "300"])
    monkeypatch.setattr(launcher, "_process", stuck)
    monkeypatch.setattr(launcher, "_warming", time.monotonic())
    launcher.kill_if_stuck(ranks_run=False)
    assert not launcher.fault
    monkeypatch.setattr(launching, "WARM_SECONDS", 0.0)
    launcher.kill_if_stuck(ranks_run=False)
    assert stuck.wait(20) == -signal.SIGKILL
    assert launcher.fault == "the launcher was not ready to start ranks within 0 s"
    stuck.returncode = None  # as if another one had been started
    launcher.is_warm()
    launcher.fault = ""
    launcher.kill_if_stuck(ranks_run=False)
    assert not launcher.fault


def test_ranks_that_are_done_and_do_not_end_are_not_waited_for(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain_agent.supervisor.BARRIER_SECONDS", 0.0)

    async def scenario() -> None:
        assert supervisor._outcome is not None
        supervisor.member.state = State.RUNNING
        supervisor.board.publish(0, Phase.DONE, 5)
        turn = supervisor.turn
        await until(lambda: supervisor.turn != turn)
        assert supervisor.member.state is State.RUNNING  # they get some time
        monkeypatch.setattr("pretrain_agent.supervisor.EXIT_SECONDS", 0.0)
        await until(supervisor._outcome.done)

    assert asyncio.run(while_running(supervisor, scenario)) == 0
    assert message(supervisor).result is Result.COMPLETE


def test_time_in_which_nobody_could_run_is_not_the_launchers(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = supervisor.launcher
    launcher.tell(Regroup())
    began = launcher._regrouping
    supervisor._look(supervisor.turn + 1.0)
    assert launcher._regrouping == began
    supervisor._look(supervisor.turn + 1000.0)
    assert launcher._regrouping is not None
    assert began is not None
    assert launcher._regrouping > began


@pytest.mark.parametrize(("watched", "told"), [(True, "1"), (False, "")])
def test_ranks_are_told_whether_a_person_watches(
    unpatched: Supervisor, monkeypatch: pytest.MonkeyPatch, watched: bool, told: str
) -> None:
    given: dict[str, str] = {}

    def popen(command: list[str], **options: Any) -> None:
        given.update(options["env"])

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: watched)
    unpatched.launcher.start().close()
    assert given[names.ENV_TERMINAL] == told
