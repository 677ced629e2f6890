"""The parts of a supervisor one by one: assignment, settings, processes, logs, HTTP, launcher."""

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pretrain_agent import endpoints, launcher, logs, metrics
from pretrain_agent.assignment import AssignmentFile
from pretrain_agent.endpoints import Endpoints
from pretrain_agent.settings import Settings, SettingsError, output_folder
from pretrain_agent.wires import listen
from pretrain_api import names
from pretrain_api.wire import (
    Assignment,
    CheckpointReport,
    HangDeadlines,
    Order,
    Progress,
    WorkerStatus,
)

# -- assignment -----------------------------------------------------------------------------------


def assignment(generation: int, **extra: Any) -> Assignment:
    given = {"rank": 0, "size": 1, "leader": "h:1", "nonce": "n", **extra}
    return Assignment(generation=generation, **given)


def test_only_news_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "assignment"
    file = AssignmentFile(path)
    assert file.poll() is None
    for text in ("", "\n", '{"generation": 1, "rank"', "[]", '{"generation": "x"}', "\0"):
        path.write_text(text)
        assert file.poll() is None
    path.write_bytes(b"\xff\xfe")
    assert file.poll() is None
    path.write_text(assignment(3).to_json())
    assert file.poll() == assignment(3)
    assert file.poll() is None
    path.unlink()
    assert file.poll() is None
    for stale in (assignment(2), assignment(3), assignment(3, rank=1), assignment(3, nonce="x")):
        path.write_text(stale.to_json())
        assert file.poll() is None
    assert file.current == assignment(3)
    path.write_text(assignment(3, orders=Order.DRAIN).to_json())
    assert file.poll() == assignment(3, orders=Order.DRAIN)
    patient = assignment(3, orders=Order.DRAIN, hang=HangDeadlines(data=9))
    path.write_text(patient.to_json())
    assert file.poll() == patient
    path.write_text(assignment(4, rank=None).to_json())
    assert file.poll() == assignment(4, rank=None)
    path.write_text(assignment(5, saved_step=7).to_json())
    assert file.poll() == assignment(5, saved_step=7)
    older = assignment(5, orders=Order.PAUSE)  # by an operator that was rolled back
    path.write_text(older.to_json())
    assert file.poll() == older


def test_a_newer_operators_fields_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "assignment"
    path.write_text(json.dumps({**json.loads(assignment(1).to_json()), "color": "blue"}))
    assert AssignmentFile(path).poll() == assignment(1)


# -- settings -------------------------------------------------------------------------------------


def test_an_empty_environment_means_a_pod() -> None:
    settings = Settings.from_environment({})
    assert settings.config == Path("/etc/pretrain/config/run.json")
    assert settings.assignment == Path("/etc/pretrain/podinfo/assignment")
    assert (settings.http_port, settings.meeting_port) == (names.HTTP_PORT, names.MEETING_PORT)
    assert settings.termination_log == Path("/dev/termination-log")
    assert settings.processes == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (names.ENV_PROCESSES, "0"),
        (names.ENV_PROCESSES, "two"),
        (names.ENV_HTTP_PORT, "70000"),
        (names.ENV_MEETING_PORT, "-1"),
        (names.ENV_GRACE_SECONDS, "soon"),
        (names.ENV_GRACE_SECONDS, "nan"),
        (names.ENV_GRACE_SECONDS, "-3"),
        ("PRETRAIN_ENTRY_POINT", "module"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        Settings.from_environment({name: value})


def test_a_wrong_environment_ends_the_worker_with_a_reason(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        names.ENV_PROCESSES: "many",
        names.ENV_TERMINATION_LOG: str(tmp_path / "log"),
    }
    code = subprocess.run([sys.executable, "-m", "pretrain_agent"], env=environment).returncode
    assert code == 78
    assert names.ENV_PROCESSES in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ('{"job": {"dump_folder": "/out"}}', Path("/out")),
        ('{"job": {"dump_folder": null}}', None),
        ('{"job": []}', None),
        ("[]", None),
        ("{", None),
        (None, None),
    ],
)
def test_the_folder_of_the_run_is_taken_from_its_configuration(
    tmp_path: Path, text: str | None, folder: Path | None
) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert output_folder(tmp_path / "run.json") == folder


