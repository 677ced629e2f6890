"""docs/reference.md: every field of a PretrainJob, from the generated definition.

The definition is what `kubectl explain` shows and what the API server enforces, so a page made from
it can't promise anything else. One table per object, in the order of the definition; rules between
fields follow the table of the object that has them.
"""

from collections.abc import Container, Iterable, Iterator
from typing import Any

Schema = dict[str, Any]

HEADER = """\
# Reference of PretrainJob

Every field of `{group}/{version}`, generated from the definition (`make generate`). On a cluster
`kubectl explain ptj.spec` shows the same. A field that is marked *required* has no default. A key
of the training sections means what it means in torchtitan; in TOML and on the command line it is
written in snake case.

Columns of `kubectl get ptj`: {columns}.
"""
TYPES = {"integer": "integer", "number": "number", "boolean": "boolean", "string": "string"}
UNSUPPORTED = "this value is not supported yet"


def render(definition: Schema) -> str:
    """The page for a CustomResourceDefinition with one version."""
    [version] = definition["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    columns = ", ".join(each["name"] for each in version["additionalPrinterColumns"])
    parts = [
        HEADER.format(group=definition["spec"]["group"], version=version["name"], columns=columns)
    ]
    for name in ("spec", "status"):
        parts += _section(name, schema["properties"][name])
    return "\n".join(parts)


def _section(path: str, schema: Schema) -> Iterator[str]:
    """An object's table and rules, then those of the objects in it."""
    fields: dict[str, Schema] = schema["properties"]
    yield f"## {path}\n"
    if schema.get("description"):
        yield f"{_text(schema['description'])}\n"
    yield "| field | type | |"
    yield "| --- | --- | --- |"
    required = schema.get("required", [])
    for name, field in fields.items():
        words = _text(field.get("description", ""))
        needed = "*required* " if name in required else ""
        yield f"| `{name}` | {_type(field, f'{path}.{name}')} | {needed}{words}{_bounds(field)} |"
    yield ""
    yield from _rules(schema)
    for name, field in fields.items():
        inner, step = _inner(field)
        if inner.get("properties"):
            yield from _section(f"{path}.{name}{step}", inner)


def _inner(field: Schema) -> tuple[Schema, str]:
    """What a field holds at last, and how a path says that it is a list or a map."""
    if "items" in field:
        return field["items"], "[]"
    if isinstance(field.get("additionalProperties"), dict):
        return field["additionalProperties"], ".*"
    return field, ""


def _type(field: Schema, path: str) -> str:
    if field.get("x-kubernetes-int-or-string"):
        return "integer or string"
    if "items" in field:
        return f"list of {_type(field['items'], f'{path}[]')}"
    if isinstance(field.get("additionalProperties"), dict):
        return f"map to {_type(field['additionalProperties'], f'{path}.*')}"
    if field.get("properties"):
        return f"[{path.rpartition('.')[2].removesuffix('[]')}](#{_anchor(path)})"
    return TYPES.get(field.get("type", ""), "object")


def _anchor(path: str) -> str:
    """As Markdown renderers make it of a heading."""
    return "".join(char for char in path.lower() if char.isalnum() or char in "-_")


def _bounds(field: Schema) -> str:
    """Which values are taken, where the schema says so."""
    if "enum" in field:
        return f" One of {', '.join(f'`{each}`' for each in field['enum'])}."
    low, high = field.get("minimum"), field.get("maximum")
    least = "more than" if field.get("exclusiveMinimum") else "at least"
    most = "less than" if field.get("exclusiveMaximum") else "at most"
    said = [f"{least} {low}"] if low is not None else []
    said += [f"{most} {high}"] if high is not None else []
    return f" {' and '.join(said).capitalize()}." if said else ""


def _rules(schema: Schema) -> Iterator[str]:
    """What fields must have to do with each other; values that aren't supported yet come apart."""
    rules: list[Schema] = schema.get("x-kubernetes-validations", [])
    later = sorted({rule["fieldPath"][1:] for rule in rules if UNSUPPORTED in rule["message"]})
    others = (rule for rule in rules if UNSUPPORTED not in rule["message"])
    said = _grouped(others, schema["properties"])
    if said:
        yield "Rules:\n"
        yield from (f"- {sentence}" for sentence in said)
        yield ""
    if later:
        listed = ", ".join(f"`{each}`" for each in later)
        yield f"Known, but refused at any other value than the default for now: {listed}.\n"


def _grouped(rules: Iterable[Schema], fields: Container[str]) -> list[str]:
    """Each rule's sentence once, with all the fields that it holds for in front of it."""
    found: dict[str, list[str]] = {}
    for rule in rules:
        field, words = rule.get("fieldPath", "")[1:], rule["message"]
        first, _, rest = words.partition(" ")
        if not field and first.partition(".")[0] in fields:
            field, words = first, rest
        known = found.setdefault(_text(words), [])
        known += [f"`{field}`"] if field and f"`{field}`" not in known else []
    return [f"{', '.join(named)}: {words}" if named else words for words, named in found.items()]


def _text(text: str) -> str:
    """One line that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
