"""What a worker says about its end: causes, exit codes, the termination message."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from pretrain_agent import agent, cgroup, rank, termination
from pretrain_agent.failures import (
    TAIL_BYTES,
    blame,
    of_launcher,
    shell_code,
    signal_name,
    tail_text,
)
from pretrain_agent.meeting import PEER_LOST
from pretrain_api.wire import (
    CheckpointReport,
    ExitCode,
    Failure,
    Progress,
    Result,
    SkippedCheckpoint,
    TerminationMessage,
)

ECHO = Failure(exit_code=1, reason=PEER_LOST, message="Connection closed by peer")
WORDS = Failure(exit_code=1, message="ValueError: broken")


KILLED = Failure(exit_code=137, signal="SIGKILL", message="killed by SIGKILL")
NO_SERVER = Failure(exit_code=255, reason="Launcher", message="the fork server died")
ABORTED = Failure(exit_code=134, signal="SIGABRT", message="killed by SIGABRT")
EARLY = Failure(exit_code=1, message="left with exit code 0 before the training was done")
NO_WORD = Failure(exit_code=6, message="left with exit code 6 and no word")


@pytest.mark.parametrize(
    ("exits", "words", "blamed", "expected"),
    [
        ({0: -9}, {}, 4, KILLED),
        ({1: -9}, {0: ECHO}, 5, KILLED),
        ({0: 1}, {0: ECHO, 1: WORDS}, 5, WORDS),
        ({0: 1}, {0: ECHO}, 4, ECHO),
        ({0: -6, 1: -9}, {}, 5, KILLED),
        ({0: -6, 1: 1}, {0: ECHO, 1: WORDS}, 5, WORDS),
        ({0: -6, 1: 1}, {1: ECHO}, 4, ABORTED),
        ({0: 255}, {}, 4, NO_SERVER),
        ({0: 0}, {}, 4, EARLY),
        ({0: 6}, {}, 4, NO_WORD),
        ({0: 143, 1: 1}, {1: WORDS}, 5, WORDS),
    ],
)
def test_the_first_cause_is_blamed(
    exits: dict[int, int], words: dict[int, Failure], blamed: int, expected: Failure
) -> None:
    failure = blame(exits, words, {}, first_rank=4, out_of_memory=False)
    assert failure == expected.model_copy(update={"rank": blamed})


class CheckpointError(RuntimeError):
    """Has the name of the trainer's, and so its meaning."""


class DamagedError(CheckpointError):
    """An error of the rank's own."""


