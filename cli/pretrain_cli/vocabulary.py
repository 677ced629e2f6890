"""All keys there are, to name the nearest when one is unknown.

Two spellings are kept apart: a file in snake_case is answered in snake_case, one in camelCase in
camelCase. Names that torchtitan's older releases used lead to their successors.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pretrain_cli.documents import KeyPath

# Keys of older torchtitan releases, and other habits.
_SUCCESSORS = {
    "batch_size": "training.local_batch_size",
    "data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "enable_checkpoint": "checkpoint.enable",
    "float8": "quantize.linear.float8",
    "learning_rate": "optimizer.lr",
    "lr_min": "lr_scheduler.min_lr_factor",
    "max_steps": "training.steps",
    "mx": "quantize.linear.mx",
    "nproc_per_node": "workers.processes_per_worker",
    "sequence_length": "training.seq_len",
    "warmup": "lr_scheduler.warmup_steps",
}


class Vocabulary:
    """The keys of a model and of everything below it."""

    def __init__(self, model: type[BaseModel], *, camel: bool) -> None:
        self._camel = camel
        self._fields = dict(self._walk(model, ()))

    def spell(self, path: KeyPath, data: Any) -> KeyPath:
        """The path as the user spelled it: pydantic tells aliases, files may hold either."""
        spelled: list[str | int] = []
        for part in path:
            snake = self._snake(part)
            is_used = isinstance(data, dict) and part not in data
            use_snake = not self._camel or (is_used and snake in data)
            spelled.append(snake if use_snake else part)
            data = self._below(data, part, snake)
        return tuple(spelled)

    def describe(self, path: KeyPath) -> str:
        """First sentence of a key's description."""
        field = self._fields.get(_keys(path))
        text = " ".join((field.description or "").split()) if field else ""
        return text.split(". ")[0].rstrip(".") or "add it"

    def settings(self) -> Iterator[tuple[str, FieldInfo]]:
        """Dotted path and field of every key that has a value, sections left out."""
        for path, field in self._fields.items():
            if not any(_models(field.annotation)):
                yield ".".join(path), field

    def nearest(self, path: KeyPath) -> str | None:
        """The known key most like an unknown one: a neighbour, or else the same name elsewhere."""
        *parents, key = _keys(path)
        successor = _SUCCESSORS.get(self._snake(key))
        if successor and (found := self._find(successor)):
            return found
        near = [p for p in self._fields if p[:-1] == tuple(parents)]
        if match := get_close_matches(key, [p[-1] for p in near], n=1):
            return match[0]
        names = {p[-1]: ".".join(p) for p in reversed(self._fields) if len(p) > 1}
        match = get_close_matches(key, names, n=1, cutoff=0.75)
        return names[match[0]] if match else None

    def _find(self, dotted: str) -> str | None:
        """The full path that ends in a snake_case path, in this vocabulary's spelling."""
        for path in self._fields:
            text = ".".join(self._snake(part) for part in path)
            if text == dotted or text.endswith(f".{dotted}"):
                return ".".join(path)
        return None

    def _walk(
        self, model: type[BaseModel], path: tuple[str, ...]
    ) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
        for name, field in model.model_fields.items():
            key = field.alias or name if self._camel else name
            yield (*path, key), field
            for inner in _models(field.annotation):
                yield from self._walk(inner, (*path, key))

    @staticmethod
    def _below(data: Any, part: str | int, snake: str | int) -> Any:
        if isinstance(data, dict):
            return data.get(part, data.get(snake))
        if isinstance(data, list) and isinstance(part, int) and part < len(data):
            return data[part]
        return None

    @staticmethod
    def _snake(part: str | int) -> Any:
        if isinstance(part, int):
            return part
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in part)


def _keys(path: KeyPath) -> tuple[str, ...]:
    """The path without positions in lists."""
    return tuple(part for part in path if isinstance(part, str))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models inside an annotation such as ``tuple[EnvVar, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
