"""``pretrain run`` gives an agent on this machine what the operator gives one in a pod."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain_api import names
from pretrain_api.config import RunConfig
from pretrain_api.wire import Assignment
from pretrain_cli import local, samples, workdir
from pretrain_cli.options import parse_overrides, split_options

JOB = """\
apiVersion: pretrain.dev/v1alpha1
kind: PretrainJob
metadata: {name: demo}
spec:
  training: {dataset: text, datasetPath: /opt/pretrain/sample/text, localBatchSize: 2, steps: 9}
  workers: {replicas: 2, processesPerWorker: 2}
"""

# Stands in for the real agent: says what it got, and ends as it is told.
AGENT = """\
import json, os, pathlib, signal, sys, time
def end(number, frame):
    answer("preempted", 143)
def answer(result, code):
    message = {"result": result, "progress": {"step": 3, "steps": 9, "loss": 2.5}}
    pathlib.Path(os.environ["PRETRAIN_TERMINATION_LOG"]).write_text(json.dumps(message))
    sys.exit(code)
signal.signal(signal.SIGTERM, end)
print(json.dumps({k: v for k, v in os.environ.items() if k.startswith("PRETRAIN_")}), flush=True)
print(pathlib.Path(os.environ["PRETRAIN_CONFIG"]).read_text().replace("\\n", " "), flush=True)
print(pathlib.Path(os.environ["PRETRAIN_ASSIGNMENT"]).read_text(), flush=True)
code = int(os.environ.get("FAKE_CODE", "0"))
if code == 1000:
    signal.pause()
elif code:
    sys.exit(code)
