"""The client over HTTP, against a small server that plays the API server's part."""

import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import certifi
import pytest
from aiohttp import web
from kubernetes.aio.config import incluster_config

from pretrain_operator.__main__ import list_watched
from pretrain_operator.cluster import (
    ClusterError,
    ConflictError,
    GoneError,
    HttpCluster,
    Kind,
    NotFoundError,
    RefusedError,
    proxy_for,
)


class Recorder:
    """Answers every request the same way and remembers the last one."""

    def __init__(self) -> None:
        self.status = 200
        self.body: Any = {"kind": "Pod"}
        self.headers: dict[str, str] = {}
        self.method = self.path = self.content_type = self.accept = self.authorization = ""
        self.sent: Any = None
        self.text: str | None = None  # answered as it is
        self.bodies: list[Any] = []  # answered one after the other, before the one above
        self.query: dict[str, str] = {}

    async def handle(self, request: web.Request) -> web.Response:
        self.method, self.path, self.query = request.method, request.path, dict(request.query)
        if self.text is not None:
            return web.Response(text=self.text)
        self.content_type = request.content_type
        self.accept = request.headers["Accept"]
        self.authorization = request.headers["Authorization"]
        text = await request.text()
        self.sent = json.loads(text) if text else None
        body = self.bodies.pop(0) if self.bodies else self.body
        return web.json_response(body, status=self.status, headers=self.headers)


@pytest.fixture
def server() -> Recorder:
    return Recorder()


@pytest.fixture
async def client(server: Recorder, tmp_path: Path) -> AsyncIterator[HttpCluster]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "users": [{"name": "test", "user": {"token": "secret"}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            }
        )
    )
    cluster = await HttpCluster.connect(str(kubeconfig))
    yield cluster
    await cluster.close()
    await runner.cleanup()


async def test_verbs_and_paths(client: HttpCluster, server: Recorder) -> None:
    assert await client.get(Kind.POD, "team", "a") == {"kind": "Pod"}
    assert (server.method, server.path) == ("GET", "/api/v1/namespaces/team/pods/a")
    await client.get(Kind.NODE, "", "n")
    assert server.path == "/api/v1/nodes/n"
    await client.create(Kind.EVENT, "team", {"metadata": {"name": "a"}})
    assert server.path == "/apis/events.k8s.io/v1/namespaces/team/events"
    assert server.sent == {"metadata": {"name": "a"}}
    await client.patch_status(Kind.JOB, "team", "a", {"status": {"phase": None}})
    assert server.path == "/apis/pretrain.dev/v1alpha1/namespaces/team/pretrainjobs/a/status"
    assert server.content_type == "application/merge-patch+json"
    assert server.sent == {"status": {"phase": None}}
    await client.delete(Kind.POD, "team", "a", "uid-1")
    assert server.sent["preconditions"] == {"uid": "uid-1"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, NotFoundError), (409, ConflictError), (403, RefusedError), (422, RefusedError)],
)
async def test_errors_one_can_act_on(
    client: HttpCluster, server: Recorder, status: int, kind: type[ClusterError]
) -> None:
    server.status, server.body = status, {"message": "pods is forbidden: exceeded quota"}
    with pytest.raises(kind, match="exceeded quota"):
        await client.create(Kind.POD, "team", {"metadata": {}})


async def test_other_trouble_is_worth_another_attempt(
    client: HttpCluster, server: Recorder
) -> None:
    server.status, server.body = 500, ["no status object"]
    with pytest.raises(ClusterError) as caught:
        await client.get(Kind.POD, "team", "a")
    assert type(caught.value) is ClusterError
    assert caught.value.status == 500
    assert caught.value.retry_after == 0


async def test_an_answer_that_was_cut_is_worth_another_attempt(
    client: HttpCluster, server: Recorder
) -> None:
    server.text = '{"kind": "Po'
    with pytest.raises(ClusterError, match="no JSON"):
        await client.get(Kind.POD, "team", "a")


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7), ("99999", 300), ("Wed, 21 Oct 2026 07:28:00 GMT", 0), ("", 0)]
)
@pytest.mark.parametrize("status", [429, 503])
async def test_a_server_may_ask_for_time(
    client: HttpCluster, server: Recorder, status: int, header: str, seconds: float
) -> None:
    server.status, server.headers = status, {"Retry-After": header}
    with pytest.raises(ClusterError) as caught:
        await client.get(Kind.POD, "team", "a")
    assert caught.value.retry_after == seconds


async def test_a_refusal_names_verb_and_resource(client: HttpCluster, server: Recorder) -> None:
    said = 'pods is forbidden: User "x" cannot create resource "pods" in API group ""'
    server.status, server.body = 403, {"kind": "Status", "message": said, "code": 403}
    with pytest.raises(RefusedError, match='cannot create resource "pods"'):
        await client.create(Kind.POD, "team", {"metadata": {}})


