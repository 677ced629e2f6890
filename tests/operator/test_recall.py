"""What is known without asking: never less than what this operator or any before it has written."""

from collections.abc import Callable
from typing import Any

import pytest

from pretrain_api import names
from pretrain_operator.cluster import Body, ClusterError, ConflictError, Kind
from pretrain_operator.metrics import Metrics
from pretrain_operator.podwatch import PodCache
from pretrain_operator.recall import RecallingCluster
from pretrain_operator.reconcile import Reconciler
from pretrain_operator.settings import Settings
from pretrain_operator.testing import JOB, MemoryCluster, SilentWorkers, job_body

KEY = ("default", JOB)


class Counting(MemoryCluster):
    """A cluster that counts how often it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    async def get(self, kind: Kind, namespace: str, name: str) -> Body:
        self.reads += 1
        return await super().get(kind, namespace, name)


class Scene:
    def __init__(self) -> None:
        self.stored = Counting()
        self.pods = PodCache()
        self.term = 1
        self.cluster = RecallingCluster(self.stored, self.pods, lambda: self.term)

    async def job(self) -> Body:
        return await self.cluster.get(Kind.JOB, *KEY)

    async def write(self, phase: str, version: str | None = None) -> Body:
        meta = {"resourceVersion": version} if version else {}
        patch = {"metadata": meta, "status": {"phase": phase}}
        return await self.cluster.patch_status(Kind.JOB, *KEY, patch)

    async def write_elsewhere(self, phase: str) -> Body:
        return await self.stored.patch_status(Kind.JOB, *KEY, {"status": {"phase": phase}})

    def before_the_answer(self, verb: str, event: Callable[[], None]) -> None:
        """Have something happen once a request is carried out, and not answered yet."""
        carry_out = getattr(self.stored, verb)

        async def late(*arguments: Any) -> Body:
            answer = await carry_out(*arguments)
            event()
            return answer

        setattr(self.stored, verb, late)

    def suspend(self) -> None:
        """A user suspends the job, and the watch brings it."""
        self.stored.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
        self.cluster.saw(self.stored.all(Kind.JOB)[0])

    async def phase(self) -> str | None:
        return (await self.job()).get("status", {}).get("phase")


@pytest.fixture
async def scene() -> Scene:
    scene = Scene()
    await scene.stored.create(Kind.JOB, "default", job_body())
    return scene


async def test_only_the_first_round_reads_the_job(scene: Scene) -> None:
    await scene.job()
    await scene.write("Pending")
    assert await scene.phase() == "Pending"
    await scene.write("Running")
    assert await scene.phase() == "Running"
    assert scene.stored.reads == 1


async def test_what_another_operator_wrote_is_read(scene: Scene) -> None:
    await scene.job()
    scene.term += 1  # somebody else led
    await scene.write_elsewhere("Failed")
    assert await scene.phase() == "Failed"
    assert scene.stored.reads == 2


async def test_an_answer_of_an_earlier_term_is_not_kept(scene: Scene) -> None:
    await scene.job()
    scene.term += 1
    await scene.write("Pending")  # a round that was begun before
    await scene.write_elsewhere("Failed")
    assert await scene.phase() == "Failed"


async def test_the_watch_brings_what_users_write(scene: Scene) -> None:
    body = await scene.job()
    scene.stored.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
    assert "suspend" not in (await scene.job())["spec"]
    [changed] = scene.stored.all(Kind.JOB)
    scene.cluster.saw(changed)
    scene.cluster.saw(body)  # late
    assert (await scene.job())["spec"]["suspend"] is True
    assert scene.stored.reads == 1


async def test_what_the_watch_brings_before_an_answer_is_not_lost(scene: Scene) -> None:
    await scene.job()
    scene.before_the_answer("patch_status", scene.suspend)
    await scene.write("Pending")
    job = await scene.job()
    assert (job["spec"]["suspend"], job["status"]["phase"]) == (True, "Pending")
    assert scene.stored.reads == 1


async def test_what_the_watch_brings_while_a_job_is_read_is_not_lost(scene: Scene) -> None:
    await scene.write_elsewhere("Pending")
    scene.before_the_answer("get", scene.suspend)
    assert (await scene.job())["spec"]["suspend"] is True
    assert (await scene.job())["spec"]["suspend"] is True
    assert scene.stored.reads == 1


async def test_a_job_that_was_forgotten_meanwhile_is_read_again(scene: Scene) -> None:
    await scene.job()
    scene.before_the_answer("patch_status", lambda: scene.cluster.forget(KEY))
    await scene.write("Pending")
    assert await scene.phase() == "Pending"
    assert scene.stored.reads == 2


async def test_a_new_job_is_taken_from_the_watch(scene: Scene) -> None:
    [body] = scene.stored.all(Kind.JOB)
    scene.cluster.saw(body)
    assert await scene.job() == body
    await scene.write("Pending", body["metadata"]["resourceVersion"])
    assert await scene.phase() == "Pending"
    assert scene.stored.reads == 0


async def test_of_a_new_job_too_another_term_may_know_more(scene: Scene) -> None:
    [body] = scene.stored.all(Kind.JOB)
    scene.cluster.saw(body)
    scene.term += 1
    await scene.write_elsewhere("Failed")
    assert await scene.phase() == "Failed"


async def test_of_a_job_that_was_not_read_the_watch_is_not_enough(scene: Scene) -> None:
    [body] = scene.stored.all(Kind.JOB)
    scene.cluster.saw({**body, "status": {"phase": "older"}})
    assert await scene.phase() is None
    assert scene.stored.reads == 1


async def test_after_a_write_that_failed_the_job_is_read(scene: Scene) -> None:
    version = (await scene.job())["metadata"]["resourceVersion"]
    scene.stored.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
    with pytest.raises(ConflictError):
        await scene.write("Running", version)
    assert (await scene.job())["spec"]["suspend"] is True
    assert scene.stored.reads == 2


async def test_a_job_that_is_deleted_is_not_remembered(scene: Scene) -> None:
    await scene.job()
    await scene.cluster.delete(Kind.JOB, *KEY)
    with pytest.raises(ClusterError):
        await scene.job()


async def test_a_job_that_is_deleted_meanwhile_is_no_trouble(scene: Scene) -> None:
    await scene.job()
    await scene.stored.delete(Kind.JOB, *KEY)
    workers, metrics = SilentWorkers(), Metrics()
    reconciler = Reconciler(scene.cluster, workers, scene.pods, Settings(), metrics)
    with pytest.raises(ConflictError, match="not found"):  # quiet, and soon tried again
        await reconciler.reconcile(KEY)
    assert await reconciler.reconcile(KEY) is None


async def test_what_is_written_to_a_pod_is_in_the_cache_at_once(scene: Scene) -> None:
    labels = {
        names.LABEL_JOB: JOB,
        names.LABEL_WORKER: "0",
        names.LABEL_GENERATION: "1",
    }
    body = {"metadata": {"name": "llama-0-1", "labels": labels}, "spec": {}}
    await scene.cluster.create(Kind.POD, "default", body)
    [pod] = scene.pods(KEY)
    assert (pod.name, pod.phase, pod.assignment) == ("llama-0-1", "Pending", None)
    told = {"metadata": {"annotations": {names.ANNOTATION_ASSIGNMENT: "word"}}}
    await scene.cluster.patch(Kind.POD, "default", "llama-0-1", told)
    [pod] = scene.pods(KEY)
    assert pod.assignment == "word"
