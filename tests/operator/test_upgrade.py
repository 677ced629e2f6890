"""Another version of the operator takes over running jobs: nothing restarts, nothing is lost."""

import copy
from typing import Any

import pytest

from pretrain_api.status import JobStatus
from pretrain_api.wire import Phase, Progress
from pretrain_operator.cluster import Kind
from pretrain_operator.testing import JOB, Bench


def sprinkled(value: Any) -> Any:
    """A status as a newer version may write it: with fields that nobody knows here, everywhere."""
    if isinstance(value, dict):  # the counts by reason are no object, but a map of numbers
        known = {key: each if key == "byReason" else sprinkled(each) for key, each in value.items()}
        return known | {"future": {"deep": [1, "x"]}}
    if isinstance(value, list):
        return [sprinkled(each) for each in value]
    return value


def bare(status: dict[str, Any]) -> dict[str, Any]:
    """A status as the first version wrote it: only what it had then."""
    first = (
        *("generation", "nonce", "leader", "workers", "created", "notBefore", "announced"),
        "inPlaceBefore",
    )
    old = copy.deepcopy(status)
    old["assignment"] = {key: each for key, each in old["assignment"].items() if key in first}
    old.get("checkpoint", {}).pop("seconds", None)
    return old


async def running(bench: Bench) -> None:
    await bench.submit()
    await bench.train(Progress(step=3, steps=100))
    bench.report(Progress(step=4, steps=100), Phase.STEP)
    await bench.settle()


@pytest.mark.parametrize("change", [sprinkled, bare], ids=["from newer", "from older"])
async def test_a_job_goes_on_under_another_version(bench: Bench, change: Any) -> None:
    await running(bench)
    pods = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in bench.cluster.pods()}
    body = bench.cluster.objects[Kind.JOB, "default", JOB]
    before: JobStatus = bench.status
    body["status"] = change(body["status"])
    written = len(bench.cluster.writes)
    for _ in range(3):
        bench.cluster.advance(20)
        bench.report(Progress(step=9, steps=100), Phase.STEP)
        await bench.settle()
    after = bench.status
    assert {p["metadata"]["name"]: p["metadata"]["uid"] for p in bench.cluster.pods()} == pods
    assert after.assignment == before.assignment
    assert after.attempts == before.attempts
    assert bench.condition("Running") == ("True", "Training")
    said = set(bench.cluster.writes[written:])
    assert said == {f"patch pretrainjobs/{JOB}/status"}  # progress, and nothing else


async def test_pods_of_another_version_are_told_and_replaced_like_ones_own(bench: Bench) -> None:
    await running(bench)
    for name in bench.member_pods():  # what an older or newer builder put into a pod
        pod = bench.cluster.pod(name)
        pod["metadata"]["labels"]["example.com/future"] = "x"
        pod["spec"]["containers"][0]["env"] = []
    await bench.settle()
    assert bench.status.assignment is not None
    assert bench.status.assignment.generation == 1
    bench.cluster.vanish(Kind.POD, "llama-1-1")
    await bench.train()
    assert bench.member_pods() == ["llama-0-1", "llama-1-2"]
