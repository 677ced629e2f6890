"""The only place that talks to the API server.

Everything else sees :class:`Cluster`: five verbs over plain dictionaries. The official client is
used for what is hard to get right (kubeconfig, rotating service-account tokens, TLS); paths and
bodies are ours, because its typed models cost 80 MiB and refuse what a newer server may send.
Every call has a time limit, and every error is of a kind that a caller can act on.
"""

# The client's own hints are partial; what leaves this module is fully typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from enum import Enum
from typing import Any, Protocol, Self
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.rest import RESTResponse
from kubernetes.aio.config import load_kube_config
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.config.incluster_config import load_incluster_config
from pydantic_core import from_json

from pretrain_api import names

Body = dict[str, Any]

CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 30.0
REQUESTS_AT_ONCE = 64  # a job of thousands of pods is as many requests: their time runs once sent
LONGEST_WAIT = 300.0  # seconds that a server may ask for
PAGE_ITEMS = 500  # of a list: a page of pods is some megabytes
WATCH_SECONDS = 300  # after which a watch is asked for anew
SILENT_WATCH_SECONDS = 150.0  # a living one sends a bookmark every minute
METADATA_OF_ALL = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


class Kind(Enum):
    """Kinds of objects the operator touches: path prefix and plural name."""

    JOB = (f"/apis/{names.API_VERSION}", names.PLURAL)
    POD = ("/api/v1", "pods")
    CONFIG_MAP = ("/api/v1", "configmaps")
    CLAIM = ("/api/v1", "persistentvolumeclaims")
    NODE = ("/api/v1", "nodes")
    NETWORK_POLICY = ("/apis/networking.k8s.io/v1", "networkpolicies")
    EVENT = ("/apis/events.k8s.io/v1", "events")
    LEASE = ("/apis/coordination.k8s.io/v1", "leases")

    @property
    def plural(self) -> str:
        """Name in paths, RBAC rules and log lines."""
        return self.value[1]


