"""The audit: a watch that fell silent is found out, and its jobs are looked after meanwhile."""

from typing import Any

import pytest

from pretrain_api import names
from pretrain_operator import audit
from pretrain_operator.audit import INTERVAL_SECONDS, Audit, Item, item_of, reached
from pretrain_operator.cluster import Body, ClusterError, Kind
from pretrain_operator.metrics import Metrics
from pretrain_operator.podwatch import PodCache
from pretrain_operator.reconcile import Key
from pretrain_operator.testing import MemoryCluster

KEY = ("default", "llama")


class Scene:
    """A cluster, a watch that the test may stop, and what is made of it."""

    def __init__(self) -> None:
        self.cluster = MemoryCluster()
        self.brought: dict[str, Body] = {}
        self.cache = PodCache()
        self.metrics = Metrics()
        self.nudged: list[Key] = []
        self.now = 0.0
        self.down = False
        self.audit = Audit(
            self.fetch,
            self.cluster.get,
            self.cache,
            self.nudged.append,
            self.metrics,
            clock=lambda: self.now,
        )

    async def fetch(self, kind: Kind, namespace: str) -> list[Item]:
        if self.down:
            raise ClusterError("connection refused")
        return [
            item_of(kind, body)
            for body in self.cluster.all(kind)
            if namespace in ("", body["metadata"]["namespace"])
        ]

    async def create(self, name: str = "llama-0-1") -> Body:
        _, worker, generation = name.split("-")
        labels = {
            names.LABEL_JOB: "llama",
            names.LABEL_WORKER: worker,
            names.LABEL_GENERATION: generation,
        }
        return await self.cluster.create(
            Kind.POD, "default", {"metadata": {"name": name, "labels": labels}, "spec": {}}
        )

    def deliver(self) -> None:
        """The watch brings everything there is."""
        now = {body["metadata"]["uid"]: body for body in self.cluster.pods()}
        for uid in self.brought.keys() - now.keys():
            self.cache.drop(uid)
            self.audit.saw(Kind.POD, item_of(Kind.POD, self.brought[uid]), gone=True)
        for body in now.values():
            self.cache.put(body)
            self.audit.saw(Kind.POD, item_of(Kind.POD, body), gone=False)
        self.brought = now

    async def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += INTERVAL_SECONDS
            await self.audit.look(Kind.POD)

    def phases(self) -> dict[str, Any]:
        return {pod.name: pod.phase for pod in self.cache(KEY)}

    def lag(self) -> float | None:
        name, labels = "pretrain_operator_watch_lag_seconds", {"kind": "pods"}
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(audit, "SETTLE_SECONDS", 0)
    return Scene()


async def test_a_watch_that_brings_everything_is_well(scene: Scene) -> None:
    for number in range(5):
        await scene.create(f"llama-{number}-1")
        scene.deliver()
        await scene.look()
    assert scene.audit.trouble() is None
    assert scene.nudged == []
    assert scene.lag() == 0


async def test_a_watch_that_stopped_is_stale_after_a_minute_and_says_which(scene: Scene) -> None:
    await scene.create()
    scene.deliver()
    await scene.look()
    scene.cluster.set_status("llama-0-1", phase="Running")
    await scene.look(2)
    assert scene.audit.trouble() is None
    await scene.look()
    assert scene.audit.trouble() == "the watch of pods has lacked default/llama-0-1 for 60 s"
    assert scene.lag() == 60
    scene.deliver()
    assert scene.audit.trouble() is None
    await scene.look()
    assert scene.lag() == 0


async def test_meanwhile_rounds_go_on_with_pods_as_they_are(scene: Scene) -> None:
    await scene.create()
    scene.deliver()
    await scene.create("llama-1-1")
    scene.cluster.set_status("llama-0-1", phase="Running")
    await scene.look()
    assert scene.phases() == {"llama-0-1": "Running", "llama-1-1": "Pending"}
    assert scene.nudged == [KEY, KEY]
    scene.cluster.set_status("llama-0-1", phase="Failed")
    scene.deliver()  # the watch is back, and newer than what was read
    assert scene.phases()["llama-0-1"] == "Failed"


async def test_a_missed_end_is_mended_for_good(scene: Scene) -> None:
    # A watch that starts over after a gap never tells of what was deleted in it.
    await scene.create()
    scene.deliver()
    scene.cluster.vanish(Kind.POD, "llama-0-1")
    assert scene.phases() != {}
    await scene.look()
    assert scene.phases() == {}
    assert scene.nudged == [KEY]
    await scene.create()  # the same name again, under another UID
    await scene.look()
    assert list(scene.phases()) == ["llama-0-1"]
    await scene.look(3)
    assert scene.audit.trouble() is not None  # the watch has not brought the new one


async def test_only_the_namespaces_that_are_watched_are_listed(scene: Scene) -> None:
    asked: list[str] = []

    async def fetch(_: Kind, namespace: str) -> list[Item]:
        asked.append(namespace)
        return []

    pair = ("team-a", "team-b")
    found = Audit(
        fetch, scene.cluster.get, scene.cache, scene.nudged.append, Metrics(), namespaces=pair
    )
    await found.look(Kind.POD)
    assert tuple(asked) == pair


async def test_a_busy_object_does_not_make_a_late_watch_a_stale_one(scene: Scene) -> None:
    await scene.create()
    for _ in range(6):  # each list is one change ahead of the watch
        scene.deliver()
        scene.cluster.set_status("llama-0-1", phase="Running")
        await scene.look()
    assert scene.audit.trouble() is None


async def test_without_answers_nothing_is_judged(scene: Scene) -> None:
    await scene.create()
    await scene.look()
    scene.down = True
    for _ in range(5):
        with pytest.raises(ClusterError):
            await scene.look()
    assert scene.audit.trouble() is None
    scene.down = False
    await scene.look()  # the watch may come back now, as the lists do
    assert scene.audit.trouble() is None
    await scene.look(2)
    assert scene.audit.trouble() is not None


async def test_a_job_whose_end_was_missed_gets_a_last_round(scene: Scene) -> None:
    await scene.cluster.create(Kind.JOB, "default", {"metadata": {"name": "llama"}})
    [body] = scene.cluster.all(Kind.JOB)
    scene.audit.saw(Kind.JOB, item_of(Kind.JOB, body), gone=False)
    scene.cluster.vanish(Kind.JOB, "llama")
    await scene.audit.look(Kind.JOB)
    assert scene.nudged == [KEY]
    assert scene.audit.trouble() is None


def test_versions_are_growing_numbers() -> None:
    assert reached("10", "9")
    assert not reached("9", "10")
    assert reached("a", "a")
    assert not reached("b", "a")
