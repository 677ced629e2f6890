"""The client over HTTP, against a small server that plays the API server's part."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pretrain_operator.cluster import (
    ClusterError,
    ConflictError,
    HttpCluster,
    Kind,
    NotFoundError,
    RefusedError,
)


class Recorder:
    """Answers every request the same way and remembers the last one."""

    def __init__(self) -> None:
        self.status = 200
        self.body: Any = {"kind": "Pod"}
        self.method = self.path = self.content_type = ""
        self.sent: Any = None

    async def handle(self, request: web.Request) -> web.Response:
        self.method, self.path = request.method, request.path
        self.content_type = request.content_type
        text = await request.text()
        self.sent = json.loads(text) if text else None
        return web.json_response(self.body, status=self.status)


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


async def test_nobody_there(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    with pytest.raises(ClusterError, match="no way to reach a cluster"):
        await HttpCluster.connect(str(kubeconfig))


async def test_the_definition_is_there_or_not(client: HttpCluster, server: Recorder) -> None:
    server.body = {"resources": [{"name": "pretrainjobs/status"}, {"name": "pretrainjobs"}]}
    assert await client.serves_jobs()
    server.status = 404
    assert not await client.serves_jobs()
