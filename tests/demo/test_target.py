"""The demo kills pods: no command of it may reach a cluster that nobody named."""

import stat
from pathlib import Path

import pytest

from pretrain_demo import story
from pretrain_demo.console import Console
from pretrain_demo.target import DemoError, Target, choose, devcluster
from pretrain_devcluster.layout import Layout

STRANGER = "/home-of-a-stranger/.kube/config"
# Stands in for kubectl and helm; writes down how it was called and shows a job at its end.
RECORDER = """#!/bin/sh
variables="KUBECONFIG=${KUBECONFIG-unset} CONTEXT=${HELM_KUBECONTEXT-unset}"
echo "$(basename "$0") $* $variables" >> "$CALLS"
case "$*" in *"get pretrainjobs"*) cat "$ANSWER";; *"get pods"*) echo pod-1;; esac
"""


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def environ(tmp_path: Path, calls: Path) -> dict[str, str]:
    """A shell in which a stranger's cluster is the default, and recorders are on PATH."""
    for name in ("kubectl", "helm"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(RECORDER)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "KUBECONFIG": STRANGER,
        "HELM_KUBECONTEXT": "stranger",
        "HELM_KUBEAPISERVER": "https://stranger.example",
        "CALLS": str(calls),
        "ANSWER": str(tmp_path / "answer.json"),
    }


def test_a_strangers_kubeconfig_receives_nothing(
    environ: dict[str, str], calls: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "cache")
    (tmp_path / "answer.json").write_text(
        '{"status": {"conditions": [], "progress": {"step": 50, "steps": 100}}}'
    )
    target = devcluster(environ, layout)
    story.clear_stage(target)
    target.kubectl("apply", "-f", "job.yaml")
    target.helm("upgrade", "--install", "x", "y")
    assert story.read(target).step == 50
    lines = calls.read_text().splitlines()
    assert len(lines) >= 6
    for line in lines:
        assert f"--kubeconfig={layout.kubeconfig}" in line
        assert line.endswith("KUBECONFIG=unset CONTEXT=unset")


def test_the_kill_goes_to_the_named_cluster_only(
    environ: dict[str, str], calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = devcluster(environ, Layout(tmp_path / "cache"))
    (tmp_path / "answer.json").write_text(
        '{"status": {"assignment": {"generation": 1}, "progress": {"step": 9, "steps": 10}}}'
    )
    monkeypatch.setattr(story, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(DemoError, match="gave up"):
        story.kill_worker(target, Console())
    deletions = [line for line in calls.read_text().splitlines() if " delete pod " in line]
    assert len(deletions) == 1
    assert f"--kubeconfig={tmp_path / 'cache'}" in deletions[0]
    assert f"--namespace={story.NAMESPACE}" in deletions[0]


def test_the_default_is_the_cluster_of_this_machine(environ: dict[str, str]) -> None:
    target = choose(environ)
    assert target.own
    assert target.kubectl_flags == (f"--kubeconfig={Layout.default().kubeconfig}",)


@pytest.mark.parametrize(
    "named",
    [
        {"CLUSTER": "existing"},
        {"CLUSTER": "existing", "CONTEXT": "mine"},
        {"CLUSTER": "existing", "REGISTRY": "registry.example"},
        {"CLUSTER": "kind"},
        {"CONTEXT": "mine"},
        {"REGISTRY": "registry.example"},
    ],
)
def test_a_cluster_named_by_halves_is_refused(
    environ: dict[str, str], named: dict[str, str], calls: Path
) -> None:
    with pytest.raises(DemoError, match=r"CLUSTER|CONTEXT"):
        choose(environ | named)
    assert not calls.exists()


def test_an_existing_cluster_is_reached_by_its_context(environ: dict[str, str]) -> None:
    named = {"CLUSTER": "existing", "CONTEXT": "mine", "REGISTRY": "registry.example/team/"}
    target: Target = choose(environ | named)
    assert not target.own
    assert target.kubectl_flags == ("--context=mine",)
    assert target.helm_flags == ("--kube-context=mine",)
    assert target.registry == "registry.example/team"
    assert target.environment["KUBECONFIG"] == STRANGER
    assert "HELM_KUBECONTEXT" not in target.environment
