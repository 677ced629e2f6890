"""Work done ahead of need, in a thread.

Tokenizing lets go of Python's lock, so a thread is enough to prepare the next steps while the
device computes, and unlike a process it needs no copies, no serialisation and no cleaning up after.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from pretrain_trainer.alive import Alive, unwatched

T = TypeVar("T")

CLOSE_SECONDS = 1.0
LOOK_SECONDS = 0.5  # between two looks at whether the thread gets on


class Prefetcher(Generic[T]):
    """Calls ``produce`` in a thread and keeps up to ``depth`` results ready, in order.

    ``moved`` is set by ``produce`` whenever it gets on. What ``produce`` raises is raised by the
    :meth:`get` whose turn it is, and by every one after it. The thread is a daemon: it never keeps
    a process from ending.
    """

    def __init__(
        self, produce: Callable[[], T], depth: int, moved: threading.Event | None = None
    ) -> None:
        self._produce = produce
        self._moved = moved or threading.Event()
        self._depth = depth
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="data-prefetch", daemon=True)
        self._thread.start()

    def get(self, alive: Alive = unwatched) -> T:
        """The next result; waits for it, and calls ``alive`` as long as the thread gets on."""
        with self._changed:
            while not self._changed.wait_for(self._decided, LOOK_SECONDS):
                if self._moved.is_set():
                    self._moved.clear()
                    alive()
            if self._ready:
                result = self._ready.popleft()
                self._changed.notify_all()
                return result
            if self._error:
                raise self._error
            raise RuntimeError("the prefetcher is closed")

    def close(self) -> None:
        """Drop what is ready and end the thread once the call it is in returns.

        Waits only briefly for that: a call may be stuck in a network read that takes hours, and
        what it returns is dropped anyway.
        """
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)

    def _decided(self) -> bool:
        """Whether the next :meth:`get` needn't wait."""
        return bool(self._ready or self._error or self._closed)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                if self._closed:
                    return
            try:
                result = self._produce()
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if not self._closed:
                    self._ready.append(result)
                self._changed.notify_all()
