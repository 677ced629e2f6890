"""``python -m pretrain_docs``: write the generated pages, or ``--check`` which are stale."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from pretrain_docs import alerts, chart, reference

ROOT = Path(__file__).resolve().parents[2]
DEFINITION = ROOT / "manifests" / "base" / "crds" / "pretrain.dev_pretrainjobs.yaml"
CHART = ROOT / "charts" / "pretrain-operator"
MONITORING = ROOT / "manifests" / "components" / "monitoring"


def pages() -> dict[Path, str]:
    """Every generated page with what it must hold."""
    return {
        ROOT / "docs" / "reference.md": reference.render(yaml.safe_load(DEFINITION.read_text())),
        CHART / "README.md": chart.render((CHART / "values.yaml").read_text()),
        MONITORING / "alerts.yaml": alerts.render((CHART / "files" / "alerts.yaml").read_text()),
    }


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 if something is stale and only a check was asked for."""
    parser = argparse.ArgumentParser(prog="pretrain_docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(arguments).check
    stale = {p: text for p, text in pages().items() if not p.exists() or p.read_text() != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'stale, run `make generate`' if check else 'written'}")
        if not check:
            path.write_text(text)
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
