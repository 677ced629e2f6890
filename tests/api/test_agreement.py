"""The API server and pydantic say yes to the same jobs, and no to the same."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain_api import crd, mesh, names
from pretrain_api.job import JobSpec
from pretrain_api.job_rules import SPEC_RULES
from pretrain_api.schema import aliases
from pretrain_api.support import support_rules


def pydantic_errors(spec: dict[str, Any], model: type[JobSpec] = JobSpec) -> list[str]:
    try:
        model.model_validate(spec)
    except ValidationError as error:
        return [f"{e['loc']}: {e['msg']}" for e in error.errors()]
    return []


def disagreement(
    spec: dict[str, Any], server: list[str], model: type[JobSpec] = JobSpec
) -> str | None:
    here = pydantic_errors(spec, model)
    if bool(here) == bool(server):
        return None
    return f"{json.dumps(spec)}\n  pydantic: {here or 'yes'}\n  API server: {server or 'yes'}"


def test_each_value_alone(stand_in: Any, specs: Any) -> None:
    found = [disagreement(spec, stand_in.errors(spec)) for spec in specs(0, 0)]
    assert not list(filter(None, found))


def test_the_values_cover_yes_and_no(specs: Any) -> None:
    verdicts = [bool(pydantic_errors(spec)) for spec in specs(0, 0)]
    assert verdicts.count(True) > 50
    assert verdicts.count(False) > 50


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_values_together(
    stand_in: Any, values: dict[str, list[Any]], spec_with: Any, data: st.DataObject
) -> None:
    paths = data.draw(st.lists(st.sampled_from(sorted(values)), max_size=6, unique=True))
    spec = spec_with({path: data.draw(st.sampled_from(values[path])) for path in paths})
    assert disagreement(spec, stand_in.errors(spec)) is None


ARITHMETIC = {
    "workers.replicas": st.integers(1, 6),
    "workers.minReplicas": st.integers(1, 4),
    "workers.maxReplicas": st.integers(1, 12),
    "workers.processesPerWorker": st.integers(1, 4),
    "training.localBatchSize": st.integers(1, 4),
    "training.globalBatchSize": st.one_of(st.just(-1), st.integers(1, 48)),
    "training.dataStreams": st.integers(1, 48),
    "parallelism.dataParallelReplicateDegree": st.integers(1, 6),
    "parallelism.dataParallelShardDegree": st.one_of(st.just(-1), st.integers(1, 12)),
    "parallelism.fsdpReshardAfterForward": st.integers(1, 6),
}


@settings(max_examples=300, deadline=None)
@given(choices=st.fixed_dictionaries({}, optional=ARITHMETIC))
def test_arithmetic(stand_in: Any, spec_with: Any, choices: dict[str, Any]) -> None:
    spec = spec_with(choices)
    assert disagreement(spec, stand_in.errors(spec)) is None


LAYOUT = {
    **ARITHMETIC,
    "model.name": st.sampled_from(("llama3", "mine")),
    "model.flavor": st.sampled_from(("8B", "debugmodel", "tiny")),
    "training.localBatchSize": st.sampled_from((1, 2, 4, 8, 9, 16)),
    "training.seqLen": st.sampled_from((2048, 12, 6, 7)),
    "workers.replicas": st.sampled_from((1, 2, 4, 8)),
    "workers.minReplicas": st.sampled_from((1, 2, 4)),
    "compile.enable": st.booleans(),
    "compile.components": st.sampled_from((["model"], ["loss"])),
    **{
        f"parallelism.{kind}Degree": st.sampled_from((1, 2, 3, 4, 8))
        for kind in (
            "dataParallelReplicate",
            "tensorParallel",
            "contextParallel",
            "pipelineParallel",
            "expertParallel",
            "expertTensorParallel",
        )
    },
    "parallelism.enableAsyncTensorParallel": st.booleans(),
    "parallelism.pipelineParallelSchedule": st.sampled_from((*mesh.SCHEDULES, "2F2B")),
    "parallelism.pipelineParallelScheduleCsv": st.sampled_from(("", "order.csv")),
    "parallelism.pipelineParallelLayersPerStage": st.integers(1, 9),
    "parallelism.pipelineParallelMicrobatchSize": st.sampled_from((1, 2, 3)),
    "parallelism.pipelineParallelFirstStageLessLayers": st.integers(0, 9),
    "parallelism.pipelineParallelLastStageLessLayers": st.integers(0, 9),
    "parallelism.moduleFqnsPerModelPart": st.sampled_from(([["a"], ["b"]], [["a"]] * 4)),
}


class Open(JobSpec):
    """A job that may ask for what isn't built yet, so that the rules behind are reached."""

    rules: ClassVar = SPEC_RULES


