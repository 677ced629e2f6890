"""``pretrain plan`` ranks the layouts of a file, job or TOML."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

JOB = """\
apiVersion: pretrain.dev/v1alpha1
kind: PretrainJob
metadata: {name: demo}
spec:
  model: {flavor: 8B}
  training: {dataset: c4, localBatchSize: 1, seqLen: 8192}
  activationCheckpoint: {mode: full}
  workers: {replicas: 2, processesPerWorker: 8}
"""


def test_a_table_of_layouts(pretrain: Callable[..., Any], llama3_8b: Path) -> None:
    outcome = pretrain("plan", str(llama3_8b), "--gpu", "h100-80", "--count", "8")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].startswith("llama3 8B on 8 x h100-80 (room for 72.6 GiB), 2 sequences of 8192")
    assert "estimate" in outcome.out
    (header,) = [number for number, line in enumerate(lines) if "tok/s/GPU" in line]
    assert lines[header + 1].split()[:6] == ["1", "1", "8", "1", "1", "yes"]
    assert lines[-1].startswith("As configured it fits: ")


def test_json_has_bytes_and_degrees(pretrain: Callable[..., Any]) -> None:
    Path("job.yaml").write_text(JOB)
    outcome = pretrain(
        "plan", "job.yaml", "--gpu", "h200", "--count", "64", "--top", "3", "--output", "json"
    )
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert len(found) == 3
    for one in found:
        assert one["fits"]
        sizes = (one["degrees"][axis] for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"))
        assert prod(sizes) == 64
        assert one["memoryBytes"]["optimizer"] > 2 * one["memoryBytes"]["parameters"]
        assert one["estimate"]["tokens_per_second"] > 0


def test_what_fits_nowhere_is_told(pretrain: Callable[..., Any]) -> None:
    Path("job.yaml").write_text(JOB.replace("8B", "405B"))
    outcome = pretrain("plan", "job.yaml", "--gpu", "l40s", "--count", "8")
    assert outcome.code == 1
    assert outcome.err.startswith("nothing fits; try ")


@pytest.mark.parametrize(
    ("text", "count", "sentence"),
    [
        (JOB.replace("seqLen", "seqlen"), "8", "unknown key; did you mean seqLen?"),
        (JOB.replace("8B", "mine}").replace("{flavor: ", "{name: m, flavor: "), "8", "is not YAML"),
        (JOB.replace("{flavor: 8B}", "{name: mine, flavor: x}"), "8", "plan knows llama3"),
        (JOB, "0", "--count and --top: must be at least 1"),
    ],
)
def test_problems_are_told(
    pretrain: Callable[..., Any], text: str, count: str, sentence: str
) -> None:
    Path("job.yaml").write_text(text)
    outcome = pretrain("plan", "job.yaml", "--gpu", "h200", "--count", count)
    assert outcome.code > 0
    assert outcome.out == ""
    assert sentence in outcome.err
