"""The CustomResourceDefinition, generated from the models.

The models are the truth and the YAML is committed, so that a change of either shows in review:
``python -m pretrain_api.crd`` writes it, ``--check`` fails when it is stale.

Pydantic's JSON schema is not a structural schema: Kubernetes knows no references, no null branch,
no numeric exclusive bounds and no names of properties. One recursive pass rewrites it. Defaults are
left out but for the few the API server itself needs (a stored default would outlive the release
that chose it); the description tells them instead, for ``kubectl explain``. It is read by people
who write YAML, so keys are spelled as there, and what isn't built yet says so.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from pretrain_api import names
from pretrain_api.job import JobSpec
from pretrain_api.pod import DNS_LABEL
from pretrain_api.schema import Rule, Section, Transition, aliases
from pretrain_api.status import JobStatus
from pretrain_api.support import REFINEMENTS, UNBUILT, Unbuilt

Schema = dict[str, Any]
FILE = Path("manifests/base/crds") / f"{names.GROUP}_{names.PLURAL}.yaml"
SIZE_LIMIT = 200_000  # bytes; client-side apply stores the object a second time, in an annotation

_RULES = "x-kubernetes-validations"
_SNAKE_CASE = re.compile(r"\b[a-z][\w.]*_[\w.]*\w")
_KEPT = (
    "type", "description", "enum", "format", "pattern", "minimum", "maximum", "minLength",
    "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "required",
)  # fmt: skip

# name, type, JSON path, priority; priority 1 shows with -o wide only.
_COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Step", "string", ".status.progress.summary", 0),
    ("Loss", "number", ".status.progress.loss", 0),
    ("Tokens/s", "number", ".status.progress.tokensPerSecond", 0),
    ("ETA", "string", ".status.progress.eta", 0),
    ("Workers", "string", ".status.workers.summary", 0),
    ("Restarts", "integer", ".status.restarts.total", 0),
    ("Checkpoint", "integer", ".status.checkpoint.step", 0),
    ("Model", "string", ".spec.model.name", 1),
    ("Flavor", "string", ".spec.model.flavor", 1),
    ("MFU", "number", ".status.progress.mfu", 1),
    ("Goodput", "number", ".status.goodput", 1),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)


class _Generator(GenerateJsonSchema):
    """Adds the rules of each section to its schema."""

    def model_schema(self, schema: core_schema.ModelSchema) -> Schema:
        result = super().model_schema(schema)
        if issubclass(schema["cls"], Section):
            rules = [_rule(rule) for rule in schema["cls"].rules if not rule.alone]
            rules += map(_transition, schema["cls"].transitions)
            if rules:
                result[_RULES] = rules
        return result


def definition() -> Schema:
    """The CustomResourceDefinition as a dictionary."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.SINGULAR,
                "shortNames": list(names.SHORT_NAMES),
                "categories": list(names.CATEGORIES),
            },
            "versions": [_version()],
        },
    }


def to_yaml(value: Any, indent: int = 0) -> Iterator[str]:
    """Lines of YAML for JSON types; strings are quoted, so no value can change its type."""
    pad = " " * indent
    entries: list[tuple[str, Any]]
    if isinstance(value, dict):
        entries = [(f"{_key(key)}:", item) for key, item in cast(Schema, value).items()]
    else:
        entries = [("-", item) for item in cast(list[Any], value)]
    for lead, item in entries:
        if not isinstance(item, dict | list) or not item:
            yield f"{pad}{lead} {json.dumps(item, ensure_ascii=False)}"
            continue
        lines = to_yaml(item, indent + 2)
        # The first line of a list's item stands behind its dash.
        yield f"{pad}{lead} {next(lines).lstrip()}" if lead == "-" else f"{pad}{lead}"
        yield from lines


def render() -> str:
    """The committed file."""
    header = f"# Generated from api/{__package__} by python -m {__package__}.crd; do not edit."
    return "\n".join([header, "---", *to_yaml(definition())]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the file, or with --check only compare; 1 if it is stale."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.crd", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the file is stale")
    parser.add_argument("--file", type=Path, default=FILE, help="file to write (%(default)s)")
    options = parser.parse_args(argv)
    fresh = render()
    if not options.check:
        options.file.parent.mkdir(parents=True, exist_ok=True)
        options.file.write_text(fresh)
        return 0
    if options.file.is_file() and options.file.read_text() == fresh:
        return 0
    sys.stderr.write(f"{options.file} is stale; run python -m {__package__}.crd\n")
    return 1


def _version() -> Schema:
    return {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _root()},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.workers.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path, **({"priority": 1} if wide else {})}
            for name, kind, path, wide in _COLUMNS
        ],
    }


def _root() -> Schema:
    return {
        "type": "object",
        "description": "PretrainJob trains a large language model and keeps it training through "
        "failures.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {
                "type": "object",
                # Children are called {job}-{index}-{generation}; a label holds 63 characters.
                "properties": {
                    "name": {
                        "type": "string",
                        "maxLength": names.MAX_JOB_NAME,
                        "pattern": DNS_LABEL,
                    }
                },
            },
            "spec": _for_readers_of_yaml(
                _with_rules_of_values(_structural_model(JobSpec), JobSpec.rules)
            ),
            "status": _structural_model(JobStatus),
        },
    }


def _structural_model(model: type[BaseModel]) -> Schema:
    schema = model.model_json_schema(schema_generator=_Generator)
    return _structural(schema, schema.get("$defs", {}))