class ClusterError(Exception):
    """The API server said no, or nothing. Worth another attempt later.

    ``status`` is the HTTP status, 0 if there was no answer; ``retry_after`` the seconds for which
    the server asked not to be asked again, 0 if it didn't.
    """

    def __init__(self, message: str, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class NotFoundError(ClusterError):
    """There is no such object."""


class ConflictError(ClusterError):
    """The object changed since it was read, or is there already. Read again, decide again."""


class GoneError(ClusterError):
    """The version that a watch or a list was to go on from has been forgotten: list again."""


class RefusedError(ClusterError):
    """Policy, quota, validation or missing rights: the same request will be refused again."""

    reason = "WorkersRefused"  # for conditions and Events


class TakenError(RefusedError):
    """Somebody else's object has the name that was to be used."""

    reason = "NameTaken"


class Cluster(Protocol):
    """What the operator needs of a cluster. ``namespace`` is empty for nodes.

    What writing returns is metadata alone, but for jobs and Leases: nobody needs the rest.
    All verbs raise ClusterError or one of its kinds.
    """

    async def get(self, kind: Kind, namespace: str, name: str) -> Body:
        """One object, as stored right now (never from a cache)."""
        ...

    async def create(self, kind: Kind, namespace: str, body: Body) -> Body:
        """Create an object. Raises ConflictError if one of that name exists."""
        ...

    async def patch(self, kind: Kind, namespace: str, name: str, patch: Body) -> Body:
        """JSON merge patch. A ``metadata.uid`` or ``resourceVersion`` in it is a precondition."""
        ...

    async def patch_status(self, kind: Kind, namespace: str, name: str, patch: Body) -> Body:
        """JSON merge patch of the status subresource, with the same preconditions."""
        ...

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        """Delete with the object's own grace period. With ``uid`` only that very object.

        ``grace_seconds`` replaces the grace period; 0 removes a pod from the cluster at once, even
        if its node doesn't answer, whether or not its processes still run.
        """
        ...


def error_of(status: int, text: str, retry_after: str = "") -> ClusterError:
    """The error for an HTTP status above 299, with the server's own message.

    ``retry_after`` is the header of that name; only the form in seconds counts.
    """
    try:
        message = str(json.loads(text).get("message") or text)
    except (ValueError, AttributeError):
        message = text.strip()[:500]
    kinds: Mapping[int, type[ClusterError]] = {
        403: RefusedError,
        404: NotFoundError,
        409: ConflictError,
        410: GoneError,
        422: RefusedError,
    }
    seconds = min(float(retry_after), LONGEST_WAIT) if retry_after.isdecimal() else 0.0
    return kinds.get(status, ClusterError)(message or f"HTTP status {status}", status, seconds)


class HttpCluster:
    """:class:`Cluster` over HTTP. Use :meth:`connect`, and ``await close()`` in the end."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._turns = asyncio.Semaphore(REQUESTS_AT_ONCE)

    @classmethod
    async def connect(cls, kubeconfig: str | None = None, context: str | None = None) -> Self:
        """Connect from inside a cluster, or with a kubeconfig (default: KUBECONFIG, ~/.kube).

        Raises ClusterError if neither is there.
        """
        configuration = Configuration()
        try:
            if kubeconfig is None and context is None and _in_cluster():
                load_incluster_config(client_configuration=configuration)
            else:
                await load_kube_config(kubeconfig, context, client_configuration=configuration)
        except ConfigException as error:
            raise ClusterError(f"no way to reach a cluster: {error}") from error
        # The client would look into ~/.netrc before every request, in another thread.
        configuration.client_session_kwargs = {"trust_env": False}
        # No limit but ours: every watch keeps one connection, and there may be many namespaces.
        configuration.connection_pool_maxsize = 0
        configuration.proxy = configuration.proxy or proxy_for(str(configuration.host))
        client = ApiClient(configuration)
        client.user_agent = names.MANAGED_BY  # who wrote a field, in its managedFields
        return cls(client)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Body:
        """See Cluster."""
        return await self._call("GET", _path(kind, namespace, name))

    async def pages(
        self, kind: Kind, namespace: str, selector: str, accept: str = "application/json"
    ) -> AsyncIterator[Body]:
        """All objects of one moment, some hundred at a time; a watch may go on from there.

        Of every namespace if that is empty. Each page has ``items``, and in its ``metadata`` the
        ``resourceVersion`` of that moment. Raises GoneError if that is forgotten meanwhile.
        """
        query = {"limit": str(PAGE_ITEMS)} | ({"labelSelector": selector} if selector else {})
        while True:
            path = f"{_path(kind, namespace)}?{urlencode(query)}"
            page = await self._call("GET", path, accept=accept)
            yield page
            token = page["metadata"].get("continue")
            if not token:
                return
            query["continue"] = token

    async def watch(
        self, kind: Kind, namespace: str, selector: str, version: str
    ) -> AsyncIterator[tuple[str, Body]]:
        """What changes after ``version``: ADDED, MODIFIED, DELETED or BOOKMARK, and the object.

        Ends now and then; go on from the last version. Raises GoneError if that is forgotten.
        """
        query = {
            "watch": "true",
            "labelSelector": selector,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        path = f"{_path(kind, namespace)}?{urlencode(query)}"
        limit = aiohttp.ClientTimeout(connect=CONNECT_SECONDS, sock_read=SILENT_WATCH_SECONDS)
        try:
            answer = await self._send("GET", path, limit)
            async with answer.response:
                if answer.status != 200:
                    await _read_whole(answer)
                async for line in _lines(answer.response.content):
                    event = from_json(line)
                    if event["type"] == "ERROR":
                        said = event["object"]
                        raise error_of(int(said.get("code") or 0), json.dumps(said))
                    yield event["type"], event["object"]
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            raise ClusterError(f"watch of {path}: {error or type(error).__name__}") from error

    async def serves_jobs(self) -> bool:
        """Whether the CustomResourceDefinition is there and established."""
        try:
            found = await self._call("GET", f"/apis/{names.API_VERSION}")
        except NotFoundError:
            return False
        return any(item["name"] == names.PLURAL for item in found.get("resources") or ())

    async def create(self, kind: Kind, namespace: str, body: Body) -> Body:
        """See Cluster."""
        return await self._call("POST", _path(kind, namespace), body, _answer_wanted(kind))

    async def patch(self, kind: Kind, namespace: str, name: str, patch: Body) -> Body:
        """See Cluster."""
        return await self._call("PATCH", _path(kind, namespace, name), patch, _answer_wanted(kind))

    async def patch_status(self, kind: Kind, namespace: str, name: str, patch: Body) -> Body:
        """See Cluster."""
        return await self._call("PATCH", _path(kind, namespace, name) + "/status", patch)

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        """See Cluster."""
        options: Body = {"propagationPolicy": "Background"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        await self._call("DELETE", _path(kind, namespace, name), options)

    async def _call(
        self, method: str, path: str, body: Body | None = None, accept: str = "application/json"
    ) -> Body:
        limit = aiohttp.ClientTimeout(total=REQUEST_SECONDS, connect=CONNECT_SECONDS)
        try:
            async with self._turns:
                answer = await self._send(method, path, limit, body, accept)
                return await _read_whole(answer)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise ClusterError(f"{method} {path}: {error or type(error).__name__}") from error

    async def _send(
        self,
        method: str,
        path: str,
        limit: aiohttp.ClientTimeout,
        body: Body | None = None,
        accept: str = "application/json",
    ) -> RESTResponse:
        headers = {"Accept": accept, "Content-Type": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        # Without the body, which is plain already: making it so takes longer than sending it.
        _, url, headers, *_ = await self._client.param_serialize(
            method, path, header_params=headers, auth_settings=["BearerToken"]
        )
        return await self._client.call_api(
            method,
            url,
            headers,
            body,
            _request_timeout=limit,  # pyright: ignore[reportArgumentType] - the client's hints say int, aiohttp takes this
        )


async def _read_whole(answer: RESTResponse) -> Body:
    """The body of an answer. Raises one of the errors above if it says no."""
    data = await answer.read()
    if not 200 <= answer.status <= 299:
        wait = str(answer.headers.get("Retry-After", ""))
        raise error_of(answer.status, data.decode(errors="replace"), wait)
    try:
        return from_json(data)
    except ValueError as error:
        raise ClusterError(f"the answer is no JSON: {error}", answer.status) from error


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length, as they come."""
    rest = b""
    async for data in stream.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line


def proxy_for(url: str) -> str | None:
    """What HTTPS_PROXY, NO_PROXY and their kin say about an address."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


def _answer_wanted(kind: Kind) -> str:
    return "application/json" if kind in (Kind.JOB, Kind.LEASE) else METADATA


def _in_cluster() -> bool:
    try:
        load_incluster_config(client_configuration=Configuration())
    except ConfigException:
        return False
    return True


def _path(kind: Kind, namespace: str, name: str | None = None) -> str:
    prefix, plural = kind.value
    parts = [prefix]
    if namespace:
        parts += ["namespaces", quote(namespace, safe="")]
    parts.append(plural)
    if name is not None:
        parts.append(quote(name, safe=""))
    return "/".join(parts)
