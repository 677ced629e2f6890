"""HTTP face of a worker: ``/status``, ``/metrics``, ``/healthz`` and ``/readyz``; all read-only.

Served by threads, so that a slow client never delays the meeting. Their number is bounded and every
connection has a deadline, because anybody who reaches the pod can open one.
"""

import contextlib
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, cast

from pretrain_agent import metrics
from pretrain_api.wire import WorkerStatus

CONNECTIONS = 32
READ_SECONDS = 5.0  # for the next bytes of a request
CONNECTION_SECONDS = 10.0  # for the whole of it
STALL_SECONDS = 10.0  # without a turn of the supervisor's loop: not healthy


class Worker(Protocol):
    """What the endpoints tell about; read from several threads."""

    turn: float  # when the supervisor's loop last turned, on the monotonic clock

    @property
    def restart_seconds(self) -> float | None:
        """How long the last restart in place took."""
        ...

    def status(self) -> WorkerStatus:
        """The status document of this moment."""
        ...


class Endpoints(ThreadingHTTPServer):
    """Serves a worker's status on a listening socket."""

    daemon_threads = True

    def __init__(self, sock: socket.socket, worker: Worker) -> None:
        super().__init__(sock.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.worker = worker
        self._free = threading.BoundedSemaphore(CONNECTIONS)

    def start(self) -> None:
        """Serve in the background."""
        threading.Thread(target=self.serve_forever, name="http", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand the connection to a thread, or drop it when too many are open."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Runs in the connection's thread."""
        deadline = threading.Timer(CONNECTION_SECONDS, _hang_up, (request,))
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away or is too slow is no news."""

    def healthy(self) -> bool:
        """Whether the supervisor's loop turns."""
        return time.monotonic() - self.worker.turn < STALL_SECONDS


def _hang_up(request: socket.socket) -> None:
    """End a connection under the thread that reads from it; closing would not wake that up."""
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    """Answers GET; everything else gets the base class's 501."""

    timeout = READ_SECONDS
    server_version = "pretrain"
    sys_version = ""

    def do_GET(self) -> None:
        """Route by path."""
        server = cast(Endpoints, self.server)
        worker = server.worker
        match self.path.partition("?")[0]:
            case "/status":
                self._answer(worker.status().to_json().encode(), "application/json")
            case "/metrics":
                body = metrics.render(worker.status(), worker.restart_seconds)
                self._answer(body, "text/plain; version=0.0.4; charset=utf-8")
            case "/healthz":
                self._verdict(server.healthy(), "stalled")
            case "/readyz":
                self._verdict(server.healthy() and worker.status().warm, "not ready")
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def _verdict(self, well: bool, otherwise: str) -> None:
        status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
        self._answer(f"{'ok' if well else otherwise}\n".encode(), "text/plain", status)

    def _answer(self, body: bytes, content: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base's name
        """Requests are not logged: the operator makes one every few seconds."""