def _with_rules_of_values(spec: Schema, rules: Iterable[Rule]) -> Schema:
    """The spec's schema with rules about one value at that value.

    Where there is none they cost nothing. The API server evaluates all other rules of the spec at
    every write of a job, its status included.
    """
    nodes = dict(_nodes(spec))
    for rule in rules:
        if rule.alone:
            node = nodes[tuple(aliases(rule.path))]
            node[_RULES] = [*node.get(_RULES, ()), {"rule": rule.cel, "message": rule.message}]
    return spec


def _structural(schema: Schema, defs: dict[str, Schema]) -> Schema:
    """One node of the schema, and all below it, in the form Kubernetes takes."""
    if "$ref" in schema:
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return _structural({**defs[schema["$ref"].rsplit("/", 1)[1]], **rest}, defs)
    if "anyOf" in schema:
        return _structural(_without_any_of(schema), defs)
    result: Schema = {key: schema[key] for key in _KEPT if key in schema}
    result |= {key: value for key, value in schema.items() if key.startswith("x-kubernetes-")}
    if "const" in schema:
        result["enum"] = [schema["const"]]
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if exclusive in schema:
            result |= {bound: schema[exclusive], exclusive: True}
    if schema.get("type") == "object":
        result |= _object(schema, defs)
    if schema.get("type") == "array":
        result["items"] = _structural(schema["items"], defs)
        result.setdefault("x-kubernetes-list-type", "atomic")
    if "x-kubernetes-default" in schema:
        result["default"] = result.pop("x-kubernetes-default")
    return _described(result, schema)


def _without_any_of(schema: Schema) -> Schema:
    """The only union there is: a type or null, and an integer or a string."""
    outer = {key: value for key, value in schema.items() if key != "anyOf"}
    branches = [branch for branch in schema["anyOf"] if branch.get("type") != "null"]
    if len(branches) == 1:
        return {**branches[0], **outer}
    merged: Schema = {}
    for branch in branches:
        merged |= {key: value for key, value in branch.items() if key not in ("type", "enum")}
    if words := [word for branch in branches for word in branch.get("enum", ())]:
        rule = f"type(self) == int || self in {json.dumps(words)}"
        merged[_RULES] = [{"rule": rule, "message": f"must be a number or {', '.join(words)}"}]
    return {**merged, **outer, "x-kubernetes-int-or-string": True}


def _object(schema: Schema, defs: dict[str, Schema]) -> Schema:
    if "properties" in schema:
        properties = schema["properties"].items()
        return {"properties": {name: _structural(value, defs) for name, value in properties}}
    if "patternProperties" in schema:
        ((pattern, value),) = schema["patternProperties"].items()
        rule = {"rule": f"self.all(k, k.matches(r'{pattern}'))", "message": "holds an illegal key"}
        return {"additionalProperties": _structural(value, defs), _RULES: [rule]}
    if isinstance(schema.get("additionalProperties"), dict):
        return {"additionalProperties": _structural(schema["additionalProperties"], defs)}
    return {"x-kubernetes-preserve-unknown-fields": True}


def _described(result: Schema, schema: Schema) -> Schema:
    """The description on one line, with the default unless it is empty."""
    if "description" in result:
        default = schema.get("default")
        told = "" if default in (None, [], {}, "") or isinstance(default, dict) else default
        text = " ".join(result["description"].split())
        result["description"] = text + (f" Default: {json.dumps(told)}." if told != "" else "")
    return result


def _for_readers_of_yaml(spec: Schema) -> Schema:
    """The spec's schema, with keys in descriptions spelled in camelCase and remarks on support."""
    nodes = dict(_nodes(spec))
    keys = {name for node in nodes.values() for name in node.get("properties", {})}
    values = {word for node in nodes.values() for word in node.get("enum", ())}

    def spelled(match: re.Match[str]) -> str:
        path = aliases(match[0])
        return ".".join(path) if match[0] not in values and keys.issuperset(path) else match[0]

    remarks = {tuple(aliases(entry.path)): _support(entry) for entry in UNBUILT}
    remarks |= {
        tuple(aliases(path)): " Without effect: it refines what is not supported yet."
        for path in REFINEMENTS
    }
    for path, node in nodes.items():
        if "description" in node:
            node["description"] = _SNAKE_CASE.sub(spelled, node["description"])
            node["description"] += remarks.get(path, "")
    return spec


def _support(entry: Unbuilt) -> str:
    """What a description adds for a key that must stay at its inactive value."""
    is_off = any(entry.inactive[0] is value for value in (False, None)) or entry.inactive == ("",)
    return " Not supported yet." if is_off else " Other values are not supported yet."


def _nodes(schema: Schema, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Schema]]:
    """Every schema in a schema, by the names on the way to it."""
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from _nodes(inner, (*path, name))
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from _nodes(schema[key], (*path, key))


def _rule(rule: Rule) -> Schema:
    path = {"fieldPath": "." + ".".join(aliases(rule.path))} if rule.path else {}
    return {"rule": rule.cel, "message": rule.message, **path}


def _transition(transition: Transition) -> Schema:
    return {"rule": transition.cel, "message": transition.message}


def _key(key: str) -> str:
    return key if key.replace("-", "").isalnum() else json.dumps(key)


if __name__ == "__main__":
    sys.exit(main())
