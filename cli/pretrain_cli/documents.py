"""Files users write, read with the line of every key.

A message is only as good as the place it names. YAML is composed into nodes, which know their
lines, and built from them; TOML's parser tells no lines, so a second, simple look at the text finds
them. Both give plain data and a map from key path to line.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

KeyPath = tuple[str | int, ...]
MAX_NODES = 100_000  # of one document; aliases of aliases would otherwise grow without bound


class UnreadableError(Exception):
    """A file that is missing or is neither YAML nor TOML; the message is for people."""


@dataclass(frozen=True)
class Document:
    """Data of one document and where its keys stand."""

    source: str  # name of the file, or of where else it came from
    data: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def line(self, path: KeyPath) -> int | None:
        """Line of the key, or of the nearest key around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def is_toml(path: Path) -> bool:
    """Whether the file's name says TOML; everything else is read as YAML, as is JSON."""
    return path.suffix.lower() == ".toml"


def read_text(path: Path) -> str:
    """The file's text. Raises UnreadableError with the reason."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{path}: is not text in UTF-8") from error


def read_toml(path: Path) -> Document:
    """The one document of a TOML file."""
    text = read_text(path)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UnreadableError(f"{path}: is not TOML: {error}") from error
    return Document(str(path), data, dict(_toml_lines(text)))


def read_yaml(path: Path) -> list[Document]:
    """All documents of a YAML file, empty ones left out."""
    text = read_text(path)
    try:
        nodes = list(yaml.compose_all(text, Loader=_Loader))
        return [_Builder(str(path)).document(node) for node in nodes if node is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise UnreadableError(f"{path}{where}: is not YAML: {reason}") from error
    except RecursionError as error:
        raise UnreadableError(f"{path}: is nested too deeply") from error


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: 3e-4 is a number, and dates are text."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


class _Builder:
    """Builds the data of one document from its nodes and notes their lines."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lines: dict[KeyPath, int] = {}
        self._scalars = _Loader("")
        self._left = MAX_NODES

    def document(self, root: yaml.Node) -> Document:
        data = self._build(root, ())
        return Document(self._source, data, self._lines)

    def _build(self, node: yaml.Node, path: KeyPath) -> Any:
        self._left -= 1
        if self._left < 0:
            raise UnreadableError(f"{self._source}: holds more than {MAX_NODES} values")
        line = node.start_mark.line + 1
        self._lines.setdefault(path, line)
        if not node.tag.startswith("tag:yaml.org,2002:") or "/" in node.tag:
            raise UnreadableError(f"{self._source}:{line}: tag {node.tag} is not read; remove it")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalars.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key == "<<":
                raise UnreadableError(
                    f"{self._source}:{line}: keys must be plain text; merge keys are not read"
                )
            if key in result:
                raise UnreadableError(f"{self._source}:{line}: key {key} is there twice")
            self._lines[(*path, key)] = line
            result[key] = self._build(value_node, (*path, key))
        return result


_TABLE = re.compile(r"^\s*\[([^\[\]]+)\]\s*(#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*[A-Za-z0-9_-]+)*)\s*=""")


def _toml_lines(text: str) -> Iterator[tuple[KeyPath, int]]:
    """Lines of tables and of keys. Keys inside inline tables have the line of the table."""
    table: KeyPath = ()
    yield table, 1
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.match(line):
            table = _toml_path(header[1])
            yield table, number
        elif key := _KEY.match(line):
            yield (*table, *_toml_path(key[1])), number


def _toml_path(dotted: str) -> KeyPath:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
