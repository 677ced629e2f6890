"""Processes are found, ended and told apart from strangers that got the same number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain_devcluster import daemons
from pretrain_devcluster.layout import CONTROL, Layout
from pretrain_devcluster.shell import CommandError, DevclusterError, run, stream, wait_until


class HereDaemon(daemons.Daemon):
    """Runs in the machine's own namespace, so that no right is needed."""

    @property
    def command(self) -> list[str]:
        return list(self.argv)


def sleeper(seconds: int = 60) -> HereDaemon:
    return HereDaemon("sleeper", CONTROL, ("sleep", str(seconds)))


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Layout]:
    yield (folders := Layout(tmp_path))
    for name in daemons.recorded(folders):
        daemons.stop(folders, name, sharply=True)


def test_a_running_daemon_is_kept(folders: Layout) -> None:
    assert daemons.ensure(folders, sleeper())
    first = daemons.running(folders, "sleeper")
    assert not daemons.ensure(folders, sleeper())
    assert daemons.running(folders, "sleeper") == first


def test_a_daemon_with_another_command_is_replaced(folders: Layout) -> None:
    daemons.ensure(folders, sleeper(60))
    first = daemons.running(folders, "sleeper")
    assert daemons.ensure(folders, sleeper(61))
    assert daemons.running(folders, "sleeper") not in (None, first)


def test_a_dead_daemon_is_started_again(folders: Layout) -> None:
    daemons.ensure(folders, sleeper())
    pid = daemons.running(folders, "sleeper")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: daemons.running(folders, "sleeper") is None, "it is dead", 5)
    assert daemons.ensure(folders, sleeper())


def test_a_stranger_with_the_same_number_is_left_alone(folders: Layout) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        folders.run.mkdir(parents=True)
        record = {"pid": stranger.pid, "start_time": "1", "command": ["sleep", "60"]}
        (folders.run / "sleeper.json").write_text(json.dumps(record))
        assert daemons.running(folders, "sleeper") is None
        daemons.stop(folders, "sleeper", sharply=True)
        assert stranger.poll() is None
        stranger.kill()


def test_a_daemon_that_ignores_a_polite_request_is_killed(folders: Layout, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = (
        "import pathlib, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "while True: signal.pause()\n"
    )
    daemons.ensure(folders, HereDaemon("stubborn", CONTROL, (sys.executable, "-c", script)))
    wait_until(ready.exists, "it ignores SIGTERM", 10)
    daemons.stop(folders, "stubborn")
    assert daemons.running(folders, "stubborn") is None
    assert daemons.recorded(folders) == []


def test_the_end_of_a_dead_daemons_log_is_shown(folders: Layout) -> None:
    shell = ("sh", "-c", "echo the port is taken; exit 3")
    daemons.ensure(folders, HereDaemon("brief", CONTROL, shell))
    wait_until(lambda: daemons.running(folders, "brief") is None, "it has ended", 5)
    with pytest.raises(DevclusterError, match=r"brief ended unexpectedly.*the port is taken"):
        daemons.require_alive(folders, "brief")


def test_a_daemon_that_ended_before_its_start_was_noted_is_dead(folders: Layout) -> None:
    folders.run.mkdir(parents=True)
    record = {"pid": 2**22 + 1, "start_time": None, "command": ["gone"]}
    (folders.run / "brief.json").write_text(json.dumps(record))
    assert daemons.running(folders, "brief") is None


def test_a_half_written_record_counts_as_no_daemon(folders: Layout) -> None:
    folders.run.mkdir(parents=True)
    (folders.run / "sleeper.json").write_text('{"pid": 1')
    assert daemons.running(folders, "sleeper") is None


def test_a_failed_command_says_what_it_wrote() -> None:
    with pytest.raises(CommandError, match="status 4: went wrong") as caught:
        run("sh", "-c", "echo went wrong >&2; exit 4")
    assert caught.value.returncode == 4


def test_a_missing_program_is_named() -> None:
    with pytest.raises(DevclusterError, match="no-such-program is not there"):
        run("no-such-program")


def test_lines_of_a_long_command_arrive_before_it_fails() -> None:
    lines: list[str] = []
    with pytest.raises(CommandError, match="two"):
        stream(["sh", "-c", "echo one; echo two; exit 1"], lines.append)
    assert lines == ["one", "two"]


def test_waiting_ends_with_what_was_waited_for() -> None:
    with pytest.raises(DevclusterError, match="until pigs fly"):
        wait_until(lambda: False, "pigs fly", 0.01, poll=0.001)


@pytest.mark.parametrize("spare", [True, False])
def test_only_strangers_in_a_namespace_are_killed(
    spare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        monkeypatch.setattr(
            daemons, "members", lambda _: [process.pid] if process.poll() is None else []
        )
        daemons.kill_members("any", spared={process.pid, None} if spare else ())
        assert process.poll() == (None if spare else -signal.SIGKILL)
        process.kill()
