"""The large examples, built rank by rank on fake process groups of their own size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# The ends of a pipeline hold what the ranks between them don't: the embedding and the output.
RANKS = {
    "03-llama3-8b.yaml": (0,),
    "08-llama3-70b.yaml": (0,),
    "09-llama3-405b.yaml": (0, 511),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank"), [(name, rank) for name, ranks in RANKS.items() for rank in ranks]
)
def test_a_rank_of_a_large_example_is_built_and_takes_what_was_planned(
    name: str, rank: int
) -> None:
    script = Path(__file__).with_name("dry_run.py")
    example = ROOT / "manifests" / "examples" / name
    command = [sys.executable, str(script), str(example), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"parameters", "optimizer"}
    assert all(planned == held > 0 for planned, held in found.values())