@pytest.mark.parametrize(
    ("error", "echo"),
    [
        (DistStoreError("wait timeout after 60000ms"), True),
        (DistNetworkError("connection reset"), True),
        (DistBackendError("NCCL error: remote process exited"), True),
        (ConnectionResetError(), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer"), True),
        (CheckpointError("rank 3 failed: OSError: disk full"), True),
        (DamagedError("step-3 is damaged"), False),
        (RuntimeError("shapes do not match"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_losing_a_peer_is_told_from_errors_of_ones_own(error: Exception, echo: bool) -> None:
    assert rank._is_echo(error) is echo


@pytest.mark.parametrize("exits", [{}, {0: 143, 1: 143}])
def test_nobody_is_blamed_for_saving_and_leaving(exits: dict[int, int]) -> None:
    assert blame(exits, {}, {}, first_rank=4, out_of_memory=False) is None


def test_out_of_memory_is_told_apart_from_other_kills() -> None:
    failure = blame({0: -9}, {}, {}, 0, out_of_memory=True)
    assert failure is not None
    assert failure.reason == "OOMKilled"
    failure = blame({0: -11}, {}, {}, 0, out_of_memory=True)
    assert failure is not None
    assert (failure.reason, failure.signal) == ("RankFailed", "SIGSEGV")


@pytest.mark.parametrize(
    ("code", "fault", "out_of_memory", "reason"),
    [
        (-9, "", True, "OOMKilled"),
        (-9, "", False, "Launcher"),
        (-9, "ranks could not be killed", True, "Launcher"),  # we did it ourselves
        (1, "", True, "Launcher"),
    ],
)
def test_the_kernel_may_choose_what_ranks_are_made_by(
    code: int, fault: str, out_of_memory: bool, reason: str
) -> None:
    assert of_launcher(code, fault, [], out_of_memory).reason == reason
    server = blame({0: 255}, {}, {}, 0, out_of_memory=out_of_memory)
    assert server is not None
    assert server.reason == ("OOMKilled" if out_of_memory else "Launcher")


def test_words_without_text_or_code_are_completed_from_what_was_seen() -> None:
    words = {0: Failure(exit_code=78, reason="Config"), 1: Failure(message="odd")}
    failure = blame({0: 78}, words, {0: "a\nrun.json: no such flavor"}, 0, out_of_memory=False)
    assert failure == Failure(
        rank=0, exit_code=78, reason="Config", message="a\nrun.json: no such flavor"
    )
    failure = blame({1: -6}, {1: words[1]}, {}, 0, out_of_memory=False)
    assert failure is not None
    assert failure.exit_code == 134


def test_exit_codes_and_signals_have_the_shells_numbers_and_names() -> None:
    assert [shell_code(code) for code in (0, 7, -9, -15)] == [0, 7, 137, 143]
    assert (signal_name(11), signal_name(99)) == ("SIGSEGV", "signal 99")


def test_a_tail_has_the_last_whole_lines() -> None:
    assert tail_text([]) == ""
    assert tail_text(["a", "b"]) == "a\nb"
    lines = [f"line {number} " + "x" * 100 for number in range(100)]
    tail = tail_text(lines)
    assert len(tail.encode()) <= TAIL_BYTES
    assert tail.splitlines() == lines[-len(tail.splitlines()) :]


@pytest.mark.parametrize(
    ("code", "result", "exit_code"),
    [
        (78, Result.CONFIG, 78),
        (93, Result.FAILED, 93),
        (7, Result.FAILED, 7),
        (137, Result.FAILED, 137),
        (143, Result.FAILED, 1),  # killed by someone's SIGTERM: not a free preemption
        (0, Result.FAILED, 1),
        (None, Result.FAILED, 1),
    ],
)
def test_a_failure_never_looks_like_something_better(
    code: int | None, result: Result, exit_code: int
) -> None:
    outcome = termination.failed(Failure(exit_code=code))
    assert (outcome.result, outcome.exit_code) == (result, exit_code)


def test_the_message_fits_whatever_it_has_to_say(tmp_path: Path) -> None:
    skipped = tuple(SkippedCheckpoint(step=n, reason="bit flip in a chunk " * 5) for n in range(50))
    checkpoint = CheckpointReport(step=9, time=1.0, path="step-9", bytes=10)
    message = TerminationMessage(
        result=Result.FAILED,
        exit_code=7,
        progress=Progress(step=10, steps=20, checkpoint=checkpoint, skipped=skipped),
        failure=Failure(rank=3, exit_code=7, message='"\n\u0001' * 3000),
    )
    termination.write(tmp_path / "log", message)
    data = (tmp_path / "log").read_bytes()
    assert len(data) <= 4096
    back = TerminationMessage.model_validate_json(data)
    assert back.progress.checkpoint == checkpoint
    assert back.failure is not None
    assert (back.progress.step, back.failure.rank) == (10, 3)
    assert back.exit_code == 7


def test_a_message_that_can_not_be_written_does_not_hide_the_end(tmp_path: Path) -> None:
    message = TerminationMessage(result=Result.COMPLETE, exit_code=ExitCode.OK)
    termination.write(tmp_path / "missing" / "log", message)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("cgroup_line", "counter", "content"),
    [
        ("0::/", "memory.events", "low 0\noom 2\noom_kill 3\n"),
        ("0::/kubepods/pod1/abc", "kubepods/pod1/abc/memory.events", "oom 1\noom_kill 3\n"),
        ("0::/kubepods/pod1/abc", "memory.events", "oom_kill 3\n"),
        ("9:memory:/pod1", "memory/pod1/memory.oom_control", "under_oom 0\noom_kill 3\n"),
        ("9:cpu,memory:/pod1", "memory/memory.oom_control", "oom_kill_disable 0\noom_kill 3\n"),
    ],
)
def test_kills_for_memory_are_counted_in_either_version_of_cgroups(
    tmp_path: Path, cgroup_line: str, counter: str, content: str
) -> None:
    proc = tmp_path / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(f"4:pids:/x\n{cgroup_line}\n")
    file = tmp_path / "sys/fs/cgroup" / counter
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert cgroup.oom_kills(tmp_path) == 3


def test_without_a_counter_nothing_was_killed(tmp_path: Path) -> None:
    assert cgroup.oom_kills(tmp_path) == 0
    assert cgroup.oom_kills() >= 0


class Ending:
    """A rank's process that was about to end with ``code``; None: it ran, and is killed."""

    def __init__(self, code: int | None) -> None:
        self._code = -signal.SIGKILL if code is None else code
        self.exitcode: int | None = None

    def kill(self) -> None: ...

    def join(self, timeout: float) -> None:
        self.exitcode = self._code


@pytest.mark.parametrize(
    ("codes", "kept"),
    [
        ([None, 78], {1: 78}),
        ([-signal.SIGSEGV, None], {0: -signal.SIGSEGV}),
        ([None, None], {}),
        ([0, ExitCode.PREEMPTED], {}),  # no failures
    ],
)
def test_a_rank_that_ended_by_itself_keeps_its_code_though_it_was_to_be_stopped(
    monkeypatch: pytest.MonkeyPatch, codes: list[int | None], kept: dict[int, int]
) -> None:
    """Its peers lost it, left their round, and have it stopped before its exit is seen."""
    monkeypatch.setattr(agent.LocalElasticAgent, "_stop_workers", lambda *_: None)
    stopping = agent.Agent.__new__(agent.Agent)
    processes = [Ending(code) for code in codes]
    monkeypatch.setattr(stopping, "_processes", lambda: processes)
    stopping._rendezvous_with_exits = SimpleNamespace(exits={})
    stopping._stop_workers(SimpleNamespace())
    assert stopping._rendezvous_with_exits.exits == kept