async def test_a_rotated_token_is_used_without_a_restart(
    server: Recorder, client: HttpCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, certificate = tmp_path / "token", tmp_path / "ca.crt"
    token.write_text("first")
    certificate.write_text(certifi.contents())
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificate))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    loader, address = incluster_config.InClusterConfigLoader, client._client.configuration.host
    load = loader._set_config

    def load_but_stay_here(self: Any, configuration: Any) -> None:
        load(self, configuration)
        configuration.host = address

    monkeypatch.setattr(loader, "_set_config", load_but_stay_here)
    inside = await HttpCluster.connect()
    await inside.get(Kind.POD, "team", "a")
    assert server.authorization == "bearer first"
    token.write_text("second")
    later = SimpleNamespace(now=lambda: datetime.now() + timedelta(minutes=2))
    clock = SimpleNamespace(datetime=later, timedelta=timedelta)
    monkeypatch.setattr(incluster_config, "datetime", clock)
    await inside.get(Kind.POD, "team", "a")
    assert server.authorization == "bearer second"
    await inside.close()


def meta_of(name: str) -> dict[str, Any]:
    meta = {"name": name, "namespace": "team", "uid": f"uid-{name}", "resourceVersion": "1"}
    return {"metadata": meta}


async def test_only_metadata_is_asked_for_where_that_is_enough(
    client: HttpCluster, server: Recorder
) -> None:
    server.body = {"metadata": {"resourceVersion": "7"}, "items": [meta_of("a"), meta_of("b")]}
    found = await list_watched(client, Kind.POD, "team")
    assert [(item.name, item.version) for item in found] == [("a", "1"), ("b", "1")]
    assert server.path == "/api/v1/namespaces/team/pods"
    assert "PartialObjectMetadataList" in server.accept
    await client.delete(Kind.POD, "team", "a", "uid-1", 0)
    assert server.sent["gracePeriodSeconds"] == 0


@pytest.mark.parametrize("body", [{"items": None}, {"items": []}, {}])
async def test_a_list_of_nothing_is_empty(
    client: HttpCluster, server: Recorder, body: dict[str, Any]
) -> None:
    """The API server writes null for a list of metadata that has never had an item."""
    server.body = {"metadata": {"resourceVersion": "7"}, **body}
    assert await list_watched(client, Kind.JOB, "team") == []


async def test_a_long_list_comes_in_pages_of_one_moment(
    client: HttpCluster, server: Recorder
) -> None:
    first = {"metadata": {"resourceVersion": "7", "continue": "next"}, "items": [{"kind": "a"}]}
    last = {"metadata": {"resourceVersion": "7"}, "items": [{"kind": "b"}]}
    server.bodies = [first, last]
    pages = [page async for page in client.pages(Kind.POD, "", "app=x")]
    assert pages == [first, last]
    assert server.path == "/api/v1/pods"
    assert (server.query["continue"], server.query["labelSelector"]) == ("next", "app=x")
    server.status, server.body = 410, {"message": "the provided continue parameter is too old"}
    with pytest.raises(GoneError):
        [page async for page in client.pages(Kind.POD, "", "app=x")]


async def test_a_watch_brings_events_until_it_ends(client: HttpCluster, server: Recorder) -> None:
    events = [
        {"type": kind, "object": {"metadata": {"name": "x" * size}}}
        for kind, size in (("ADDED", 1), ("MODIFIED", 500_000), ("DELETED", 1))
    ]
    server.text = "".join(json.dumps(event) + "\n" for event in events)
    brought = [event async for event in client.watch(Kind.POD, "team", "app=x", "7")]
    assert brought == [(event["type"], event["object"]) for event in events]
    assert server.path == "/api/v1/namespaces/team/pods"
    assert server.query["resourceVersion"] == "7"
    assert server.query["allowWatchBookmarks"] == "true"


async def test_what_ends_a_watch_is_told_apart(client: HttpCluster, server: Recorder) -> None:
    async def follow() -> None:
        async for _ in client.watch(Kind.POD, "", "app=x", "7"):
            pass

    said = {"kind": "Status", "code": 410, "message": "too old resource version"}
    server.text = json.dumps({"type": "ERROR", "object": said}) + "\n"
    with pytest.raises(GoneError, match="too old"):
        await follow()
    server.text = '{"type": "ADDED", "obj\n'
    with pytest.raises(ClusterError, match="watch of"):
        await follow()
    server.text, server.status, server.body = None, 403, {"message": "pods is forbidden"}
    with pytest.raises(RefusedError, match="forbidden"):
        await follow()


async def test_nobody_there(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    with pytest.raises(ClusterError, match="no way to reach a cluster"):
        await HttpCluster.connect(str(kubeconfig))


async def test_the_definition_is_there_or_not(client: HttpCluster, server: Recorder) -> None:
    server.body = {"resources": [{"name": "pretrainjobs/status"}, {"name": "pretrainjobs"}]}
    assert await client.serves_jobs()
    server.status = 404
    assert not await client.serves_jobs()


async def test_writing_a_pod_asks_for_no_more_than_its_metadata(
    client: HttpCluster, server: Recorder
) -> None:
    await client.create(Kind.POD, "team", {"metadata": {"name": "a"}})
    assert "as=PartialObjectMetadata;" in server.accept
    await client.create(Kind.LEASE, "team", {"metadata": {"name": "a"}})
    assert server.accept == "application/json"


async def test_a_proxy_of_the_environment_is_used_but_where_it_says_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert proxy_for("https://api.example:6443") == "http://proxy.example:3128"
    assert proxy_for("https://127.0.0.1:6443") is None
