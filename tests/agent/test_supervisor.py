"""Decisions of a supervisor, made in this process: its launcher is a socket, its ranks a board."""

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain_agent import process
from pretrain_agent.link import Stopped
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
