"""From pydantic's errors to sentences: what is wrong, where, and what to do.

Validation is repeated with the wrong values taken out until nothing new is found, so that one run
tells everything, including what cross-checks say about the rest.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pretrain_api import pod
from pretrain_cli.documents import Document, KeyPath
from pretrain_cli.vocabulary import Vocabulary

# Why a field of a pod is not among those a job may set.
_NOT_ALLOWED = {
    "automountServiceAccountToken": "workers hold no token",
    "command": "the image's own entry point runs; give workers.image an image of your own",
    "args": "the image's own entry point runs; give workers.image an image of your own",
    "containers": "a worker is one container; use workers.image and workers.resources",
    "hostIPC": "workers never share a node's namespaces",
    "hostNetwork": "workers never share a node's namespaces",
    "hostPID": "workers never share a node's namespaces",
    "hostPath": "workers never reach a node's files; use persistentVolumeClaim",
    "initContainers": "a worker is one container; put what it needs into workers.image",
    "projected": "it can hold tokens; use configMap, secret or downwardAPI",
    "securityContext": "workers always run unprivileged",
    "serviceAccount": "workers have no rights in the cluster",
    "serviceAccountName": "workers have no rights in the cluster",
}
_FORMS = {
    pod.QUANTITY: "a quantity such as 500m, 16Gi or 2",
    pod.DNS_LABEL: "lower-case letters, digits and dashes, with a letter or digit at both ends",
    pod.DNS_NAME: "lower-case letters, digits, dashes and dots",
    r"^(op|[1-9][0-9]{0,5})$": 'op, or a number in quotes such as "2"',
}
_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section with keys of its own",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
# Rules of arithmetic read these; with one of them wrong they would only confuse.
_ARITHMETIC = re.compile(
    r"(replicas|processes.?per.?worker|.*_?degree|(local|global).?batch.?size|data.?streams"
    r"|seq.?len|flavor|components|pipeline.?parallel.*|module.?fqns.*|enable.?async.?tensor.*"
    r"|workers|training|parallelism|model|compile|.*reshard.?after.?forward)$",
    re.IGNORECASE,
)
_WANTED = re.compile(r"must be (?P<wanted>.*?), not (?P<rest>.*)$")
MAX_ROUNDS = 20  # each takes something out
_PLACEHOLDERS: dict[str, Any] = {"training": {"dataset": "c4"}, "dataset": "c4", "storage": "1Gi"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where."""

    path: KeyPath
    sentence: str
    is_cross: bool = False  # about several values together

    def render(self, document: Document) -> str:
        """As compilers do: file, line, key, sentence."""
        line = document.line(self.path)
        place = f"{document.source}:{line}" if line else document.source
        key = dotted(self.path)
        return f"{place}: {key}: {self.sentence}" if key else f"{place}: {self.sentence}"


