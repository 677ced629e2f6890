"""The chart's README: every value with its default, from the comments in values.yaml.

A comment belongs to the key right below it; a key without one is explained by its section's.
"""

import json
import re
from dataclasses import dataclass

import yaml

HEADER = """\
# pretrain-operator

Helm chart of the operator that trains large language models from PretrainJob resources.

```sh
helm upgrade --install pretrain-operator charts/pretrain-operator \\
  --namespace pretrain-system --create-namespace \\
  --set image.registry=$REGISTRY --set trainerImage.registry=$REGISTRY
helm test pretrain-operator --namespace pretrain-system --timeout 15m    # trains a tiny job
```

The definition of PretrainJob is one of the chart's templates: an upgrade of the release upgrades
it, and an uninstall leaves it, and with it all jobs, unless `crds.keep` is false. A second release
next to the first one serves other namespaces (`watchNamespaces`) and leaves the definition alone
(`crds.enabled=false`).

## Values

Generated from `values.yaml` (`make generate`). The schema refuses any other key.

| key | default | |
| --- | --- | --- |
"""
KEY = re.compile(r"^( *)([A-Za-z]\w*):(.*)$")


@dataclass(frozen=True)
class Value:
    """A row: where a value is, what it is by default, and what it is for."""

    path: str
    default: str
    text: str


def render(values: str) -> str:
    """The README for the text of values.yaml."""
    rows = (f"| `{v.path}` | `{v.default}` | {v.text} |" for v in read(values))
    return HEADER + "\n".join(rows) + "\n"


def read(values: str) -> list[Value]:
    """All values that are no sections, in order, from the text of values.yaml."""
    found: list[Value] = []
    parents: list[tuple[int, str, str]] = []  # indent, key and words of the sections around
    words: list[str] = []
    for line in values.splitlines():
        if line.lstrip().startswith("#"):
            words.append(line.lstrip(" #"))
            continue
        match = KEY.match(line)
        if match is None:
            words = []  # an empty line, or more of a value: no comment reaches over it
            continue
        indent, key, rest = len(match[1]), match[2], match[3].strip()
        parents = [each for each in parents if each[0] < indent]
        around, own = [parent[2] for parent in parents], " ".join(words)
        words = []
        if not rest:
            parents.append((indent, key, own))
            continue
        path = ".".join([*(parent[1] for parent in parents), key])
        text = own or next((each for each in reversed(around) if each), "")
        found.append(Value(path, json.dumps(yaml.safe_load(rest)), text))
    return found
