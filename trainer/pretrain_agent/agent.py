"""torch's local elastic agent, corrected where it is slow or blind.

Three corrections. When a rank ends by itself, torch asks the others politely to go and waits up to
half a minute for each, first in its process context and again in its agent; here they are killed at
once, because ranks that lost a peer have nothing to save. torch notes the exit code of one rank,
any; here all are kept, to find the cause among the echoes. And torch waits forever for a rank that
left with exit code 0 but returned nothing; here that is a failure like any other.

Only ranks that leave with the code for "saved, on request" are waited for: one of them may still be
committing the checkpoint.
"""

# torch's @prof decorator hides the signatures of the methods overridden here from type checkers.
# pyright: reportIncompatibleVariableOverride=false, reportCallIssue=false

import os
import signal
import time

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, MultiprocessContext
from torch.distributed.launcher.api import LaunchConfig

from pretrain_agent import rank
from pretrain_agent.rendezvous import Link, Rendezvous
from pretrain_api import names
from pretrain_api.wire import ExitCode

MONITOR_SECONDS = 0.1
KILL_SECONDS = 2.0  # for killed ranks to be gone; one stuck in the kernel must not hold us up
NO_FAILURE = (ExitCode.OK, ExitCode.PREEMPTED, -signal.SIGKILL)  # of a rank that was to be stopped
FOREVER = 10**9  # restarts in place are limited by the meeting, by progress and not by number


class Agent(LocalElasticAgent):
    """See the module's docstring."""

    def __init__(self, spec: WorkerSpec, launch: LaunchConfig, rendezvous: Rendezvous) -> None:
        super().__init__(spec, launch.logs_specs or DefaultLogsSpecs(), launch.start_method)
        self._rendezvous_with_exits = rendezvous

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        exits = self._exits()
        if not exits:
            result = super()._monitor_workers(worker_group)
            exits = {failure.local_rank: failure.exitcode for failure in result.failures.values()}
        elif self._still_leaving(exits):
            result = RunResult(state=WorkerState.HEALTHY)
        else:
            self._kill_ranks()
            result = RunResult(state=WorkerState.FAILED)
        self._rendezvous_with_exits.exits = exits
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._kill_ranks()
        if not self._rendezvous_with_exits.exits:
            # A rank that was ending by itself, its connections closed already, keeps its own code.
            self._rendezvous_with_exits.exits = {
                index: code for index, code in self._exits().items() if code not in NO_FAILURE
            }
        super()._stop_workers(worker_group)

    def _exits(self) -> dict[int, int]:
        """Exit codes, by local rank, of the ranks that have ended.

        A rank that returned isn't among them: it waits until all its siblings have, too.
        """
        codes = {index: process.exitcode for index, process in enumerate(self._processes())}
        return {index: code for index, code in codes.items() if code is not None}

    def _still_leaving(self, exits: dict[int, int]) -> bool:
        """Whether ranks are leaving on request, and some have yet to."""
        saved = all(code == ExitCode.PREEMPTED for code in exits.values())
        return saved and len(exits) < len(self._processes())

    def _kill_ranks(self) -> None:
        processes = self._processes()
        for process in processes:
            process.kill()
        deadline = time.monotonic() + KILL_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def _processes(self) -> list:
        """The ranks' ``multiprocessing.Process`` objects, in order of local rank.

        torch keeps them private, and has nothing public from which to learn all exit codes.
        """
        context = self._pcontext
        if not isinstance(context, MultiprocessContext) or context._pc is None:
            return []
        return context._pc.processes


def run_ranks(link: Link, processes: int, start_method: str, entry_point: str, config: str) -> None:
    """Start, watch and restart this worker's ranks for as long as the supervisor wants."""
    environment: dict[str, str] = {}
    rendezvous = Rendezvous(link, environment)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        start_method=start_method,
        # torch's own log files stay empty; they go where everything of this run is removed
        logs_specs=DefaultLogsSpecs(os.path.dirname(os.environ[names.ENV_BOARD])),
        max_restarts=FOREVER,
        monitor_interval=MONITOR_SECONDS,
    )
    spec = WorkerSpec(
        role="trainer",
        local_world_size=processes,
        entrypoint=rank.run,
        # the mapping is pickled anew for every rank, so each gets what it holds at that moment
        args=(entry_point, config, environment),
        rdzv_handler=rendezvous,
        max_restarts=launch.max_restarts,
        monitor_interval=launch.monitor_interval,
        numa_options=launch.numa_options,
    )
    Agent(spec, launch, rendezvous).run()
