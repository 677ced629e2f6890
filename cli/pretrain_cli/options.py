"""Options of the form ``--section.key value``, in torchtitan's manner.

argparse would need every key declared; here the models say what exists and of which type a value
is. A switch needs no value (``--compile.enable``), can be negated (``--compile.no_enable``), and
lists are separated by commas.
"""

from collections.abc import Iterator
from textwrap import wrap
from typing import Any, cast

from pydantic_core import PydanticUndefined

from pretrain_api.config import RunConfig
from pretrain_api.support import REFINEMENTS, UNBUILT
from pretrain_cli.documents import KeyPath
from pretrain_cli.vocabulary import Vocabulary

Override = tuple[str, str | None]  # option as written, without value; its value


class OptionError(Exception):
    """An option that can't be understood; the message is for people."""


def split_options(argv: list[str]) -> tuple[list[str], list[Override]]:
    """Separate ``--section.key`` options, with their values, from everything else."""
    rest: list[str] = []
    overrides: list[Override] = []
    queue = list(argv)
    while queue:
        token = queue.pop(0)
        name, equals, value = token.partition("=")
        if not (name.startswith("--") and "." in name):
            rest.append(token)
        elif equals:
            overrides.append((name, value))
        else:
            takes_next = queue and not queue[0].startswith("--") and _takes(name, queue[0])
            overrides.append((name, queue.pop(0) if takes_next else None))
    return rest, overrides


def parse_overrides(overrides: list[Override]) -> dict[str, Any]:
    """Nested data of the options. Raises OptionError for the first that can't be understood."""
    data: dict[str, Any] = {}
    for name, text in overrides:
        path, negated = _path(name)
        value = _value(name, _schema(path), text)
        if negated:
            value = not value
        *sections, key = path
        target = data
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return data


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section; where they differ, ``over`` wins."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        deeper = isinstance(value, dict) and isinstance(inner, dict)
        merged[key] = merge(cast(dict[str, Any], inner), value) if deeper else value
    return merged


def keys(data: dict[str, Any], path: KeyPath = ()) -> Iterator[KeyPath]:
    """Paths of all values of nested data."""
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from keys(value, (*path, key))
        else:
            yield (*path, key)


def describe() -> str:
    """Every key that does something today, with its default: what --help shows."""
    silent = REFINEMENTS | {entry.path for entry in UNBUILT} | {"schema_version"}
    lines: list[str] = []
    for path, field in Vocabulary(RunConfig, camel=False).settings():
        if path in silent:
            continue
        default = field.get_default(call_default_factory=True)
        told = "" if default in (PydanticUndefined, None, (), "") else f" (default: {default})"
        text = " ".join((field.description or "").split()) + told
        lines += [f"  --{path}", *wrap(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(["keys:", *lines])


def _takes(name: str, following: str) -> bool:
    """Whether the next token is this option's value; a switch takes only true or false."""
    try:
        path, negated = _path(name)
    except OptionError:
        return True  # reported when it is parsed
    is_switch = _schema(path).get("type") == "boolean"
    return not negated and (not is_switch or following.lower() in ("true", "false"))


def _path(name: str) -> tuple[tuple[str, ...], bool]:
    """The key path of an option, and whether it is a negated switch."""
    path = tuple(name.removeprefix("--").replace("-", "_").split("."))
    if _schema(path):
        return path, False
    positive = (*path[:-1], path[-1].removeprefix("no_"))
    if positive != path and _schema(positive).get("type") == "boolean":
        return positive, True
    near = Vocabulary(RunConfig, camel=False).nearest(path)
    if near:
        full = near if "." in near else ".".join((*path[:-1], near))
        raise OptionError(f"{name}: unknown option; did you mean --{full}?")
    raise OptionError(f"{name}: unknown option")


def _schema(path: tuple[str, ...]) -> dict[str, Any]:
    """JSON schema of the value at a path; empty if there is none, or if it is a section."""
    node = _SCHEMA
    for part in path:
        node = _resolved(node).get("properties", {}).get(part, {})
    node = _resolved(node)
    return {} if "properties" in node else node


def _resolved(node: dict[str, Any]) -> dict[str, Any]:
    return _SCHEMA["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def _value(name: str, schema: dict[str, Any], text: str | None) -> Any:
    """The text as a value of the schema's type, or unchanged for validation to refuse."""
    kinds = [branch.get("type") for branch in schema.get("anyOf", [schema])]
    if text is None:
        if "boolean" in kinds:
            return True
        raise OptionError(f"{name}: needs a value")
    if "null" in kinds and text.lower() in ("none", "null"):
        return None
    if "array" in kinds:
        return [part.strip() for part in text.split(",") if part.strip()]
    if "boolean" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return _number(text, kinds)


def _number(text: str, kinds: list[str | None]) -> int | float | str:
    for kind, convert in (("integer", int), ("number", float)):
        if kind in kinds:
            try:
                return convert(text)
            except ValueError:
                continue
    return text


_SCHEMA = RunConfig.model_json_schema(by_alias=False)
