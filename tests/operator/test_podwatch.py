"""The watch of pods: what the cache holds is what the cluster has, whatever befalls the stream."""

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pretrain_api import names
from pretrain_operator import podwatch
from pretrain_operator.audit import Item, item_of
from pretrain_operator.cluster import Body, ClusterError, GoneError, Kind
from pretrain_operator.podwatch import SELECTOR, PodCache, PodWatch
from pretrain_operator.reconcile import Key
from pretrain_operator.testing import MemoryCluster, until

KEY = ("default", "llama")


class Source:
    """An API server whose streams the test feeds, cuts and breaks."""

    def __init__(self) -> None:
        self.cluster = MemoryCluster()
        self.streams: list[asyncio.Queue[Any]] = []
        self.went_on_from: list[str] = []
        self.lists = 0
        self.refuse: ClusterError | None = None
        self.per_page = 2

    async def pages(self, kind: Kind, namespace: str, selector: str) -> AsyncIterator[Body]:
        assert (kind, selector) == (Kind.POD, SELECTOR)
        self.lists += 1
        if self.refuse:
            raise self.refuse
        pods = [p for p in self.cluster.pods() if namespace in ("", p["metadata"]["namespace"])]
        for start in range(0, max(len(pods), 1), self.per_page):
            page = pods[start : start + self.per_page]
            yield {"metadata": {"resourceVersion": "1000"}, "items": page or None}

    async def watch(
        self, kind: Kind, namespace: str, selector: str, version: str
    ) -> AsyncIterator[tuple[str, Body]]:
        stream: asyncio.Queue[Any] = asyncio.Queue()
        self.streams.append(stream)
        self.went_on_from.append(version)
        while True:
            event = await stream.get()
            if event is None:
                return
            if isinstance(event, ClusterError):
                raise event
            yield event

    def send(self, event: Any, stream: int = -1) -> None:
        self.streams[stream].put_nowait(copy.deepcopy(event))

    async def create(self, name: str) -> Body:
        _, worker, generation = name.split("-")
        labels = {
            names.LABEL_JOB: "llama",
            names.LABEL_WORKER: worker,
            names.LABEL_GENERATION: generation,
        }
        meta = {"name": name, "labels": labels, "ownerReferences": [{"uid": "job"}]}
        return await self.cluster.create(Kind.POD, "default", {"metadata": meta, "spec": {}})


class News:
    def __init__(self) -> None:
        self.jobs: list[Key] = []
        self.seen: list[tuple[str, bool]] = []

    def changed(self, key: Key) -> None:
        self.jobs.append(key)

    def deleted(self, key: Key) -> None:
        raise AssertionError("pods say nothing of that")

    def saw(self, kind: Kind, item: Item, *, gone: bool) -> None:
        assert kind is Kind.POD
        self.seen.append((item.name, gone))


