"""``pretrain import``: a torchtitan TOML file as a PretrainJob."""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pretrain_api import names
from pretrain_api.schema import alias
from pretrain_api.support import UNBUILT
from pretrain_cli.documents import Document, UnreadableError, read_toml
from pretrain_cli.validate import check_config, check_job

# Keys with a meaning on one machine only; the operator sets what they say.
_LOCAL_KEYS = ("config_file", "dump_folder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("file", type=Path, metavar="FILE", help="TOML file")
    parser.add_argument("--name", help="name of the job (default: the file's)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="pods (default: 1)")
    parser.add_argument(
        "--processes-per-worker", type=int, default=1, metavar="N",
        help="processes in each pod, one per GPU (default: 1)",
    )  # fmt: skip
    parser.add_argument("--gpus", action="store_true", help="give every process a GPU")
    parser.add_argument("--image", help="trainer image (default: the operator's)")
    parser.add_argument("--storage", default="100Gi", help="checkpoint volume (default: 100Gi)")
    parser.add_argument("--claim", metavar="NAME", help="claim that exists, instead of a new one")


def run(options: argparse.Namespace) -> int:
    """Print the job; 1 if the file, or the job, has problems."""
    try:
        document, notes = without_observers(read_toml(options.file))
    except UnreadableError as error:
        print(error, file=sys.stderr)
        return 1
    if problems := check_config(document):
        print(*(problem.render(document) for problem in problems), sep="\n", file=sys.stderr)
        return 1
    job = build(document.data, options)
    if problems := check_job(Document("the job", job)):
        rendered = (problem.render(Document("the job", job)) for problem in problems)
        print(*rendered, sep="\n", file=sys.stderr)
        return 1
    for note in (*notes, *_relative_paths(document.data)):
        print(note, file=sys.stderr)
    print(yaml.safe_dump(job, sort_keys=False), end="")
    return 0


def without_observers(document: Document) -> tuple[Document, list[str]]:
    """The file without what would only show how training goes and isn't built, a note for each.

    torchtitan's own files switch some of it on. Training is the same without, so that they can be
    taken over; what isn't built and changes what is trained is refused.
    """
    data = dict(document.data)
    notes: list[str] = []
    for entry in (entry for entry in UNBUILT if entry.observes):
        section, key = entry.path.split(".")
        keys = data.get(section)
        if isinstance(keys, dict) and keys.get(key, entry.inactive[0]) not in entry.inactive:
            data[section] = {name: value for name, value in keys.items() if name != key}
            notes.append(f"note: {entry.path} is left out, because it is not supported yet")
    return replace(document, data=data), notes


def build(config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The job as plain data: only the keys the file has, plus workers and volume."""
    sections = {name: dict(section) for name, section in config.items()}
    for key in _LOCAL_KEYS:
        sections.get("job", {}).pop(key, None)
    spec = _camel({name: section for name, section in sections.items() if section})
    spec["workers"] = _workers(options)
    if config.get("checkpoint", {}).get("enable"):
        spec["volumes"] = {"checkpoint": _volume(options)}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": options.name or _job_name(options.file)},
        "spec": spec,
    }


def _workers(options: argparse.Namespace) -> dict[str, Any]:
    workers: dict[str, Any] = {
        "replicas": options.workers,
        "processesPerWorker": options.processes_per_worker,
    }
    if options.image:
        workers["image"] = options.image
    if options.gpus:
        workers["resources"] = {"limits": {"nvidia.com/gpu": options.processes_per_worker}}
    return workers


def _volume(options: argparse.Namespace) -> dict[str, Any]:
    if options.claim:
        return {"claimName": options.claim}
    return {"claimTemplate": {"storage": options.storage}}


def _camel(data: Any) -> Any:
    if isinstance(data, dict):
        return {alias(key): _camel(value) for key, value in data.items()}
    return data


def _job_name(path: Path) -> str:
    """The file's name in the form names of objects have."""
    return re.sub(r"[^a-z0-9]+", "-", path.stem.lower())[: names.MAX_JOB_NAME].strip("-") or "job"


def _relative_paths(config: dict[str, Any]) -> list[str]:
    """Notes about paths that mean something else in a pod."""
    used = (("model", "hf_assets_path"), ("training", "dataset_path"))
    return [
        f"note: {section}.{key} is {value!r}; in a pod it must be a path of the image or a volume"
        for section, key in used
        if (value := config.get(section, {}).get(key)) and not value.startswith("/")
    ]