# -- processes ------------------------------------------------------------------------------------

FAMILY = """
import os, subprocess, sys, time
from pretrain_agent import process
process.adopt_orphans()
# a child that leaves a grandchild in a session of its own behind, and ends
script = "import subprocess; subprocess.Popen(['sleep', '300'], start_new_session=True)"
subprocess.run([sys.executable, "-c", script])
while not any(m.parent == os.getpid() for m in process.descendants(os.getpid())):
    time.sleep(0.01)
left = [m.pid for m in process.descendants(os.getpid())]
print(*left, flush=True)
sys.exit(len(process.kill_descendants(5)))
"""


def test_orphans_in_sessions_of_their_own_are_adopted_and_killed() -> None:
    ran = subprocess.run([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, check=True)
    (pid,) = ran.stdout.split()
    assert not Path(f"/proc/{int(pid)}").exists()


DYING = """
import subprocess, sys, time
child = "import time; from pretrain_agent.process import die_with_parent; die_with_parent();" \\
    "print('ready', flush=True); time.sleep(300)"
print(subprocess.Popen([sys.executable, "-c", child]).pid, flush=True)
time.sleep(300)
"""


def test_a_child_dies_with_its_killed_parent(world: Any) -> None:
    parent = subprocess.Popen([sys.executable, "-c", DYING], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    (pid,) = [int(line) for line in lines if line.isdigit()]
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.wait()
    world.until(lambda: not world.is_alive(pid), "the child to die", 10)


# -- logs -----------------------------------------------------------------------------------------


def test_lines_of_rank_0_are_plain_others_numbered_and_the_tail_is_kept(tmp_path: Path) -> None:
    out = io.BytesIO()
    pump = logs.LogPump(tmp_path, 2, out)
    pump.start()
    for first_rank in (0, 2):
        pump.begin_round(first_rank)
        for local_rank in range(2):
            with logs.pipe_path(tmp_path, local_rank).open("wb") as pipe:
                pipe.write(f"one from {local_rank}\n".encode() + b"\xff\n")
                pipe.write(b"x" * (logs.LINE_BYTES + 1))
                pipe.write(b"\nend\n")
        pump.flush()
    assert pump.tail(1)[0] == "one from 1"
    assert pump.tail(1)[-1] == "end"
    assert pump.tail(1)[1] == "\ufffd"
    pump.close()
    text = out.getvalue()
    for line in (b"one from 0", b"[rank 1] one from 1", b"[rank 2] one from 0", b"[rank 3] end"):
        assert b"\n" + line + b"\n" in b"\n" + text


# -- http -----------------------------------------------------------------------------------------


class FakeWorker:
    turn = 0.0
    warm = False
    restart_seconds: float | None = None

    def status(self) -> WorkerStatus:
        checkpoint = CheckpointReport(step=8, time=1.5, path="step-8", bytes=1000, seconds=0.5)
        progress = Progress(
            step=9, steps=10, tokens=900, loss=2.5, first_loss=9.0, mfu=0.4, checkpoint=checkpoint
        )
        return WorkerStatus(
            generation=2, step=9, restarts_in_place=3, progress=progress, warm=self.warm
        )


@pytest.fixture
def served() -> Any:
    sock = listen("127.0.0.1", 0)
    worker = FakeWorker()
    server = Endpoints(sock, worker)
    server.start()
    yield worker, f"http://127.0.0.1:{sock.getsockname()[1]}"
    server.shutdown()
    server.server_close()


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_status_and_health_are_served(served: Any) -> None:
    worker, url = served
    code, body = get(f"{url}/status")
    assert code == 200
    assert WorkerStatus.model_validate_json(body) == worker.status()
    worker.turn = time.monotonic()
    assert get(f"{url}/healthz")[0] == 200
    assert get(f"{url}/readyz")[0] == 503
    worker.warm = True
    assert get(f"{url}/readyz")[0] == 200
    worker.turn = time.monotonic() - 2 * endpoints.STALL_SECONDS
    assert get(f"{url}/healthz")[0] == 503
    assert get(f"{url}/readyz")[0] == 503
    assert get(f"{url}/etc/passwd")[0] == 404
    request = urllib.request.Request(f"{url}/status", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(request, timeout=20)


def test_silent_clients_do_not_keep_others_out_for_long(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = served
    monkeypatch.setattr(endpoints, "CONNECTION_SECONDS", 0.3)
    port = int(url.rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(40)]
    deadline = time.monotonic() + 20
    while True:
        try:
            assert get(f"{url}/status")[0] == 200
            break
        except (OSError, urllib.error.URLError):
            assert time.monotonic() < deadline
    for client in silent:
        client.close()


def test_metrics_parse_and_keep_prometheus_conventions() -> None:
    text = metrics.render(FakeWorker().status(), 0.5).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name, family in families.items():
        assert name.startswith("pretrain_")
        assert family.documentation.endswith(".")
        assert family.type == "gauge" or name == "pretrain_restarts_in_place"
        assert not name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert not any(unit in name for unit in ("millisecond", "minute", "percent", "kilobyte"))
    values = {name: family.samples[0].value for name, family in families.items()}
    assert values["pretrain_loss"] == 2.5
    assert values["pretrain_mfu_ratio"] == 0.4
    assert values["pretrain_checkpoint_step"] == 8
    assert values["pretrain_restarts_in_place"] == 3
    assert values["pretrain_restart_seconds"] == 0.5
    assert "pretrain_grad_norm" not in values  # not known yet: no sample rather than a zero


# -- launcher -------------------------------------------------------------------------------------

CHOOSE = """
from pretrain_agent import launcher
from pathlib import Path
if __name__ == "__main__":
    launcher.PRELOAD = launcher.PRELOAD[:1]  # what else ranks need takes seconds to import
    launcher.prepare_environment(2)
    launcher.start_fork_server("poisoned:main", Path("run.json"))
    print(launcher.choose_start_method())
"""
POISON = {
    "touches CUDA": "import torch; torch.cuda._is_in_bad_fork = lambda: True",
    "is broken": "raise RuntimeError('no')",
    "is fine": "def main(config): ...",
}


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        ({}, []),
        ({"model": {"converters": []}, "parallelism": {"pipeline_parallel_degree": 1}}, []),
        ({"model": {"converters": ["x"]}}, ["pretrain_trainer.precision.ao"]),
        (
            {"parallelism": {"pipeline_parallel_degree": 2}},
            ["pretrain_trainer.parallel.pipeline"],
        ),
        (["no sections"], []),
        (None, []),
    ],
)
def test_the_fork_server_imports_what_a_run_uses(
    tmp_path: Path, config: Any, modules: list[str]
) -> None:
    path = tmp_path / "run.json"
    if config is not None:
        path.write_text(json.dumps(config))
    assert launcher.asked_for(path) == modules


@pytest.mark.parametrize(
    ("what", "expected"),
    [("touches CUDA", "spawn"), ("is broken", "spawn"), ("is fine", "forkserver")],
)
def test_ranks_are_spawned_when_the_fork_server_is_unusable(
    world: Any, tmp_path: Path, what: str, expected: str
) -> None:
    (tmp_path / "poisoned.py").write_text(POISON[what] + "\n")
    (tmp_path / "choose.py").write_text(CHOOSE)
    environment = world.environment(**{names.ENV_BOARD: str(tmp_path / "board")})
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "choose.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ran.stdout.split() == [expected]
    if expected == "spawn":
        assert "restarts of ranks will be slow" in ran.stderr


def test_the_supervisor_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, pretrain_agent.__main__;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules;"
        "print(open('/proc/self/status').read())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Not ru_maxrss: exec carries over what the test process itself held at the fork.
    peak = next(line for line in ran.stdout.splitlines() if line.startswith("VmHWM:"))
    assert int(peak.split()[1]) < 64 * 1024  # KiB
