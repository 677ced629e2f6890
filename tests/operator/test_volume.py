"""A checkpoint volume that can't be used: a condition with a reason, no pods, and it heals."""

from typing import Any

import pytest

from pretrain_api import names
from pretrain_api.wire import Progress, Result
from pretrain_operator.cluster import ConflictError, Kind
from pretrain_operator.testing import JOB, Bench, message

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
    assert bench.condition(names.RUNNING) == ("False", "NameTaken")
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


async def test_a_refusal_with_other_numbers_each_time_is_one_event(bench: Bench) -> None:
    used = iter(range(1000))
    bench.cluster.admit = lambda kind, body: (
        f"exceeded quota: used {next(used)}" if kind is Kind.POD else None
    )
    await bench.submit()
    for _ in range(6):
        await bench.round()
    assert bench.events().count("WorkersRefused") == 1
    assert bench.condition(names.RUNNING) == ("False", "WorkersRefused")


async def test_trouble_beside_a_refusal_is_no_news_each_time(bench: Bench) -> None:
    bench.cluster.admit = lambda kind, body: (
        "quota" if kind is Kind.POD and body["metadata"]["name"] == "llama-1-1" else None
    )
    await bench.submit()
    await bench.settle()
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    status = {"name": names.CONTAINER, "state": {"waiting": waiting}}
    bench.cluster.set_status("llama-0-1", containerStatuses=[status])
    for _ in range(4):
        await bench.round()
    assert bench.events().count("ImagePullBackOff") <= 1
    assert bench.events().count("WorkersRefused") == 1


async def test_an_event_is_told_only_after_its_status_was_written(bench: Bench) -> None:
    await bench.submit(volumes=NAMED)
    write = bench.cluster.patch_status

    async def conflict(*_: Any) -> Any:
        raise ConflictError("changed", 409)

    bench.cluster.patch_status = conflict
    for _ in range(3):
        with pytest.raises(ConflictError):
            await bench.round()
    assert bench.events() == []
    bench.cluster.patch_status = write
    await bench.settle()
    await bench.settle()
    assert bench.events() == ["ClaimMissing"]


def copied(pod: dict[str, Any], name: str) -> dict[str, Any]:
    """A pod somebody made from the manifest of another, labels included."""
    labels = pod["metadata"]["labels"]
    return {"metadata": {"name": name, "labels": dict(labels)}, "spec": pod["spec"]}


async def test_a_pod_with_copied_labels_is_neither_believed_nor_deleted(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    await bench.cluster.create(Kind.POD, "default", copied(bench.cluster.pod("llama-0-1"), "debug"))
    await bench.settle()
    assert "deletionTimestamp" not in bench.cluster.pod("debug")["metadata"]
    bench.cluster.finish("debug", 0, message(Result.COMPLETE, Progress(step=100, steps=100)))
    await bench.settle()
    assert bench.condition(names.COMPLETE) is None
    assert bench.status.workers.active == 2


async def test_an_owned_pod_of_another_name_does_not_complete_the_job(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    real = bench.cluster.pod("llama-0-1")
    forged = copied(real, "debug")
    forged["metadata"]["ownerReferences"] = real["metadata"]["ownerReferences"]
    await bench.cluster.create(Kind.POD, "default", forged)
    bench.cluster.finish("debug", 0, message(Result.COMPLETE, Progress(step=100, steps=100)))
    await bench.settle()
    assert bench.condition(names.COMPLETE) is None


async def test_a_pod_that_goes_before_it_is_told_is_no_error(bench: Bench) -> None:
    await bench.submit()
    await bench.settle()
    for name in bench.member_pods():
        bench.cluster.start(name)
    await bench.round()  # names the leader
    bench.stale = bench.cluster.pods()
    bench.cluster.vanish(Kind.POD, "llama-1-1")
    await bench.round()
    told = bench.cluster.pod("llama-0-1")["metadata"]["annotations"]
    assert names.ANNOTATION_ASSIGNMENT in told
    bench.stale = None
    await bench.train()
    assert bench.member_pods() == ["llama-0-1", "llama-1-2"]