class Scene:
    def __init__(self) -> None:
        self.source, self.cache, self.news = Source(), PodCache(), News()

    def phases(self) -> dict[str, str]:
        return {pod.name: pod.phase for pod in self.cache(KEY)}

    @asynccontextmanager
    async def watching(self, namespaces: tuple[str, ...] = ()) -> AsyncIterator[None]:
        streams = len(namespaces) or 1
        watch = PodWatch(self.source, self.cache, self.news, namespaces)
        task = asyncio.create_task(watch.run())
        try:
            await until(lambda: len(self.source.streams) == streams)
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(podwatch, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(podwatch, "LONGEST_PAUSE_SECONDS", 0.01)
    return Scene()


async def test_all_pages_are_there_before_it_is_complete(scene: Scene) -> None:
    wanted = [f"llama-{worker}-1" for worker in range(5)]
    for name in wanted:
        await scene.source.create(name)
    assert not scene.cache.complete.is_set()
    async with scene.watching():
        assert scene.cache.complete.is_set()
        assert sorted(scene.phases()) == wanted
        assert scene.news.jobs == [KEY] * 5
        assert scene.source.went_on_from == ["1000"]


async def test_a_stream_that_is_cut_again_and_again_but_brings_something_goes_on_at_once(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(podwatch, "LONGEST_PAUSE_SECONDS", 3600)
    body = await scene.source.create("llama-0-1")
    async with scene.watching():
        for number in range(20):  # with pauses that grow they would take a quarter of an hour
            body["metadata"]["resourceVersion"] = str(2000 + number)
            scene.source.send(("MODIFIED", body))
            scene.source.send(None)
            await until(lambda wanted=number + 2: len(scene.source.streams) == wanted)
    assert scene.source.went_on_from == ["1000", *(str(2000 + number) for number in range(20))]


async def test_a_namespace_that_is_not_listed_yet_keeps_it_from_being_complete(
    scene: Scene,
) -> None:
    scene.source.refuse = ClusterError("not now")
    watch = PodWatch(scene.source, scene.cache, scene.news, ("a", "b"))
    task = asyncio.create_task(watch.run())
    await until(lambda: scene.source.lists > 4)
    assert not scene.cache.complete.is_set()
    scene.source.refuse = None
    await until(scene.cache.complete.is_set)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_events_change_the_cache_and_nudge_the_job(scene: Scene) -> None:
    async with scene.watching():
        await scene.source.create("llama-0-1")
        scene.source.send(("ADDED", scene.source.cluster.pod("llama-0-1")))
        await until(lambda: scene.phases() == {"llama-0-1": "Pending"})
        scene.source.cluster.set_status("llama-0-1", phase="Running")
        scene.source.send(("MODIFIED", scene.source.cluster.pod("llama-0-1")))
        await until(lambda: scene.phases() == {"llama-0-1": "Running"})
        scene.source.send(("DELETED", scene.source.cluster.pod("llama-0-1")))
        await until(lambda: scene.phases() == {})
        assert scene.news.jobs == [KEY] * 3
        assert [gone for _, gone in scene.news.seen] == [False, False, True]


async def test_what_decisions_know_already_causes_no_round(scene: Scene) -> None:
    """Its own writes, as they come back, and what changes in a pod that nobody decides by."""
    async with scene.watching():
        created = await scene.source.create("llama-0-1")
        scene.cache.put(created)
        scene.source.send(("ADDED", created))
        told = {"metadata": {"annotations": {names.ANNOTATION_ASSIGNMENT: "word"}}}
        scene.source.cluster.edit(Kind.POD, "llama-0-1", told)
        scene.cache.amend(scene.source.cluster.pod("llama-0-1")["metadata"])
        scene.source.send(("MODIFIED", scene.source.cluster.pod("llama-0-1")))
        scene.source.cluster.set_status("llama-0-1", phase="Pending", qosClass="BestEffort")
        scene.source.send(("MODIFIED", scene.source.cluster.pod("llama-0-1")))
        await until(lambda: len(scene.news.seen) == 3)
        assert scene.news.jobs == []
        scene.source.cluster.set_status("llama-0-1", phase="Running")
        scene.source.send(("MODIFIED", scene.source.cluster.pod("llama-0-1")))
        await until(lambda: scene.news.jobs == [KEY])


async def test_a_stream_that_ends_or_breaks_goes_on_from_where_it_was(scene: Scene) -> None:
    async with scene.watching():
        pod = await scene.source.create("llama-0-1")
        scene.source.send(("ADDED", pod))
        scene.source.send(None)
        await until(lambda: len(scene.source.streams) == 2)
        bookmark = {"metadata": {"resourceVersion": "2000"}}
        scene.source.send(("BOOKMARK", bookmark))
        scene.source.send(ClusterError("connection reset"))
        await until(lambda: len(scene.source.streams) == 3)
        assert scene.source.went_on_from == ["1000", pod["metadata"]["resourceVersion"], "2000"]
        assert scene.source.lists == 1


async def test_what_was_missed_is_found_when_all_is_listed_again(scene: Scene) -> None:
    await scene.source.create("llama-0-1")
    await scene.source.create("llama-1-1")
    async with scene.watching():
        scene.source.cluster.vanish(Kind.POD, "llama-0-1")
        scene.source.cluster.set_status("llama-1-1", phase="Failed")
        await scene.source.create("llama-0-2")
        scene.source.send(GoneError("too old", 410))
        await until(lambda: len(scene.source.streams) == 2)
        assert scene.phases() == {"llama-1-1": "Failed", "llama-0-2": "Pending"}
        assert ("llama-0-1", True) in scene.news.seen


async def test_a_pod_that_only_its_writer_has_seen_is_missed_too(scene: Scene) -> None:
    async with scene.watching():
        scene.cache.put(await scene.source.create("llama-0-1"))  # the stream is dead
        scene.source.cluster.vanish(Kind.POD, "llama-0-1")
        scene.source.send(GoneError("too old", 410))
        await until(lambda: len(scene.source.streams) == 2)
        assert scene.phases() == {}
        assert scene.news.jobs == [KEY]


async def test_what_is_made_while_all_is_listed_stays(scene: Scene) -> None:
    list_pods = scene.source.pages

    async def pages(kind: Kind, namespace: str, selector: str) -> AsyncIterator[Body]:
        async for page in list_pods(kind, namespace, selector):
            scene.cache.put(await scene.source.create("llama-0-1"))
            yield page

    scene.source.pages = pages
    async with scene.watching():
        assert scene.phases() == {"llama-0-1": "Pending"}


@pytest.mark.parametrize("seconds", [10**11, 10**14, 10**18, -1])
async def test_no_pod_ends_the_watch_of_all_others(scene: Scene, seconds: int) -> None:
    """As ``kubectl delete pod --grace-period`` takes them."""
    odd, good = await scene.source.create("llama-0-1"), await scene.source.create("llama-1-1")
    odd["spec"]["terminationGracePeriodSeconds"] = seconds
    odd["metadata"] |= {
        "deletionTimestamp": "2026-01-01T00:00:00Z",
        "deletionGracePeriodSeconds": seconds,
    }
    async with scene.watching():
        scene.source.send(("MODIFIED", odd))
        scene.source.send(("MODIFIED", good))
        await until(lambda: len(scene.news.seen) == 4)
        leaving = {pod.name: pod.leaving for pod in scene.cache(KEY)}
        assert leaving == {"llama-0-1": True, "llama-1-1": False}


async def test_a_pod_that_can_not_be_read_is_left_out(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    odd, good = await scene.source.create("llama-0-1"), await scene.source.create("llama-1-1")
    odd["metadata"]["creationTimestamp"] = "at noon"
    async with scene.watching():
        scene.cache.drop(odd["metadata"]["uid"])
        scene.cache._gone.clear()
        scene.source.send(("MODIFIED", odd))
        scene.source.send(("MODIFIED", good))
        await until(lambda: scene.news.seen[-1] == ("llama-1-1", False))
        assert scene.phases() == {"llama-1-1": "Pending"}
    assert "pod default/llama-0-1 can't be read" in caplog.text


async def test_pauses_grow_until_a_stream_brings_something(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(podwatch, "FIRST_PAUSE_SECONDS", 1000.0)  # longer than anything takes here
    monkeypatch.setattr(podwatch, "LONGEST_PAUSE_SECONDS", 4000.0)
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    watch = PodWatch(scene.source, scene.cache, scene.news, sleep=sleep)
    task = asyncio.create_task(watch.run())
    busy = ClusterError("too many requests", 429, retry_after=9000.0)
    pod = await scene.source.create("llama-0-1")
    for number, event in enumerate((*[GoneError("too old", 410)] * 4, busy), 1):
        await until(lambda wanted=number: len(scene.source.streams) == wanted)
        scene.source.send(event)
    await until(lambda: len(scene.source.streams) == 6)
    scene.source.send(("ADDED", pod))
    scene.source.send(None)
    await until(lambda: len(pauses) == 6)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert pauses == [1000, 2000, 4000, 4000, 9000, 1000]


async def test_a_changed_label_moves_a_pod(scene: Scene) -> None:
    pod = await scene.source.create("llama-0-1")
    scene.cache.put(pod)
    moved = copy.deepcopy(pod)
    moved["metadata"]["labels"][names.LABEL_JOB] = "other"
    moved["metadata"]["resourceVersion"] += "0"
    assert scene.cache.put(moved)
    assert scene.cache(KEY) == ()
    assert [each.name for each in scene.cache(("default", "other"))] == ["llama-0-1"]


async def test_an_older_version_never_replaces_a_newer_one() -> None:
    source, cache = Source(), PodCache()
    old = await source.create("llama-0-1")
    source.cluster.set_status("llama-0-1", phase="Running")
    new = source.cluster.pods()[0]
    for body in (new, old):
        cache.put(body)
    assert [pod.phase for pod in cache(KEY)] == ["Running"]
    cache.amend(old["metadata"])
    assert [pod.version for pod in cache(KEY)] == [new["metadata"]["resourceVersion"]]


async def test_metadata_changes_nothing_else() -> None:
    source, cache = Source(), PodCache()
    await source.create("llama-0-1")
    source.cluster.set_status("llama-0-1", phase="Running", podIP="10.0.0.1")
    cache.put(source.cluster.pods()[0])
    told = {"metadata": {"annotations": {names.ANNOTATION_ASSIGNMENT: "word"}}}
    source.cluster.edit(Kind.POD, "llama-0-1", told)
    cache.amend(source.cluster.pods()[0]["metadata"])
    [pod] = cache(KEY)
    assert (pod.assignment, pod.phase, pod.ip) == ("word", "Running", "10.0.0.1")
    cache.amend({"uid": "of nobody", "resourceVersion": "1"})


async def test_what_others_did_is_news_though_our_own_write_showed_it_first() -> None:
    source, cache = Source(), PodCache()
    cache.put(await source.create("llama-0-1"))
    leaving = {"deletionTimestamp": "2026-01-01T00:00:30Z", "deletionGracePeriodSeconds": 30}
    told = {"metadata": {"annotations": {names.ANNOTATION_ASSIGNMENT: "word"}, **leaving}}
    source.cluster.edit(Kind.POD, "llama-0-1", told)
    body = source.cluster.pods()[0]
    cache.amend(body["metadata"])
    assert cache.put(body)
    assert [(pod.assignment, pod.leaving) for pod in cache(KEY)] == [("word", True)]


async def test_an_answer_that_comes_after_the_end_brings_nothing_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, cache = Source(), PodCache()
    pod = await source.create("llama-0-1")
    cache.drop(pod["metadata"]["uid"])
    cache.put(pod)
    assert cache(KEY) == ()
    monkeypatch.setattr(podwatch, "REMEMBER_SECONDS", 0)
    for number in range(100):
        cache.drop(f"gone-{number}")
    assert len(cache._gone) == 1


async def test_pods_with_labels_that_say_nothing_are_not_ours() -> None:
    source, cache = Source(), PodCache()
    pod = await source.create("llama-0-1")
    pod["metadata"]["labels"] = {names.LABEL_JOB: "llama"}
    cache.put(pod)
    assert cache(KEY) == ()
    assert item_of(Kind.POD, pod).job == KEY
