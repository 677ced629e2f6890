"""What can be said of the images without building them; tests/e2e/test_release.py looks inside."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain_api import names
from pretrain_api.job import PretrainJob
from pretrain_operator.resources import build_pod

IMAGES = ("operator", "trainer")
SHELLS = {"sh", "bash", "dash", "ash", "busybox", "env"}


@pytest.fixture(scope="module")
def stages(repository: Path) -> dict[str, list[tuple[str, str]]]:
    """Instructions of every stage of the Dockerfile, each as a word and its arguments."""
    text = re.sub(r"^#.*\n", "", (repository / "Dockerfile").read_text(), flags=re.M)
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            name = rest.rpartition(" AS ")[2]
            found[name] = []
        if name and word:
            found[name].append((word, rest.strip()))
    return found


def of(stage: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for found, rest in stage if found == word]


@pytest.mark.parametrize("image", IMAGES)
def test_the_user_is_a_number_that_runs_as_non_root_can_check(stages: Any, image: str) -> None:
    assert of(stages[image], "USER") == [f"{names.USER_ID}:{names.USER_ID}"]


@pytest.mark.parametrize("image", IMAGES)
def test_it_starts_python_without_a_shell(stages: Any, image: str) -> None:
    [entry] = of(stages[image], "ENTRYPOINT")
    assert json.loads(entry)[:2] == ["python", "-m"]
    assert {word for word, _ in stages[image]}.isdisjoint({"CMD", "HEALTHCHECK", "SHELL", "ADD"})


def test_the_operator_has_no_layer_in_which_a_shell_was(stages: Any) -> None:
    stage = stages["operator"]
    assert stage[:2] == [("FROM", "scratch AS operator"), ("COPY", "--from=pruned / /")]
    for command in of(stage, "RUN"):
        words = re.sub(r"^(--\S+\s+)+", "", command)
        assert isinstance(json.loads(words), list)


def test_it_has_the_settings_of_the_base_that_it_does_not_inherit(stages: Any) -> None:
    def settings(stage: str) -> dict[str, str]:
        pairs = " ".join(of(stages[stage], "ENV")).replace(":$PATH", "").split()
        return dict(pair.split("=", 1) for pair in pairs)

    assert settings("operator") == settings("base")
    assert of(stages["operator"], "WORKDIR") == of(stages["base"], "WORKDIR")


def test_the_base_can_be_named_by_digest(repository: Path) -> None:
    text = (repository / "Dockerfile").read_text()
    assert re.findall(r"^FROM (?!base |scratch )(\S+)", text, re.M) == ["${BASE_IMAGE}"]


def containers(repository: Path) -> list[dict[str, Any]]:
    """Of the pods that the operator makes, and of its own, which are the chart's (a test)."""
    job = yaml.safe_load((repository / "manifests/examples/02-two-workers.yaml").read_text())
    job["metadata"] |= {"namespace": "team", "uid": "uid-of-job"}
    worker = build_pod(PretrainJob.model_validate(job), 0, 1, "trainer:1", 300)
    base = yaml.safe_load_all((repository / "manifests/base/operator.yaml").read_text())
    [operator] = [each["spec"]["template"] for each in base if each["kind"] == "Deployment"]
    specs = [worker["spec"], operator["spec"]]
    return [
        c for spec in specs for key in ("initContainers", "containers") for c in spec.get(key, ())
    ]


def test_no_pod_runs_a_shell_or_a_program_to_see_whether_it_lives(repository: Path) -> None:
    found = containers(repository)
    assert len(found) == 2
    for container in found:
        words = [*container.get("command", ()), *container.get("args", ())]
        assert SHELLS.isdisjoint(Path(word).name for word in words)
        assert "lifecycle" not in container
        probes = {key: probe for key, probe in container.items() if key.endswith("Probe")}
        assert probes
        assert all("httpGet" in probe for probe in probes.values())
