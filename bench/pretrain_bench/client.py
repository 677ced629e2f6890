"""Just enough of a Kubernetes client: read, change and watch, with nothing but Python.

kubectl costs a tenth of a second of processor time per call. That is too much where a job is looked
at several times a second on the cores that train it, and too late where seconds are measured.
"""

import base64
import http.client
import json
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

TIMEOUT_SECONDS = 30.0  # a busy machine may write gigabytes of images before it answers
WORKER_SECONDS = 5.0  # for a worker, which may be cut off
MERGE_PATCH = "application/merge-patch+json"

Body = dict[str, Any]


class BenchError(Exception):
    """Something never came to what was waited for; the message tells all there is to know."""


class ApiError(BenchError):
    """The API server refused or did not answer.

    Attributes:
        status: HTTP status, 0 if there was no answer.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Client:
    """The API server of a kubeconfig's only cluster. Every request is a connection of its own."""

    host: str
    port: int
    tls: ssl.SSLContext = field(repr=False)
    headers: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    timeout: float = TIMEOUT_SECONDS  # of every read

    @classmethod
    def of(cls, kubeconfig: Path) -> Self:
        """Read a kubeconfig that is JSON and has one cluster and one user with a certificate."""
        document = json.loads(kubeconfig.read_text())
        cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        tls = ssl.create_default_context(cadata=authority)
        with tempfile.NamedTemporaryFile() as pair:  # OpenSSL reads key and certificate from files
            for part in ("client-certificate-data", "client-key-data"):
                pair.write(base64.b64decode(user[part]))
            pair.flush()
            tls.load_cert_chain(pair.name)
        host, _, port = cluster["server"].removeprefix("https://").partition(":")
        return cls(host, int(port or 443), tls)

    @classmethod
    def by_token(
        cls, url: str, tls: ssl.SSLContext, token: str, timeout: float = TIMEOUT_SECONDS
    ) -> Self:
        """Whoever a token belongs to."""
        host, _, port = url.removeprefix("https://").partition(":")
        return cls(host, int(port or 443), tls, {"Authorization": f"Bearer {token}"}, timeout)

    def connect(self, timeout: float | None = TIMEOUT_SECONDS) -> http.client.HTTPSConnection:
        """A new connection; ``timeout`` in seconds is that of every read."""
        return http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=self.tls)

    def ask(self, path: str) -> str:
        """What a worker answers, through the API server. Raises ApiError."""
        return self.request("GET", path, timeout=WORKER_SECONDS)

    def request(
        self,
        method: str,
        path: str,
        body: Body | None = None,
        kind: str = "application/json",
        timeout: float | None = None,
    ) -> str:
        """The answer's text. Raises ApiError for any status but 2xx, and without an answer."""
        text = None if body is None else json.dumps(body)
        with closing(self.connect(timeout or self.timeout)) as connection:
            try:
                connection.request(method, path, text, {"Content-Type": kind, **self.headers})
                response = connection.getresponse()
                answer = response.read().decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                raise ApiError(0, f"{method} {path}: {error!r}") from error
        if response.status >= http.client.MULTIPLE_CHOICES:
            raise ApiError(response.status, f"{method} {path}: {response.status} {answer}")
        return answer

    def get(self, path: str) -> Body:
        """A JSON document. Raises ApiError."""
        return json.loads(self.request("GET", path))

    def events(self, connection: http.client.HTTPConnection, path: str) -> Iterator[Body]:
        """Watch a collection: each event as the API server sends it, those that exist first.

        Ends when the server or another thread closes ``connection``.
        """
        query = "&" if "?" in path else "?"
        try:
            target = f"{path}{query}watch=1&allowWatchBookmarks=false"
            connection.request("GET", target, headers=self.headers)
            for line in connection.getresponse():
                yield json.loads(line)
        except (OSError, ValueError, AttributeError, http.client.HTTPException):
            return  # closed, in the middle of a read or of a line


def pods_path(namespace: str, selector: str = "") -> str:
    """Where the pods of a namespace are, or those of a label selector."""
    encoded = selector.replace("/", "%2F").replace("=", "%3D").replace(",", "%2C")
    return f"/api/v1/namespaces/{namespace}/pods" + (f"?labelSelector={encoded}" if encoded else "")
