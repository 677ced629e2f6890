"""Workers whose kubelet passed over what they were told: their pods are touched until they know."""

import pytest

from pretrain_api import names
from pretrain_api.wire import Order, Phase, Progress, WorkerStatus
from pretrain_operator.cluster import Kind
from pretrain_operator.testing import JOB, Bench

RUNNING = Progress(step=5, steps=100)


def reminded(bench: Bench, pod: str) -> str | None:
    return bench.cluster.pod(pod)["metadata"]["annotations"].get(names.ANNOTATION_REMINDED)


def says(bench: Bench, pod: str, generation: int, **more: object) -> None:
    """What the worker of a pod answers from now on."""
    said = WorkerStatus(generation=generation, phase=Phase.WAITING, **more)
    bench.workers.reports[pod] = said


async def second_generation(bench: Bench) -> str:
    """The first worker, which stays, has been told of a second generation."""
    await bench.submit()
    await bench.train(RUNNING)
    await bench.crash()
    assert bench.status.assignment.generation == 2
    return bench.member_pods()[0]


async def test_one_that_did_not_hear_of_its_generation_is_reminded(bench: Bench) -> None:
    leader = await second_generation(bench)
    says(bench, leader, generation=1)
    await bench.settle()
    assert reminded(bench, leader) is None  # the file takes a moment
    bench.cluster.advance(5)
    await bench.settle()
    first = reminded(bench, leader)
    assert first is not None
    bench.cluster.advance(29)
    await bench.settle()
    assert reminded(bench, leader) == first  # no writes without end
    bench.cluster.advance(1)
    await bench.settle()
    assert reminded(bench, leader) not in (None, first)


async def test_one_that_has_heard_is_left_alone(bench: Bench) -> None:
    leader = await second_generation(bench)
    says(bench, leader, generation=2)
    bench.cluster.advance(60)
    await bench.settle()
    assert reminded(bench, leader) is None


async def test_one_that_does_not_leave_as_ordered_is_reminded(bench: Bench) -> None:
    await bench.submit()
    await bench.train(RUNNING)
    deaf, leaving = bench.member_pods()
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
    await bench.settle()
    assert bench.status.assignment.order is Order.DRAIN
    says(bench, deaf, generation=1)
    says(bench, leaving, generation=1, draining=True)
    bench.cluster.advance(5)
    await bench.settle()
    assert reminded(bench, deaf) is not None
    assert reminded(bench, leaving) is None


@pytest.mark.parametrize("words", ["yesterday", "2026-01-01", "2026-01-01T00:00:00"])
async def test_a_time_that_somebody_edited_is_no_reminder(bench: Bench, words: str) -> None:
    leader = await second_generation(bench)
    edited = {"metadata": {"annotations": {names.ANNOTATION_REMINDED: words}}}
    bench.cluster.edit(Kind.POD, leader, edited)
    says(bench, leader, generation=1)
    bench.cluster.advance(5)
    await bench.settle()
    assert reminded(bench, leader) == bench.cluster.now.isoformat()
