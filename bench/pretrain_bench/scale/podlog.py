"""When each pod came and went, from one watch of all pods.

The API server ends a watch that doesn't keep up; the next one goes on where it was.
"""

import json
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pretrain_api import names
from pretrain_bench.client import Client

JOB_LABELS = (names.LABEL_JOB, "batch.kubernetes.io/job-name")


@dataclass
class Life:
    """One pod; times in seconds since the epoch."""

    name: str
    job: str
    came: float
    went: float | None = None
    address: str | None = None
    assignment: dict[str, Any] = field(default_factory=dict[str, Any])


class PodLog:
    """A context manager; a thread follows the watch."""

    def __init__(self, client: Client) -> None:
        self.lives: dict[str, Life] = {}  # by UID
        self.by_address: dict[str, Life] = {}
        self._client = client
        self._connection = client.connect(timeout=None)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "PodLog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._connection.sock is not None:
            self._connection.sock.shutdown(socket.SHUT_RDWR)  # the thread is reading from it
        self._thread.join()
        self._connection.close()

    def _follow(self) -> None:
        version = ""
        while not self._ending.is_set():
            path = f"/api/v1/pods?resourceVersion={version}" if version else "/api/v1/pods"
            for event in self._client.events(self._connection, path):
                self._note(event["type"], event["object"], time.time())
                version = event["object"]["metadata"]["resourceVersion"]
            self._connection.close()

    def _note(self, kind: str, pod: dict[str, Any], now: float) -> None:
        meta = pod["metadata"]
        labels = meta.get("labels", {})
        job = next((labels[label] for label in JOB_LABELS if label in labels), "")
        life = self.lives.setdefault(meta["uid"], Life(meta["name"], job, now))
        if kind == "DELETED":
            life.went = now
            return
        text = meta.get("annotations", {}).get(names.ANNOTATION_ASSIGNMENT)
        if text:
            life.assignment = json.loads(text)
        life.address = pod.get("status", {}).get("podIP") or life.address
        if life.address:
            self.by_address[life.address] = life

    def present(self) -> list[Life]:
        """Pods that have not gone."""
        return [life for life in [*self.lives.values()] if life.went is None]

    def of(self, jobs: Iterable[str]) -> dict[str, list[Life]]:
        """All pods there ever were of each of these jobs."""
        found: dict[str, list[Life]] = {job: [] for job in jobs}
        for life in [*self.lives.values()]:
            if life.job in found:
                found[life.job].append(life)
        return found
