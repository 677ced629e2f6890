"""Monitors and alerts: what they select is there, and promtool agrees with every alert's story."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain_agent import metrics as worker_metrics
from pretrain_api import names
from pretrain_api.job import PretrainJob
from pretrain_api.status import JobStatus
from pretrain_api.wire import WorkerStatus
from pretrain_operator.metrics import Metrics
from pretrain_operator.resources.pods import build_pod
from pretrain_operator.testing import job_body

pytestmark = pytest.mark.cluster  # needs helm, which is built with the cluster's tools

Render = Callable[..., list[dict[str, Any]]]
NAME = "pretrain-operator"
ON = {
    "podMonitor": {"enabled": True, "labels": {"release": "kube-prometheus"}, "interval": "30s"},
    "prometheusRule": {"enabled": True, "labels": {"release": "kube-prometheus"}},
}


def named(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    [found] = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector["matchLabels"].items() <= labels.items()


def test_nothing_of_the_prometheus_operator_is_rendered_unless_asked_for(render: Render) -> None:
    groups = {each["apiVersion"].partition("/")[0] for each in render()}
    assert "monitoring.coreos.com" not in groups


def test_the_monitors_select_operators_and_workers(render: Render) -> None:
    objects = render(ON)
    ours = named(objects, "PodMonitor", "pretrain-operator")
    workers = named(objects, "PodMonitor", "pretrain-operator-workers")
    deployment = named(objects, "Deployment", "pretrain-operator")["spec"]["template"]
    job = PretrainJob.model_validate(job_body())
    pod = build_pod(job, 0, 1, "trainer", 30)
    for monitor, target in ((ours, deployment), (workers, pod)):
        [container] = target["spec"]["containers"]
        [endpoint] = monitor["spec"]["podMetricsEndpoints"]
        assert matches(monitor["spec"]["selector"], target["metadata"]["labels"])
        assert endpoint["port"] in [port["name"] for port in container["ports"]]
        assert endpoint["interval"] == "30s"
        assert monitor["metadata"]["labels"]["release"] == "kube-prometheus"
    assert not matches(ours["spec"]["selector"], pod["metadata"]["labels"])
    assert not matches(workers["spec"]["selector"], deployment["metadata"]["labels"])
    assert set(workers["spec"]["podTargetLabels"]) <= pod["metadata"]["labels"].keys()
    assert workers["spec"]["podTargetLabels"] == [names.LABEL_JOB, names.LABEL_WORKER]


def test_workers_are_looked_for_where_jobs_are_served(render: Render) -> None:
    everywhere = named(render(ON), "PodMonitor", "pretrain-operator-workers")
    assert everywhere["spec"]["namespaceSelector"] == {"any": True}
    some = named(render(ON | {"watchNamespaces": ["a", "b"]}), "PodMonitor",
                 "pretrain-operator-workers")  # fmt: skip
    assert some["spec"]["namespaceSelector"] == {"matchNames": ["a", "b"]}


def exported() -> set[str]:
    """Names of all samples that operators and workers export."""
    metrics = Metrics()
    metrics.record("team", "job", JobStatus())
    found = {
        sample
        for family in metrics.registry.collect()
        for sample in _names(family.name, family.type)
    }
    return found | set(
        re.findall(r"^(\w+)", worker_metrics.render(WorkerStatus(), 1.0).decode(), re.M)
    )


def _names(name: str, kind: str) -> set[str]:
    return {f"{name}_total"} if kind == "counter" else {name, f"{name}_bucket"}


def test_alerts_ask_only_for_what_is_exported(render: Render) -> None:
    rule = named(render(ON), "PrometheusRule", "pretrain-operator")
    asked = set(re.findall(r"pretrain_\w+", str([r["expr"] for r in rules(rule["spec"])])))
    assert len(asked) > 8
    assert asked <= exported()


def rules(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [rule for group in spec["groups"] for rule in group["rules"]]


def test_the_rule_carries_the_file_that_promtool_checks(render: Render, chart: Path) -> None:
    alone = named(render({"prometheusRule": ON["prometheusRule"]}), "PrometheusRule", NAME)
    assert alone["spec"] == yaml.safe_load((chart / "files" / "alerts.yaml").read_text())
    assert alone["metadata"]["labels"]["release"] == "kube-prometheus"
    # With a monitor of its own a release knows how its operators are labelled.
    [absent, *others] = rules(named(render(ON), "PrometheusRule", NAME)["spec"])
    assert others == rules(alone["spec"])[1:]
    assert absent["alert"] == "PretrainOperatorAbsent"
    assert 'leader{job="pretrain-system/pretrain-operator"} == 1' in absent["expr"]
    renamed = rules(named(render(ON | {"fullnameOverride": "x"}), "PrometheusRule", "x")["spec"])
    assert absent["expr"].replace(f"/{NAME}", "/x") == renamed[0]["expr"]


def test_promtool_finds_no_mistake_in_the_alerts(promtool: str, chart: Path) -> None:
    done = subprocess.run(
        [promtool, "check", "rules", chart / "files" / "alerts.yaml"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def play(promtool: str, stories: Path, alerts: list[dict[str, Any]], folder: Path) -> None:
    """Have promtool play a file of stories against alerts."""
    # promtool compares annotations too; what these say is not what is tested here.
    bare = [{key: rule[key] for key in rule if key != "annotations"} for rule in alerts]
    groups = {"groups": [{"name": "all", "rules": bare}]}
    (folder / "alerts.yaml").write_text(yaml.safe_dump(groups))
    shutil.copy(stories, folder)
    done = subprocess.run(
        [promtool, "test", "rules", folder / stories.name], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_only_then(
    promtool: str, chart: Path, repository: Path, tmp_path: Path
) -> None:
    stories = repository / "tests" / "chart" / "alerts_test.yaml"
    expected = yaml.safe_load(stories.read_text())["tests"]
    told = {case["alertname"] for story in expected for case in story["alert_rule_test"]}
    alerts = rules(yaml.safe_load((chart / "files" / "alerts.yaml").read_text()))
    assert told == {rule["alert"] for rule in alerts}
    play(promtool, stories, alerts, tmp_path)


def test_the_operator_of_another_release_hides_nothing(
    promtool: str, render: Render, repository: Path, tmp_path: Path
) -> None:
    alerts = rules(named(render(ON), "PrometheusRule", NAME)["spec"])
    play(promtool, repository / "tests" / "chart" / "releases_test.yaml", alerts, tmp_path)


def test_every_alert_says_what_to_do(chart: Path, repository: Path) -> None:
    page = (repository / "docs" / "alerts.md").read_text()
    headings = set(re.findall(r"^## (\w+)$", page, re.M))
    alerts = rules(yaml.safe_load((chart / "files" / "alerts.yaml").read_text()))
    assert headings == {rule["alert"] for rule in alerts}
    for rule in alerts:
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["labels"]["severity"] in {"warning", "critical"}


def test_promtool_finds_the_metrics_well_named(promtool: str) -> None:
    from prometheus_client import generate_latest

    metrics = Metrics()
    metrics.record("team", "job", JobStatus())
    for text in (generate_latest(metrics.registry), worker_metrics.render(WorkerStatus(), 1.0)):
        done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