def dotted(path: KeyPath) -> str:
    """A path as people write it: workers.podTemplate.env[0].name."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def find_problems(model: type[BaseModel], data: Any, vocabulary: Vocabulary) -> list[Problem]:
    """Everything that keeps ``data`` from being a ``model``, all at once."""
    remaining = copy.deepcopy(data)
    found: list[Problem] = []
    taken: set[KeyPath] = set()
    for _ in range(MAX_ROUNDS):
        problems = _round(model, remaining, vocabulary)
        found += [problem for problem in problems if not _is_echo(problem, taken)]
        paths = [path for problem in problems if len(path := _not_yet(problem.path, taken)) > 1]
        if not paths:
            break
        for path in paths:
            _take_out(remaining, path, len(taken))
            taken.add(path)
    return found


def _not_yet(path: KeyPath, taken: set[KeyPath]) -> KeyPath:
    """The path, or what is around it: what is wrong without its value, is wrong because of it."""
    while path in taken and path:
        path = path[:-1]
    return path


def _round(model: type[BaseModel], data: Any, vocabulary: Vocabulary) -> list[Problem]:
    try:
        model.model_validate(data)
    except ValidationError as error:
        return list(_merged(_problems(error.errors(), data, vocabulary)))
    return []


def _problems(
    errors: Iterable[ErrorDetails], data: Any, vocabulary: Vocabulary
) -> Iterator[Problem]:
    for error in errors:
        path = vocabulary.spell(_existing(error, data), data)
        yield Problem(path, _sentence(error, path, vocabulary), is_cross=error["type"] == "rule")


def _merged(problems: Iterable[Problem]) -> Iterator[Problem]:
    """A value of a union has an error per branch: join them, one line per path."""
    by_path: dict[KeyPath, list[Problem]] = {}
    for problem in problems:
        by_path.setdefault(problem.path, []).append(problem)
    for path, same in by_path.items():
        sentences = list(dict.fromkeys(problem.sentence for problem in same))
        wanted = [_WANTED.match(sentence) for sentence in sentences]
        if len(sentences) > 1 and all(wanted):
            kinds = " or ".join(match["wanted"] for match in wanted if match)
            sentences = [f"must be {kinds}, not {wanted[0]['rest']}" if wanted[0] else ""]
        yield Problem(path, "; ".join(sentences), all(problem.is_cross for problem in same))


def _is_echo(problem: Problem, taken: set[KeyPath]) -> bool:
    """Whether a problem is only there because of a value that was taken out before."""
    return any(_echoes(problem, path) for path in taken)


def _echoes(problem: Problem, taken: KeyPath) -> bool:
    path = problem.path
    if path[: len(taken)] == taken:
        return True
    around = taken[: len(path)] == path
    siblings = taken[:-1] == path[:-1]
    arithmetic = all(end and _ARITHMETIC.match(str(end[-1])) for end in (taken, path))
    return problem.is_cross and (around or siblings or arithmetic)


def _existing(error: ErrorDetails, data: Any) -> KeyPath:
    """The error's location without the names of union branches, which are no keys."""
    path: list[str | int] = []
    for part in error["loc"]:
        if data is not None and not isinstance(data, dict | list):
            break
        path.append(part)
        data = _child(data, part)
    return tuple(path)


def _child(data: Any, part: str | int) -> Any:
    if isinstance(data, dict):
        snake = re.sub(r"(?<!^)(?=[A-Z])", "_", str(part)).lower()
        return data.get(part, data.get(snake))
    if isinstance(data, list) and isinstance(part, int) and part < len(data):
        return data[part]
    return None


def _take_out(data: Any, path: KeyPath, count: int) -> None:
    """Remove a value, or put something harmless where one is needed; ``count`` makes it unique."""
    *parents, last = path or ("",)
    for part in parents:
        data = _child(data, part)
    if isinstance(data, dict) and last == "name":
        data[last] = f"placeholder{count}"
    elif isinstance(data, dict) and last in _PLACEHOLDERS:
        data[last] = copy.deepcopy(_PLACEHOLDERS[str(last)])
    elif isinstance(data, dict):
        data.pop(last, None)
    elif isinstance(data, list) and isinstance(last, int):
        data[last] = None


def _sentence(error: ErrorDetails, path: KeyPath, vocabulary: Vocabulary) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind in ("rule", "unsupported"):
        return str(context["sentence"])
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return _unknown(path, vocabulary)
    if kind == "missing":
        return f"is missing; {vocabulary.describe(path)}"
    if kind == "literal_error":
        return _not_among(value, str(context["expected"]))
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}, not {_shown(value)}"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"must be {words} {context[key]}, not {_shown(value)}"
    if kind == "string_pattern_mismatch":
        form = _FORMS.get(str(context["pattern"]), f"of the form {context['pattern']}")
        return f"must be {form}, not {_shown(value)}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, not {_shown(value)}"


def _unknown(path: KeyPath, vocabulary: Vocabulary) -> str:
    key = str(path[-1])
    if key in _NOT_ALLOWED:
        return f"is not allowed: {_NOT_ALLOWED[key]}"
    near = vocabulary.nearest(path)
    return f"unknown key; did you mean {near}?" if near else "unknown key; remove it"


def _not_among(value: Any, expected: str) -> str:
    words = re.findall(r"'([^']*)'", expected) or [expected]
    near = get_close_matches(str(value), words, n=1)
    hint = f"; did you mean {near[0]}?" if near and len(words) > 1 else ""
    among = f"one of {', '.join(words)}" if len(words) > 1 else words[0]
    return f"must be {among}, not {_shown(value)}{hint}"


def _shown(value: Any) -> str:
    """A value in a message: short, on one line, and a text recognisable as text."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "empty"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
