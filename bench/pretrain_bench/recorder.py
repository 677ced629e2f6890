"""Notes what the API server shows of a job and its pods, and when, on this machine's clock.

The pods share that clock, so what workers say about their own starts fits in without translation.
"""

import http.client
import socket
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pretrain_api import names
from pretrain_bench.client import Client, pods_path
from pretrain_bench.jobs import Jobs

SILENCE_SECONDS = 60.0  # after which a watch is made anew

Watched = Literal["job", "pod"]


@dataclass(frozen=True)
class Sighting:
    """One event of a watch."""

    at: float  # seconds since the epoch, when it arrived here
    kind: Watched
    deleted: bool
    body: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """Name of the object."""
        return self.body["metadata"]["name"]


class Recorder:
    """Watches a job and its pods while it is entered; use it in a with statement."""

    def __init__(self, jobs: Jobs, job: str) -> None:
        self._client: Client = jobs.client
        selector = f"{names.LABEL_JOB}={job}"
        collection = jobs.path(job).rpartition("/")[0]
        self._paths: dict[Watched, str] = {
            "job": f"{collection}?fieldSelector=metadata.name%3D{job}",
            "pod": pods_path(jobs.namespace, selector),
        }
        self._lock = threading.Lock()
        self._sightings: list[Sighting] = []
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._connections: dict[Watched, http.client.HTTPSConnection] = {}

    def __enter__(self) -> Self:
        for kind in self._paths:
            thread = threading.Thread(target=self._watch, args=(kind,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for connection in self._connections.values():
            with suppress(OSError, AttributeError):  # it was about to be made anew
                connection.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def since(self, moment: float) -> list[Sighting]:
        """What was seen after a moment, in order; what came before is forgotten."""
        with self._lock:
            self._sightings = [sight for sight in self._sightings if sight.at >= moment]
            return list(self._sightings)

    def _watch(self, kind: Watched) -> None:
        """Watch until the end; a watch that ends, or is silent for long, is made anew."""
        while not self._over.is_set():
            with closing(self._client.connect(SILENCE_SECONDS)) as connection:
                self._connections[kind] = connection
                for event in self._client.events(connection, self._paths[kind]):
                    self._note(kind, event)

    def _note(self, kind: Watched, event: dict[str, Any]) -> None:
        if event["type"] not in ("ADDED", "MODIFIED", "DELETED"):
            return
        sighting = Sighting(time.time(), kind, event["type"] == "DELETED", event["object"])
        with self._lock:
            self._sightings.append(sighting)
