"""Workers that are not there: one server on the loopback answers for every pod's address.

It says what an agent would: a training world of the generation that the pod was told of, one step
after another. So the operator asks, and writes progress, as it does with real workers.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pretrain_api import names
from pretrain_api.wire import Phase, Progress, Timeline, WorkerStatus
from pretrain_bench.scale.podlog import Life, PodLog

STEP_SECONDS = 10.0
STEPS = 1_000_000


def status_of(life: Life, now: float) -> WorkerStatus:
    """What the worker in a pod would say; before it was told anything it waits."""
    told = life.assignment
    if not told.get("leader"):
        return WorkerStatus()
    step = 1 + int((now - life.came) / STEP_SECONDS)
    progress = Progress(
        step=step, steps=STEPS, tokens=1000 * step, loss=2.0, step_seconds=STEP_SECONDS
    )
    return WorkerStatus(
        generation=told["generation"],
        round=1,
        rank=told["rank"],
        phase=Phase.STEP,
        step=step,
        beat_age_seconds=0.1,
        warm=True,
        progress=progress if told["rank"] == 0 else Progress(),
        timeline=Timeline(generation=told["generation"], round=1, trained=life.came),
    )


@contextmanager
def answering(pods: PodLog) -> Iterator[None]:
    """Answer for all pods for as long as the context lasts. Raises OSError if the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            life = pods.by_address.get(self.connection.getsockname()[0])
            body = status_of(life, time.time()).model_dump_json().encode() if life else b""
            self.send_response(200 if life else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Nothing: there would be thousands of lines."""

    server = ThreadingHTTPServer(("127.0.0.1", names.HTTP_PORT), Handler, bind_and_activate=False)
    server.server_address = ("", names.HTTP_PORT)  # any address of the loopback
    server.server_bind()
    server.server_activate()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
