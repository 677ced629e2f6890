"""``pretrain validate``: everything that is wrong with a file, without a cluster."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain_api import mesh, names
from pretrain_api.config import RunConfig
from pretrain_api.job import PretrainJob
from pretrain_cli.documents import Document, UnreadableError, is_toml, read_toml, read_yaml
from pretrain_cli.problems import Problem, find_problems
from pretrain_cli.vocabulary import Vocabulary

_JOB = Vocabulary(PretrainJob, camel=True)
_CONFIG = Vocabulary(RunConfig, camel=False)


def run(options: argparse.Namespace) -> int:
    """Check every file; 1 if any has a problem."""
    bad = False
    for path in options.files:
        for line, is_problem in check_file(path):
            bad |= is_problem
            print(line, file=sys.stderr if is_problem else sys.stdout)
    return int(bad)


def check_file(path: Path) -> Iterator[tuple[str, bool]]:
    """Lines to print about one file, and whether each tells a problem."""
    try:
        documents = [read_toml(path)] if is_toml(path) else read_yaml(path)
    except UnreadableError as error:
        yield str(error), True
        return
    check = check_config if is_toml(path) else check_job
    jobs = [document for document in documents if is_toml(path) or is_job(document)]
    if not jobs:
        yield f"{path}: holds no {names.KIND}", True
    for document in jobs:
        problems = check(document)
        yield from ((problem.render(document), True) for problem in problems)
        if not problems:
            said = _summary(document, is_toml(path))
            yield from ((f"{path}: {words}", False) for words in said)


def is_job(document: Document) -> bool:
    """Whether a document seems meant as a PretrainJob; other kinds may stand beside it."""
    data = document.data
    if not isinstance(data, dict):
        return True
    group = str(data.get("apiVersion", names.GROUP)).split("/")[0]
    return data.get("kind") == names.KIND or group == names.GROUP


def check_job(document: Document) -> list[Problem]:
    """Problems of a document that should be a PretrainJob."""
    return _in_order(document, find_problems(PretrainJob, document.data, _JOB))


def check_config(document: Document) -> list[Problem]:
    """Problems of a document that should be a run configuration, in any world it could run in."""
    problems = _in_order(document, find_problems(RunConfig, document.data, _CONFIG))
    return problems or _arithmetic(RunConfig.model_validate(document.data))


def _in_order(document: Document, problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: document.line(problem.path) or 0)


def _arithmetic(config: RunConfig) -> list[Problem]:
    """What can't come out even however many ranks there are."""
    try:
        mesh.batch_plan(config, mesh.smallest_world(config.parallelism))
    except mesh.MeshError as error:
        return [Problem(tuple(error.key.split(".")), error.message)]
    return []


def _summary(document: Document, toml: bool) -> list[str]:
    """What a valid document is, and what in it is allowed and hardly meant."""
    data: Any = document.data
    if toml:
        config = RunConfig.model_validate(data)
        model, steps = config.model, config.training.steps
        return [f"valid ({model.name} {model.flavor}, {steps} steps)"]
    job = PretrainJob.model_validate(data)
    workers = job.spec.workers
    plan = mesh.batch_plan(job.run_config(), workers.replicas * workers.processes_per_worker)
    said = (
        f"{job.metadata.name or 'job'} is valid ({workers.replicas} x "
        f"{workers.processes_per_worker} processes, {plan.global_batch_size} sequences per step "
        f"in {plan.accumulation_steps} passes)"
    )
    return [said, *([f"note: {workers.idle_gpus}"] if workers.idle_gpus else [])]
