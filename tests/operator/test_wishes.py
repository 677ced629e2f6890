"""What a user may ask of a job in any state: keep or drop the claim, suspend, run out of time."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pretrain_api import names
from pretrain_api.status import JobPhase
from pretrain_api.wire import Progress, Result
from pretrain_operator.cluster import ConflictError, Kind
from pretrain_operator.testing import JOB, Bench, message

DONE = Progress(step=100, steps=100)


async def make_suspended(bench: Bench) -> None:
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})


async def make_finished(bench: Bench) -> None:
    bench.cluster.finish("llama-0-1", 0, message(Result.COMPLETE, DONE))


async def make_refused(bench: Bench) -> None:
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"training": {"steps": "many"}}})


async def make_held(bench: Bench) -> None:
    bench.cluster.vanish(Kind.CONFIG_MAP, f"{JOB}-config")
    await bench.cluster.create(
        Kind.CONFIG_MAP, "default", {"metadata": {"name": f"{JOB}-config"}, "data": {}}
    )
    bench.cluster.vanish(Kind.POD, "llama-1-1")


async def leave_running(bench: Bench) -> None:
    assert bench.status.phase is JobPhase.STARTING


STATES = [leave_running, make_suspended, make_finished, make_refused, make_held]


def set_retention(bench: Bench, retention: str) -> None:
    volume = {"claimTemplate": {"storage": "1Gi"}, "retention": retention}
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"volumes": {"checkpoint": volume}}})


@pytest.mark.parametrize("at_once", [False, True], ids=["later", "in the same moment"])
@pytest.mark.parametrize("state", STATES)
async def test_retention_may_change_at_any_time(
    bench: Bench, state: Callable[[Bench], Awaitable[None]], at_once: bool
) -> None:
    await bench.submit()
    await bench.train()
    await state(bench)
    if not at_once:
        await bench.settle()
    set_retention(bench, "Delete")
    await bench.settle()
    assert bench.cluster.all(Kind.CLAIM)[0]["metadata"]["ownerReferences"][0]["name"] == JOB
    set_retention(bench, "Retain")
    await bench.settle()
    assert "ownerReferences" not in bench.cluster.all(Kind.CLAIM)[0]["metadata"]


async def test_a_claim_is_retained_before_an_expired_job_goes(bench: Bench) -> None:
    volume = {"claimTemplate": {"storage": "1Gi"}, "retention": "Delete"}
    await bench.submit(ttlSecondsAfterFinished=10, volumes={"checkpoint": volume})
    await bench.train()
    await make_finished(bench)
    await bench.settle()
    bench.cluster.advance(10)
    set_retention(bench, "Retain")
    await bench.settle()
    assert bench.cluster.all(Kind.JOB) == []
    assert len(bench.cluster.all(Kind.CLAIM)) == 1


async def test_retention_leaves_other_owners_of_the_claim_alone(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    claim = bench.cluster.all(Kind.CLAIM)[0]
    other = {"uid": "other", "name": "backup", "controller": True}
    claim["metadata"]["ownerReferences"] = [other]
    set_retention(bench, "Delete")
    await bench.settle()
    owners = bench.cluster.all(Kind.CLAIM)[0]["metadata"]["ownerReferences"]
    assert owners[0] == other
    assert [(owner["name"], owner["controller"]) for owner in owners[1:]] == [(JOB, False)]
    set_retention(bench, "Retain")
    await bench.settle()
    assert bench.cluster.all(Kind.CLAIM)[0]["metadata"]["ownerReferences"] == [other]


async def test_a_claim_of_somebody_else_gets_no_owner(bench: Bench) -> None:
    await bench.submit(suspend=True)
    await bench.settle()
    alien = {"metadata": {"name": f"{JOB}-checkpoint"}, "spec": {}}
    await bench.cluster.create(Kind.CLAIM, "default", alien)
    set_retention(bench, "Delete")
    await bench.settle()
    assert "ownerReferences" not in bench.cluster.all(Kind.CLAIM)[0]["metadata"]


async def test_an_owner_is_set_only_on_the_claim_that_was_read(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    set_retention(bench, "Delete")
    get = bench.cluster.get

    async def get_and_replace(kind: Kind, namespace: str, name: str) -> dict[str, Any]:
        found = await get(kind, namespace, name)
        if kind is Kind.CLAIM:
            bench.cluster.objects[kind, namespace, name]["metadata"]["uid"] = "another"
        return found

    bench.cluster.get = get_and_replace
    with pytest.raises(ConflictError):
        await bench.round()
    assert "ownerReferences" not in bench.cluster.all(Kind.CLAIM)[0]["metadata"]


async def test_a_job_whose_spec_became_invalid_can_be_suspended(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    await make_refused(bench)
    await bench.settle()
    assert all("deletionTimestamp" not in p["metadata"] for p in bench.cluster.pods())
    await make_suspended(bench)
    await bench.obey()
    assert bench.cluster.pods() == []
    assert bench.condition(names.SUSPENDED) == ("True", "Suspended")
    assert bench.condition(names.FAILED) == ("True", "Invalid")
    assert bench.events().count("Invalid") == 1


async def test_the_deadline_holds_for_a_job_whose_spec_became_invalid(bench: Bench) -> None:
    await bench.submit(activeDeadlineSeconds=60)
    await bench.train()
    await make_refused(bench)
    assert await bench.settle() == 60
    bench.cluster.advance(60)
    await bench.settle()
    assert bench.condition(names.FAILED) == ("True", "DeadlineExceeded")
