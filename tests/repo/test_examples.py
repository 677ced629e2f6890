"""Examples are what people copy: valid, numbered, and with commands that name the right file."""

from pathlib import Path

import pytest
import yaml

from pretrain_api.job import PretrainJob

EXAMPLES = sorted((Path(__file__).parents[2] / "manifests" / "examples").glob("*.yaml"))


def test_examples_are_numbered_without_a_gap() -> None:
    assert EXAMPLES
    assert [int(path.name[:2]) for path in EXAMPLES] == list(range(1, len(EXAMPLES) + 1))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_valid(path: Path) -> None:
    job = PretrainJob.model_validate(yaml.safe_load(path.read_text()))
    assert job.spec.world_size >= 1
    assert job.spec.checkpoint.enable


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_commands_above_an_example_are_about_it(path: Path) -> None:
    text = path.read_text()
    name = yaml.safe_load(text)["metadata"]["name"]
    for command in (
        f"kubectl apply -f manifests/examples/{path.name}",
        f"kubectl get pretrainjob {name} --watch",
        f"kubectl delete -f manifests/examples/{path.name}",
    ):
        assert command in text
