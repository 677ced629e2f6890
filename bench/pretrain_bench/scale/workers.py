"""Workers that are not there: one server on the loopback answers for every pod's address.

It says what an agent would: a training world of the generation that the pod was told of. So the
operator asks, and writes progress, as it does with real workers. Steps are long: while requests are
counted no number changes, as how many of those are written is a matter of time, not of pods.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from pretrain_api import names
from pretrain_api.wire import Phase, Progress, Timeline, WorkerStatus
from pretrain_bench.scale.podlog import Life, PodLog

STEP_SECONDS = 600.0
STEPS = 1_000_000
BACKLOG = 4096  # questions that may wait


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
    """Answer for all pods for as long as the context lasts. Raises OSError if the port is taken.

    One thread does: with one for each question, hundreds would keep the log from its watch.
    """
    listener = socket.socket()
    # Any address of the loopback, and none of another interface.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("", names.HTTP_PORT))
    loop = asyncio.new_event_loop()
    serve = asyncio.start_server(partial(_answer, pods), sock=listener, backlog=BACKLOG)
    server = loop.run_until_complete(serve)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()


async def _answer(pods: PodLog, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One question, whatever it is, and one answer."""
    with suppress(OSError, asyncio.IncompleteReadError):  # who asked may not wait for it
        await reader.readuntil(b"\r\n\r\n")
        life = pods.by_address.get(writer.get_extra_info("sockname")[0])
        body = status_of(life, time.time()).model_dump_json().encode() if life else b""
        status = "200 OK" if life else "503 Service Unavailable"
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(f"HTTP/1.1 {status}\r\n{kind}\r\nConnection: close\r\n\r\n".encode() + body)
        writer.close()
        await writer.wait_closed()
