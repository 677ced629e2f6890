"""What supervisor and launcher say to each other over their socket pair, one JSON per line.

The launcher knows nothing about generations, peers or orders: it starts ranks when told and reports
when they stopped. Everything that decides is in the supervisor, which has no torch to block it.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pretrain_agent.meeting import Open, Opened
from pretrain_api.wire import Wire


class Ready(Wire):
    """The launcher is warm; ``start_method`` is how it will start ranks."""

    kind: Literal["ready"] = "ready"
    start_method: str


class Stopped(Wire):
    """No rank runs, and the launcher waits to be told to start some.

    ``exits`` has the exit codes, by local rank, of ranks that ended by themselves: negative for a
    signal. It is empty at the first start and after a regroup.
    """

    kind: Literal["stopped"] = "stopped"
    exits: dict[int, int] = Field(default_factory=dict)


class Finished(Wire):
    """All local ranks returned; the launcher waits to be ended."""

    kind: Literal["finished"] = "finished"


class Start(Wire):
    """Start the ranks of one round; their store listens on ``host:port``."""

    kind: Literal["start"] = "start"
    generation: int
    round: int
    rank: int  # of this agent
    size: int  # number of agents
    host: str
    port: int
    nonce: str
    saved_step: int | None = None  # see Assignment


class Regroup(Wire):
    """Stop the running ranks and report back."""

    kind: Literal["regroup"] = "regroup"


FromLauncher = Ready | Stopped | Opened | Finished
ToLauncher = Open | Start | Regroup
FROM_LAUNCHER: TypeAdapter[FromLauncher] = TypeAdapter(
    Annotated[FromLauncher, Field(discriminator="kind")]
)
TO_LAUNCHER: TypeAdapter[ToLauncher] = TypeAdapter(
    Annotated[ToLauncher, Field(discriminator="kind")]
)