@pytest.fixture(scope="module")
def open_stand_in(stand_in: Any) -> Any:
    """An API server without the table of what isn't built."""
    (version,) = crd.definition()["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for rule in support_rules():
        node = schema
        for name in aliases(rule.path):
            node = node["properties"][name]
        kept = [each for each in node["x-kubernetes-validations"] if each["rule"] != rule.cel]
        node["x-kubernetes-validations"] = kept
    return type(stand_in)(schema)


@settings(max_examples=1000, deadline=None)
@given(choices=st.fixed_dictionaries({}, optional=LAYOUT))
def test_layouts(open_stand_in: Any, spec_with: Any, choices: dict[str, Any]) -> None:
    spec = spec_with(choices)
    server = open_stand_in.errors(spec)
    assert disagreement(spec, server, Open) is None


OTHER_GROUP = f"agreement.{names.GROUP}"  # a cluster in use keeps the CRD it has


def other_definition() -> dict[str, Any]:
    """The CRD under a group of its own."""
    definition = crd.definition()
    definition["metadata"]["name"] = f"{names.PLURAL}.{OTHER_GROUP}"
    definition["spec"]["group"] = OTHER_GROUP
    for key in ("shortNames", "categories"):
        del definition["spec"]["names"][key]
    return definition


JOBS = f"apis/{OTHER_GROUP}/{names.VERSION}/namespaces/default/{names.PLURAL}"


def send(method: str, address: str, body: dict[str, Any] | None = None) -> str | None:
    """Send JSON to a real API server; what it says against it, or None."""
    kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
    data = None if body is None else json.dumps(body).encode()
    request = Request(address, data=data, headers={"Content-Type": kind}, method=method)
    try:
        with urlopen(request, timeout=30) as answer:
            assert answer.status in (HTTPStatus.OK, HTTPStatus.CREATED)
    except HTTPError as error:
        if error.code not in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY):
            raise
        return json.load(error)["message"]
    return None


def as_job(spec: dict[str, Any]) -> dict[str, Any]:
    """The whole object."""
    return {
        "apiVersion": f"{OTHER_GROUP}/{names.VERSION}",
        "kind": names.KIND,
        "metadata": {"name": "job"},
        "spec": spec,
    }


def refusal(server: str, spec: dict[str, Any]) -> str | None:
    """What a real API server says against a spec; nothing is stored."""
    return send("POST", f"{server}/{JOBS}?dryRun=All&fieldValidation=Strict", as_job(spec))


@contextmanager
def proxy(kubectl: list[str]) -> Iterator[str]:
    """Address of the API server on this machine, without credentials."""
    command = [*kubectl, "proxy", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield "http://" + process.stdout.readline().split()[-1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from pretrain_devcluster import Cluster
    from pretrain_devcluster.shell import wait_until

    cluster = Cluster.up(quiet=True)
    name = f"crd/{names.PLURAL}.{OTHER_GROUP}"
    cluster.kubectl("apply", "--server-side", "-f", "-", text=json.dumps(other_definition()))
    try:
        established = "{.status.conditions[?(@.type=='Established')].status}"

        # `kubectl wait` gives up on a definition that has no conditions yet.
        def served() -> bool:
            return cluster.kubectl("get", name, "-o", f"jsonpath={established}") == "True"

        wait_until(served, f"{name} being served", 60)
        kubectl = [str(cluster.layout.path / "kubectl"), f"--kubeconfig={cluster.kubeconfig}"]
        with proxy(kubectl) as address:
            yield address
    finally:
        cluster.kubectl("delete", name)


def check_agreement(server: str, specs: list[dict[str, Any]], stand_in: Any) -> None:
    said = [refusal(server, spec) for spec in specs]
    found = [
        disagreement(spec, [message] if message else [])
        for spec, message in zip(specs, said, strict=True)
    ]
    assert not list(filter(None, found))
    # The stand-in's licence: it says what the real one says.
    assert [bool(stand_in.errors(spec)) for spec in specs] == list(map(bool, said))


@pytest.mark.cluster
def test_a_real_api_server_agrees(server: str, specs: Any, stand_in: Any) -> None:
    check_agreement(server, [*specs(300, 7), *sizes()], stand_in)


def sizes() -> list[dict[str, Any]]:
    """Specs of every size, legal and not, in a world of up to six workers."""
    bounds = [
        {"replicas": replicas, "minReplicas": least, "maxReplicas": most}
        for replicas in (1, 2, 4, 6)
        for least in (1, 2, 3)
        for most in (4, 6)
    ]
    training = {"dataset": "c4", "localBatchSize": 1, "globalBatchSize": 12, "dataStreams": 12}
    return [{"training": training, "workers": workers} for workers in bounds]


@pytest.fixture
def stored(server: str) -> Iterator[str]:
    """Address of a job that may have one to four workers and has two."""
    workers = {"replicas": 2, "minReplicas": 1, "maxReplicas": 4}
    spec = {"training": {"dataset": "c4"}, "workers": workers, "managedBy": "example.com/nobody"}
    assert send("POST", f"{server}/{JOBS}", as_job(spec)) is None
    yield f"{server}/{JOBS}/job"
    send("DELETE", f"{server}/{JOBS}/job")


@pytest.mark.cluster
def test_kubectl_scale_goes_by_the_same_rules(stored: str) -> None:
    def scale(replicas: int) -> str | None:
        return send("PATCH", f"{stored}/scale", {"spec": {"replicas": replicas}})

    def edit(**workers: int) -> str | None:
        return send("PATCH", stored, {"spec": {"workers": workers}})

    assert scale(4) is None
    assert scale(1) is None
    assert "don't come out even" in (scale(3) or "")
    assert "maxReplicas: Invalid value" in (scale(5) or "")
    assert "should be greater than or equal to 1" in (scale(0) or "")
    assert "workers.maxReplicas never changes" in (edit(maxReplicas=8) or "")
    assert "don't come out even" in (edit(replicas=3) or "")
    assert edit(replicas=2) is None
