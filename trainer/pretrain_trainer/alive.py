"""Signs of life of work that takes long, such as reading a checkpoint.

Whoever watches a rank takes silence for a hang, so long work calls an ``Alive`` whenever it got on
by a bounded piece: a chunk, a file, some documents. Never on a timer and never from a thread that
only waits, because then a rank that hangs would look alive. Calls are cheap; whoever listens
decides how many of them to pass on.
"""

from collections.abc import Callable

Alive = Callable[[], None]


def unwatched() -> None:
    """The :data:`Alive` of work that nobody watches."""
