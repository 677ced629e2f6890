"""A checkpoint volume that can't be used: a condition with a reason, no pods, and it heals."""

from typing import Any

import pytest

from pretrain_api import names
from pretrain_operator.cluster import Kind
from pretrain_operator.testing import JOB, Bench

NAMED = {"checkpoint": {"claimName": "shared"}}


async def claim(bench: Bench, name: str = "shared", **fields: Any) -> None:
    body = {
        "metadata": {"name": name},
        "spec": {"accessModes": fields.get("modes", ["ReadWriteMany"])},
        "status": {"phase": fields.get("phase", "Bound")},
    }
    await bench.cluster.create(Kind.CLAIM, "default", body)


async def test_a_missing_claim_heals_when_it_appears(bench: Bench) -> None:
    await bench.submit(volumes=NAMED)
    wake = await bench.settle()
    assert wake is not None
    assert wake <= 30
    await bench.settle()
    assert bench.condition(names.RUNNING) == ("False", "ClaimMissing")
    assert bench.events() == ["ClaimMissing"]
    assert bench.cluster.pods() == []
    await claim(bench)
    await bench.train()
    assert len(bench.cluster.pods()) == 2
    assert bench.status.attempts == ()


@pytest.mark.parametrize(
    ("fields", "replicas", "reason"),
    [
        ({"modes": ["ReadWriteOnce"]}, 2, "ClaimNotShared"),
        ({"modes": ["ReadOnlyMany"]}, 1, "ClaimReadOnly"),
        ({"phase": "Lost"}, 2, "ClaimLost"),
        ({"modes": ["ReadWriteOnce"]}, 1, None),
    ],
)
async def test_claims_that_do_not_do(
    bench: Bench, fields: dict[str, Any], replicas: int, reason: str | None
) -> None:
    await claim(bench, **fields)
    await bench.submit(volumes=NAMED, workers={"replicas": replicas})
    await bench.settle()
    if reason is None:
        assert len(bench.cluster.pods()) == replicas
    else:
        assert bench.condition(names.RUNNING) == ("False", reason)
        assert bench.cluster.pods() == []


async def test_a_claim_left_by_a_namesake_is_not_taken_over(bench: Bench) -> None:
    await claim(bench, f"{JOB}-checkpoint")
    await bench.submit()
    await bench.settle()
    assert bench.condition(names.RUNNING) == ("False", "ClaimTaken")
    assert bench.cluster.pods() == []


async def test_a_claim_lost_while_training_stops_nobody_but_the_next_worker(bench: Bench) -> None:
    await claim(bench)
    await bench.submit(volumes=NAMED)
    await bench.train()
    bench.cluster.vanish(Kind.CLAIM, "shared")
    await bench.settle()
    assert len(bench.cluster.pods()) == 2
    bench.cluster.vanish(Kind.POD, "llama-1-1")
    await bench.settle()
    assert [p["metadata"]["name"] for p in bench.cluster.pods()] == ["llama-0-1"]
    assert bench.condition(names.RUNNING) == ("False", "ClaimMissing")
    await claim(bench)
    await bench.settle()
    assert len(bench.cluster.pods()) == 2


@pytest.mark.parametrize("kind", [Kind.CONFIG_MAP, Kind.NETWORK_POLICY])
async def test_names_that_are_taken_are_reported(bench: Bench, kind: Kind) -> None:
    name = f"{JOB}-config" if kind is Kind.CONFIG_MAP else f"{JOB}-workers"
    await bench.cluster.create(kind, "default", {"metadata": {"name": name}})
    await bench.submit()
    await bench.settle()
    assert bench.condition(names.RUNNING) == ("False", "NameTaken")
    assert bench.cluster.pods() == []


async def test_a_pod_of_the_same_name_is_not_adopted(bench: Bench) -> None:
    alien = {"metadata": {"name": "llama-0-1", "labels": {names.LABEL_JOB: JOB}}, "spec": {}}
    await bench.cluster.create(Kind.POD, "default", alien)
    await bench.submit()
    assert await bench.settle() is not None
    assert bench.condition(names.RUNNING) == ("False", "WorkersRefused")
    assert bench.cluster.pod("llama-0-1")["metadata"]["labels"] == {names.LABEL_JOB: JOB}
    bench.cluster.vanish(Kind.POD, "llama-0-1")
    await bench.train()
    assert len(bench.status.assignment.workers) == 2


async def test_a_refused_pod_is_shown_once_and_tried_again(bench: Bench) -> None:
    bench.cluster.admit = lambda kind, body: "quota exceeded" if kind is Kind.POD else None
    await bench.submit()
    assert await bench.settle() == 15
    await bench.settle()
    assert bench.condition(names.RUNNING) == ("False", "WorkersRefused")
    assert bench.events().count("WorkersRefused") == 1
    assert bench.status.attempts == ()
    bench.cluster.admit = lambda kind, body: None
    await bench.train()
    assert len(bench.cluster.pods()) == 2
