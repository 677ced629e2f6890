"""HTTP face of a worker: ``/status`` for the operator, ``/metrics``, ``/healthz``; all read-only.

Served by threads, so that a slow client never delays the meeting. Their number is bounded and every
connection has a deadline, because anybody who reaches the pod can open one.
"""

import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pretrain_agent import metrics
from pretrain_api.wire import WorkerStatus

CONNECTIONS = 32
READ_SECONDS = 5.0  # for the next bytes of a request
CONNECTION_SECONDS = 10.0  # for the whole of it
STALL_SECONDS = 10.0  # without a turn of the supervisor's loop: not healthy


class Endpoints(ThreadingHTTPServer):
    """Serves ``status`` on a listening socket; ``turn`` tells when the supervisor last looked."""

    daemon_threads = True

    def __init__(
        self,
        sock: socket.socket,
        status: Callable[[], WorkerStatus],
        turn: Callable[[], float],
    ) -> None:
        super().__init__(sock.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.status = status
        self.turn = turn
        self._free = threading.BoundedSemaphore(CONNECTIONS)

    def start(self) -> None:
        """Serve in the background."""
        threading.Thread(target=self.serve_forever, name="http", daemon=True).start()

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        """Hand the connection to a thread, or drop it when too many are open."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(
        self, request: socket.socket, client_address: tuple[str, int]
    ) -> None:
        """Runs in the connection's thread."""
        deadline = threading.Timer(CONNECTION_SECONDS, self.shutdown_request, (request,))
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._free.release()

    def handle_error(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        """A client that goes away or is too slow is no news."""

    def healthy(self) -> bool:
        """Whether the supervisor's loop turns."""
        return time.monotonic() - self.turn() < STALL_SECONDS


class Handler(BaseHTTPRequestHandler):
    """Answers GET; everything else gets the base class's 501."""

    server: Endpoints
    timeout = READ_SECONDS
    server_version = "pretrain"
    sys_version = ""

    def do_GET(self) -> None:
        """Route by path."""
        match self.path.partition("?")[0]:
            case "/status":
                self._answer(self.server.status().to_json().encode(), "application/json")
            case "/metrics":
                self._answer(metrics.render(self.server.status), "text/plain; version=0.0.4")
            case "/healthz":
                healthy = self.server.healthy()
                status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
                self._answer(b"ok\n" if healthy else b"stalled\n", "text/plain", status)
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, body: bytes, content: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Requests are not logged: the operator makes one every few seconds."""
