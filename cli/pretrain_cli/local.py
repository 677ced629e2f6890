"""``pretrain run``: the same agent and trainer as in a cluster, on this machine.

What the operator gives a pod through volumes and annotations, this gives the agent through files in
a temporary folder: the configuration, and an assignment that makes it the only worker of the first
generation. Everything after that is the same code.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain_api.config import RunConfig
from pretrain_api.job import PretrainJob
from pretrain_api.mesh import MeshError, batch_plan
from pretrain_api.wire import Result, TerminationMessage
from pretrain_cli import samples, workdir
from pretrain_cli.documents import Document, UnreadableError, is_toml, read_toml, read_yaml
from pretrain_cli.options import OptionError, Override, keys, merge, parse_overrides
from pretrain_cli.problems import Problem, find_problems
from pretrain_cli.validate import check_job, is_job
from pretrain_cli.vocabulary import Vocabulary


class RefusedError(Exception):
    """The run can't start; the message says why, a line per problem."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command that are no keys of the configuration."""
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="PretrainJob or TOML")
    parser.add_argument(
        "--nproc", type=int, metavar="N",
        help="processes (default: the job's processesPerWorker, or one per GPU, or 1)",
    )  # fmt: skip


def run(options: argparse.Namespace, overrides: list[Override]) -> int:
    """Train to the end; the exit code is the agent's."""
    try:
        config, processes = load(options.file, options.nproc, parse_overrides(overrides))
        _check_installed()
    except (RefusedError, OptionError, UnreadableError) as error:
        print(error, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="pretrain-") as folder:
        files = workdir.prepare(Path(folder), config, processes)
        code = _supervise(files.environment)
        print(_ending(files.termination_log, code), file=sys.stderr)
        return code


def load(file: Path | None, nproc: int | None, overrides: dict[str, Any]) -> tuple[RunConfig, int]:
    """The configuration and the number of processes.

    Raises RefusedError with every problem of the file and the options.
    """
    if nproc is not None and nproc < 1:
        raise RefusedError(f"--nproc: must be at least 1, not {nproc}")
    named = overrides.get("job", {}).pop("config_file", None)
    if named and file:
        raise RefusedError(f"--job.config_file: {file} is given as well; name one file")
    path = Path(named) if named else file
    if path is None or is_toml(path):
        document = read_toml(path) if path else Document("options", {})
        processes = nproc or _visible_gpus() or 1
    else:
        job = read_job(path)
        processes = nproc or job.spec.workers.processes_per_worker
        name = job.metadata.name or path.stem
        config = job.run_config(f"./outputs/{name}")
        document = Document(str(path), config.model_dump(mode="json"))
    config = validated(document, overrides)
    _check_mesh(config, processes)
    return samples.substituted(config), processes


def read_job(path: Path) -> PretrainJob:
    """The one job in a file. Raises RefusedError with its problems, or if there isn't one."""
    jobs = [document for document in read_yaml(path) if is_job(document)]
    if len(jobs) != 1:
        raise RefusedError(f"{path}: must hold exactly one PretrainJob, not {len(jobs)}")
    if problems := check_job(jobs[0]):
        raise RefusedError("\n".join(problem.render(jobs[0]) for problem in problems))
    return PretrainJob.model_validate(jobs[0].data)


def validated(document: Document, overrides: dict[str, Any]) -> RunConfig:
    """The configuration of a document and options. Raises RefusedError with their problems."""
    data = merge(document.data, overrides)
    problems = find_problems(RunConfig, data, Vocabulary(RunConfig, camel=False))
    if problems:
        from_options = set(keys(overrides))
        raise RefusedError("\n".join(_render(p, document, from_options) for p in problems))
    return RunConfig.model_validate(data)


def _render(problem: Problem, document: Document, from_options: set[tuple[str | int, ...]]) -> str:
    if problem.path in from_options:
        return f"--{'.'.join(map(str, problem.path))}: {problem.sentence}"
    return problem.render(document)


def _check_mesh(config: RunConfig, processes: int) -> None:
    try:
        batch_plan(config, processes)
    except MeshError as error:
        raise RefusedError(f"{error} (with {processes} processes; --nproc changes that)") from error


def _check_installed() -> None:
    if find_spec("pretrain_agent") is None or find_spec("torch") is None:
        raise RefusedError(
            "training needs the extra 'trainer' of this package, which is not installed here"
        )


def _visible_gpus() -> int:
    """GPUs this process may use, told without torch, whose import takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()])


def _supervise(environment: dict[str, str]) -> int:
    """Run the agent to its end: it saves at the first signal, and leaves at once at the second."""
    agent: subprocess.Popen[bytes] | None = None
    signals = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            print("\nsaving; press Ctrl-C again to stop without saving", file=sys.stderr)
        if agent is not None:
            agent.send_signal(signal.SIGTERM)

    # Before the agent starts, so that no signal can leave it behind without us.
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        agent = subprocess.Popen(
            [sys.executable, "-m", "pretrain_agent"],
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C reaches the agent through us alone, as a SIGTERM
        )
        if signals:
            agent.send_signal(signal.SIGTERM)
        code = agent.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def _ending(path: Path, code: int) -> str:
    """One line about how it went, from what the agent left behind."""
    try:
        message = TerminationMessage.model_validate_json(path.read_text())
    except (OSError, ValueError):
        return f"the agent ended with exit code {code} and left no message"
    progress = message.progress
    reached = f"step {progress.step} of {progress.steps}"
    loss = f", loss {progress.loss:.4f}" if progress.loss is not None else ""
    saved = f", checkpoint {progress.checkpoint.path}" if progress.checkpoint else ""
    if message.result is Result.COMPLETE:
        return f"complete: {reached}{loss}{saved}"
    reason = message.failure.message if message.failure else f"exit code {code}"
    return f"{message.result}: {reached}{saved}: {reason}"
