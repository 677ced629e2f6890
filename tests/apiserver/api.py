"""The administrator's own line to the API server: what users, kubelets and tests write and read."""

import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp

from pretrain_api import names
from pretrain_devcluster.controlplane import ControlPlane

Body = dict[str, Any]

JOBS = f"/apis/{names.API_VERSION}"
POLICIES = "/apis/networking.k8s.io/v1"
EVENTS = "/apis/events.k8s.io/v1"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"


class ApiError(Exception):
    """The API server said no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """Plain dictionaries over HTTP; an async context manager."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._plane.token}"}
        connector = aiohttp.TCPConnector(ssl=self._plane.tls(), limit=0)
        # Watches have no end, so there is no limit on the whole.
        timeout = aiohttp.ClientTimeout(total=None, connect=10)
        self._session = aiohttp.ClientSession(
            self._plane.url, headers=headers, connector=connector, timeout=timeout
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def call(
        self, method: str, path: str, body: Body | None = None, content: str = "application/json"
    ) -> Body:
        """One request. Raises ApiError for every answer above 299."""
        assert self._session is not None
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": content}
        async with self._session.request(method, path, data=data, headers=headers) as answer:
            text = await answer.text()
            if answer.status > 299:
                raise ApiError(answer.status, text)
            return json.loads(text)

    async def get(self, path: str) -> Body:
        """One object."""
        return await self.call("GET", path)

    async def find(self, path: str) -> Body | None:
        """One object, or None if there is no such thing."""
        try:
            return await self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, path: str, **query: str) -> list[Body]:
        """All objects of a kind."""
        found = await self.get(f"{path}?{urlencode(query)}" if query else path)
        return found["items"]

    async def create(self, path: str, body: Body) -> Body:
        """Create an object."""
        return await self.call("POST", path, body)

    async def patch(self, path: str, patch: Body) -> Body:
        """Merge patch."""
        return await self.call("PATCH", path, patch, MERGE_PATCH)

    async def apply(self, path: str, body: Body) -> Body:
        """Server-side apply: the same whether or not it is there."""
        query = "?fieldManager=test&force=true"
        return await self.call("PATCH", path + query, body, APPLY_PATCH)

    async def delete(self, path: str, uid: str | None = None, grace: int | None = None) -> None:
        """Delete; that it is gone already is fine."""
        options: Body = {"propagationPolicy": "Background"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        try:
            await self.call("DELETE", path, options)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def watch(self, path: str, **query: str) -> AsyncIterator[tuple[str, Body]]:
        """Type and object of every event, from the objects that exist now on, without an end."""
        assert self._session is not None
        asked = urlencode({"watch": "true", **query})
        async with self._session.get(f"{path}?{asked}", read_bufsize=2**22) as answer:
            async for line in answer.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiError(event["object"].get("code", 0), event["object"]["message"])
                yield event["type"], event["object"]