answer("complete", 0)
"""


def load(file: str | None, line: str = "", nproc: int | None = None) -> tuple[RunConfig, int]:
    path = Path(file) if file else None
    return local.load(path, nproc, parse_overrides(split_options(line.split())[1]))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    return "job.yaml"


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_job_keeps_its_batch_and_samples_on_one_machine(job: str) -> None:
    config, processes = load(job)
    assert processes == 2
    assert config.training.global_batch_size == 8
    assert config.training.data_streams == 8
    assert config.job.dump_folder == "./outputs/demo"


def test_options_win_over_the_job(job: str) -> None:
    config, processes = load(job, "--training.steps 3 --job.dump_folder x", nproc=4)
    assert (config.training.steps, config.job.dump_folder, processes) == (3, "x", 4)
    assert config.training.local_batch_size == 2


def test_toml_and_options_in_torchtitans_manner(llama3_8b: Path) -> None:
    line = f"--job.config_file {llama3_8b} --training.steps 20 --model.flavor debugmodel"
    config, processes = load(None, line)
    assert processes == 1
    assert (config.training.steps, config.model.flavor) == (20, "debugmodel")
    assert config.optimizer.lr == 3e-4
    assert config.job.config_file is None


def test_a_seed_checkpoint_can_be_asked_for_as_documented(llama3_8b: Path) -> None:
    config, _ = load(
        str(llama3_8b),
        "--checkpoint.enable --checkpoint.create_seed_checkpoint "
        "--parallelism.data_parallel_replicate_degree 1 "
        "--parallelism.data_parallel_shard_degree 1 --parallelism.tensor_parallel_degree 1 "
        "--parallelism.pipeline_parallel_degree 1 --parallelism.context_parallel_degree 1 "
        "--parallelism.expert_parallel_degree 1",
    )
    assert config.checkpoint.create_seed_checkpoint


@pytest.mark.parametrize(
    ("visible", "expected"), [("0,1,2", 3), ("", 1), ("-1", 1), ("GPU-abc", 1)]
)
def test_one_process_per_visible_gpu(
    llama3_8b: Path, monkeypatch: pytest.MonkeyPatch, visible: str, expected: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert load(str(llama3_8b))[1] == expected


@pytest.mark.parametrize(
    ("line", "nproc", "sentence"),
    [
        ("--training.steps ten", None, "--training.steps: must be a whole number, not 'ten'"),
        ("--training.seq_len 0", None, "--training.seq_len: must be at least 1, not 0"),
        (
            "--fault_tolerance.enable",
            None,
            "--fault_tolerance.enable: true is not supported yet; leave it at false",
        ),
        (
            "--parallelism.data_parallel_shard_degree 4",
            3,
            "parallelism.data_parallel_shard_degree: 4 doesn't fill 3 ranks; use -1 or 3 (with 3 "
            "processes; --nproc changes that)",
        ),
        ("", 0, "--nproc: must be at least 1, not 0"),
        ("--job.config_file other.toml", None, "--job.config_file: "),
    ],
)
def test_refusals_name_the_option(
    llama3_8b: Path, line: str, nproc: int | None, sentence: str
) -> None:
    with pytest.raises(local.RefusedError) as caught:
        load(str(llama3_8b), line, nproc)
    assert str(caught.value).startswith(sentence)


def test_refusals_name_the_line_of_the_file(pretrain: Callable[..., Any]) -> None:
    Path("job.yaml").write_text(JOB.replace("steps: 9", "stepz: 9"))
    outcome = pretrain("run", "job.yaml")
    assert outcome.code == 1
    assert outcome.err == "job.yaml:5: spec.training.stepz: unknown key; did you mean steps?\n"


def test_nothing_to_train_on_is_told(pretrain: Callable[..., Any]) -> None:
    outcome = pretrain("run", "--training.steps", "3")
    assert outcome.code == 1
    assert outcome.err.startswith("options: training.dataset: is missing; Where samples come from")


def test_two_jobs_in_a_file_are_one_too_many(pretrain: Callable[..., Any]) -> None:
    Path("job.yaml").write_text(f"{JOB}---\n{JOB}")
    outcome = pretrain("run", "job.yaml")
    assert outcome.err == "job.yaml: must hold exactly one PretrainJob, not 2\n"


def test_samples_of_the_image_are_found_in_the_checkout(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = load(str(repository / "manifests/examples/01-one-worker.yaml"))
    assert config.training.dataset_path is not None
    assert Path(config.training.dataset_path).exists()
    assert Path(config.model.hf_assets_path, "tokenizer.json").is_file()
    assert f"for {names.SAMPLE_DIR}/tokenizer" in capsys.readouterr().err


def test_paths_of_ones_own_are_left_alone(llama3_8b: Path) -> None:
    config, _ = load(str(llama3_8b), "--training.dataset text --training.dataset_path mine")
    assert config.training.dataset_path == "mine"
    assert config.model.hf_assets_path == "./assets/hf/Llama-3.1-8B"
    assert samples.substituted(config) == config


def test_the_same_folder_is_the_same_job(tmp_path: Path, llama3_8b: Path) -> None:
    config, _ = load(str(llama3_8b))
    uids = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        uids.append(workdir.prepare(folder, config, 1).environment[names.ENV_JOB_UID])
    assert uids[0] == uids[1]


@pytest.fixture
def command(tmp_path: Path, job: str) -> Callable[..., subprocess.Popen[str]]:
    """Starts ``pretrain run`` in a process, with the stand-in for an agent."""
    package = tmp_path / "fake" / "pretrain_agent"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(AGENT)

    def start(*options: str, code: int = 0) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(package.parent), *sys.path])
        return subprocess.Popen(
            [sys.executable, "-m", "pretrain_cli", "run", job, *options],
            env={**os.environ, "PYTHONPATH": path, "FAKE_CODE": str(code)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_the_agent_gets_what_a_pod_would(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = command("--training.steps", "4")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    variables, config, assignment = (json.loads(line) for line in out.splitlines())
    assert variables[names.ENV_PROCESSES] == "2"
    assert variables[names.ENV_JOB_NAME] == "demo"
    assert RunConfig.model_validate(config).training.steps == 4
    place = Assignment.model_validate(assignment)
    assert (place.rank, place.size) == (0, 1)
    assert place.leader == f"127.0.0.1:{variables[names.ENV_MEETING_PORT]}"
    assert variables[names.ENV_HTTP_PORT] != variables[names.ENV_MEETING_PORT]
    assert err.endswith("complete: step 3 of 9, loss 2.5000\n")
    assert not Path(variables[names.ENV_CONFIG]).exists()


def test_the_exit_code_is_the_agents(command: Callable[..., subprocess.Popen[str]]) -> None:
    process = command(code=78)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 78
    assert err.endswith("the agent ended with exit code 78 and left no message\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_become_a_save(
    command: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = command(code=1000)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "saving; press Ctrl-C again to stop without saving" in err
    assert err.endswith("preempted: step 3 of 9: exit code 143\n")


@pytest.mark.slow
def test_the_documentations_file_trains_a_toy_and_resumes(
    pretrain: Callable[..., Any], llama3_8b: Path, repository: Path, tmp_path: Path
) -> None:
    """The real agent and trainer, on this machine's CPU."""
    assets = repository / "tests/assets"
    options = (
        "--job.config_file", str(llama3_8b), "--model.flavor", "debugmodel",
        "--model.hf_assets_path", str(assets / "tokenizer"), "--training.dataset", "text",
        "--training.dataset_path", str(assets / "text"), "--training.seq_len", "32",
        "--training.local_batch_size", "1", "--training.mixed_precision_param", "float32",
        "--metrics.log_freq", "1", "--checkpoint.no_last_save_model_only",
    )  # fmt: skip
    first = pretrain("run", *options, "--training.steps", "2")
    assert first.code == 0, first.err
    assert "complete: step 2 of 2" in first.err
    second = pretrain("run", *options, "--training.steps", "3")
    assert second.code == 0, second.err
    assert "complete: step 3 of 3" in second.err
    assert (tmp_path / "outputs/checkpoint/step-3/manifest.json").is_file()
