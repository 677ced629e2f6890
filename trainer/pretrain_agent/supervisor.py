"""The first process of a worker pod: it has no torch, so nothing can block it for long.

It reads the assignment, meets the other workers, has the launcher start and restart ranks, passes
orders to them, answers over HTTP, and at the end leaves a termination message and no process. One
event loop does all of that; what to do is decided by the pure state machines in
:mod:`pretrain_agent.member` and :mod:`pretrain_agent.meeting`, and carried out here.

Signals: only this process catches SIGTERM. It raises an order on the board, ranks agree on it in
the step's own collective and save together, and nobody is killed before that, or before the grace
period is nearly over.
"""

import asyncio
import logging
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from pretrain_agent import cgroup, failures, logs, process, termination
from pretrain_agent.assignment import AssignmentFile
from pretrain_agent.board import Board
from pretrain_agent.endpoints import Endpoints
from pretrain_agent.evidence import Evidence
from pretrain_agent.hang import Hung
from pretrain_agent.hangwatch import HangWatch
from pretrain_agent.launching import LauncherProcess
from pretrain_agent.link import (
    Finished,
    FromLauncher,
    Ready,
    Regroup,
    Start,
    Stopped,
)
from pretrain_agent.meeting import (
    Done,
    FromLeader,
    Go,
    Hello,
    Join,
    Leave,
    Meeting,
    Open,
    Opened,
    Over,
    Paused,
    Released,
)
from pretrain_agent.member import Member, Saying, State, leader_address
from pretrain_agent.orders import Orders
from pretrain_agent.settings import Settings, output_folder
from pretrain_agent.termination import Outcome
from pretrain_agent.timeline import Stages
from pretrain_agent.wires import MeetingClient, MeetingServer, listen
from pretrain_api.wire import (
    Assignment,
    Failure,
    Order,
    Phase,
    Progress,
    TerminationMessage,
    WorkerStatus,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # between two looks at the assignment and at the clock
KILL_SECONDS = 5.0  # for killed processes to be gone
EXIT_SECONDS = 60.0  # for ranks that are done to end; what they had to do is done
BARRIER_SECONDS = 10.0  # to wait for other workers after our ranks have finished
SHARED_MEMORY = Path("/dev/shm")


class Supervisor:
    """One worker from start to end; see the module's docstring."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.directory = _run_directory()
        self.board = Board.create(self.directory / "board", settings.processes)
        self.pump = logs.LogPump(self.directory, settings.processes)
        self.launcher = LauncherProcess(settings, self.directory / "board", self.pump.launcher_end)
        self.orders = Orders(self.board)
        self.file = AssignmentFile(settings.assignment)
        self.member = Member()
        self.server = MeetingServer()
        self.client: MeetingClient | None = None
        self.restarts = 0  # in place, over all generations
        self.failures_without_progress = 0
        self.last_failure: Failure | None = None
        self._meeting_port = settings.meeting_port
        self._client_task: asyncio.Task[None] | None = None
        self._oom_kills = cgroup.oom_kills()
        self.turn = time.monotonic()
        self.stages = Stages()
        self.evidence = Evidence(
            self.directory, self.board, self.pump, output_folder(settings.config)
        )
        self.hangs = HangWatch(self.server, self.evidence)
        self._accounting = False  # ranks have stopped, and why is being found out
        self._hung: Failure | None = None  # of a local rank, to be reported when all have stopped
        self._condemning: asyncio.Task[None] | None = None
        self._outcome: asyncio.Future[Outcome] | None = None
        self._message: TerminationMessage | None = None  # the last one written

    # -- life ---------------------------------------------------------------------------------

    async def run(self) -> int:
        """Live until the outcome is known, clean up, leave the message; returns the exit code.

        Raises:
            PortTakenError: another process listens on one of the ports.
        """
        loop = asyncio.get_running_loop()
        self._outcome = loop.create_future()
        process.adopt_orphans()
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        loop.add_signal_handler(signal.SIGTERM, self._terminate, "SIGTERM")
        loop.add_signal_handler(signal.SIGINT, self._terminate, "SIGINT")
        # What came while this process started; its children inherit that nothing is blocked.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
        try:
            endpoints = await self._listen()
        except OSError:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        self.pump.start()
        talk = asyncio.create_task(
            self.launcher.converse(self.launcher.start(), self._hear_launcher)
        )
        watch = asyncio.create_task(self._watch())
        for task in (talk, watch):
            task.add_done_callback(self._surface)
        try:
            outcome = await self._outcome
            # Closing waits for processes stuck in storage, and SIGKILL may come before they go.
            self._leave_message(outcome)
        finally:
            await self._close(talk, watch)
        self._leave_message(outcome)  # a save may have ended after the first one
        shutil.rmtree(self.directory, ignore_errors=True)
        log.info("%s, exit code %d", outcome.result, outcome.exit_code)
        endpoints.shutdown()
        return outcome.exit_code

    async def _listen(self) -> Endpoints:
        meeting = listen(self.settings.host, self.settings.meeting_port)
        self._meeting_port = meeting.getsockname()[1]
        await self.server.start(meeting)
        http = listen(self.settings.host, self.settings.http_port)
        endpoints = Endpoints(http, self)
        endpoints.start()
        log.info(
            "serving /status, /metrics, /healthz and /readyz on port %d, the meeting on port %d",
            http.getsockname()[1],
            self._meeting_port,
        )
        return endpoints

    def _surface(self, task: asyncio.Task[None]) -> None:
        """A bug in a task must end this process, not leave it half alive."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("supervisor failed", exc_info=error)
            text = f"supervisor: {type(error).__name__}: {error}"
            self._end(termination.failed(Failure(reason="Launcher", message=text)))

    def _end(self, outcome: Outcome) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(outcome)

    async def _close(self, *tasks: asyncio.Task[None]) -> None:
        for task in (*tasks, self._client_task, self._condemning):
            if task is not None:
                task.cancel()
        await self.server.close()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
        survivors = process.kill_descendants(KILL_SECONDS)
        if survivors:
            log.error("could not kill processes %s", [survivor.pid for survivor in survivors])
        self.launcher.forget()
        self.evidence.close()
        self.pump.close()

    def _leave_message(self, outcome: Outcome) -> None:
        """Write the termination message, unless this is what was written last."""
        step = max(beat.step for beat in self.board.beats())
        message = TerminationMessage(
            result=outcome.result,
            generation=self._generation,
            rank=self.member.rank,
            exit_code=outcome.exit_code,
            progress=self.board.progress() or Progress(step=step),
            restarts_in_place=self.restarts,
            failure=outcome.failure,
        )
        if message != self._message:
            termination.write(self.settings.termination_log, message)
        self._message = message

    # -- what others may know -------------------------------------------------------------------

    @property
    def _generation(self) -> int:
        return 0 if self.member.assignment is None else self.member.assignment.generation

    @property
    def restart_seconds(self) -> float | None:
        """How long the last restart after a failure took here."""
        return self.stages.restart_seconds

    def status(self) -> WorkerStatus:
        """The status document; called from the threads of the HTTP server."""
        beats = self.board.beats()
        slowest = min(beats, key=lambda beat: (beat.step, beat.at))
        oldest = min(beat.at for beat in beats)
        return WorkerStatus(
            generation=self._generation,
            round=max(self.member.round, 0),
            rank=self.member.rank,
            phase=slowest.phase,
            step=slowest.step,
            beat_age_seconds=round(time.monotonic() - oldest, 3) if oldest else None,
            restarts_in_place=self.restarts,
            failures_without_progress=self.failures_without_progress,
            progress=self.board.progress() or Progress(),
            last_failure=self.last_failure,
            draining=self.orders.leaving,
            warm=self.member.state is not State.WARMING,
            paused=self.member.paused,
            waiting_for=self.hangs.waiting.agents,
            waiting_seconds=self.hangs.waiting.seconds,
            timeline=self.stages.newest,
        )

    # -- the operator's word --------------------------------------------------------------------

    async def _watch(self) -> None:
        """Look at the assignment and at the clock, again and again."""
        while True:
            self._look(time.monotonic())
            if (assignment := self.file.poll()) is not None:
                before = self.member.assignment
                sayings = self.member.assign(assignment)
                if before is None or before.generation != assignment.generation:
                    self._enter_generation(assignment)
                self._say(sayings)
                self._obey(assignment.orders)
            self.orders.end_save()
            if self.orders.overdue(self.turn):
                text = "the grace period ended before the checkpoint was saved"
                self._leave_at_once(Failure(reason="RankFailed", message=text))
            await asyncio.sleep(POLL_SECONDS)

    def _look(self, now: float) -> None:
        """See how the ranks and the launcher are, and how this process itself is."""
        beats = self.board.beats()
        if self.hangs.look(beats, now):
            log.warning("this process could not run for %.0f s", now - self.turn)
            self.launcher.be_patient()
        self.turn = now
        self.stages.look(beats)
        running = self.client if self.member.state is State.RUNNING else None
        assignment = self.member.assignment
        self.hangs.tick(beats, running, assignment.hang if assignment else None, now)
        self.launcher.kill_if_stuck(all(beat.pid for beat in beats))
        done = all(beat.phase is Phase.DONE and now - beat.at > EXIT_SECONDS for beat in beats)
        if done and self.member.state is State.RUNNING:
            log.warning("ranks that are done don't end")
            self._finish()

    def _enter_generation(self, assignment: Assignment) -> None:
        """Host or find the meeting of the new generation."""
        log.info(
            "generation %d: rank %s of %d", assignment.generation, assignment.rank, assignment.size
        )
        if self._client_task is not None:
            self._client_task.cancel()
        self._client_task, self.client = None, None
        self.failures_without_progress = 0
        self.hangs.begin_generation()
        if self.member.state in (State.WARMING, State.STOPPED):
            self._forget_progress_of_others()
        leads = assignment.rank == 0
        meeting = Meeting(assignment.generation, assignment.size) if leads else None
        self.server.host(meeting, assignment.nonce)
        if assignment.rank is None:
            return
        host, port = leader_address(assignment)
        hello = Hello(
            generation=assignment.generation, rank=assignment.rank, nonce=assignment.nonce
        )
        self.client = MeetingClient(
            host, self._meeting_port if leads else port, hello, self._hear_leader
        )
        self._client_task = asyncio.create_task(self.client.run())
        self._client_task.add_done_callback(self._surface)

    def _forget_progress_of_others(self) -> None:
        """Where global rank 0 was and no longer is, what it published gets old.

        Only while no rank runs, and not of ranks that finished: theirs is the end of the job.
        """
        if self.member.rank != 0:
            self.board.forget_progress()

    def _obey(self, order: Order) -> None:
        """Carry out the operator's order, as far as it is not up to the ranks."""
        if self.orders.terminating:
            return
        self.orders.obey(order)
        if order is Order.STOP:
            self._leave_at_once()
        elif order is Order.DRAIN:
            self._leave_if_idle()
        elif order is Order.PAUSE and self.member.state in (State.WARMING, State.STOPPED):
            self._pause()

    def _pause(self) -> None:
        """No rank runs: stay so until the next generation."""
        self.orders.end_pause()
        self._say(self.member.pause())

    def _terminate(self, name: str) -> None:
        """SIGTERM or SIGINT: save and leave; a second one does not wait for the save."""
        if self.orders.terminating:
            self._leave_at_once()
            return
        log.info("%s: saving, then leaving", name)
        self.orders.terminate(time.monotonic(), self.settings.grace_seconds)
        self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        if self.member.state is not State.RUNNING:
            self._leave_at_once()

    def _leave_at_once(self, failure: Failure | None = None) -> None:
        """End as asked, whatever ranks are at; those that were done by then had trained to the end.

        ``failure`` says what else was cut short.
        """
        done = self.member.state is State.FINISHED or self._is_done()
        self._end(self._completion() if done else termination.preempted(failure))

    def _is_done(self) -> bool:
        """Whether all local ranks have left the completion marker: their work is saved."""
        return all(beat.phase is Phase.DONE for beat in self.board.beats())

    # -- the leader and the launcher ------------------------------------------------------------

    def _hear_leader(self, message: FromLeader) -> None:
        if isinstance(message, Go | Leave):
            self.failures_without_progress = message.failures
        if isinstance(message, Go):
            self.last_failure = message.last_failure or self.last_failure
        sayings = self.member.hear(message)
        if isinstance(message, Over) and message.hung is not None and sayings == [Regroup()]:
            self._condemn(message.hung, self._generation, message.round)
        else:
            self._say(sayings)

    def _condemn(self, hung: Hung, generation: int, number: int) -> None:
        """A rank somewhere hangs: take the stacks here before the ranks are stopped."""
        if not self.hangs.is_news(generation, number):
            return

        async def condemn() -> None:
            failure = await self.hangs.take_evidence(hung, generation, self.launcher.pid)
            same_round = (self._generation, self.member.round) == (generation, number)
            if same_round and self.member.state is State.RUNNING:
                self._hung = failure
                self._say([Regroup()])

        self._condemning = asyncio.create_task(condemn())
        self._condemning.add_done_callback(self._surface)

    def _say(self, sayings: list[Saying]) -> None:
        """Carry out what the member decided."""
        for saying in sayings:
            match saying:
                case Join() | Paused() | Opened() | Done():
                    if self.client is not None:
                        self.client.say(saying)
                    if isinstance(saying, Join):
                        self.stages.joined(self._generation, saying.round, time.monotonic())
                case Regroup() if self._accounting:
                    pass  # the ranks have stopped; nobody would say so again
                case Open() | Regroup():
                    self.launcher.tell(saying)
                    if isinstance(saying, Regroup):
                        self.stages.stopped(time.monotonic(), failed=False)
                case Start():
                    self._begin_round(saying)
                case Leave():
                    self.last_failure = saying.failure
                    self._end(termination.failed(saying.failure))
                case Released():
                    self._end(self._completion())

    def _begin_round(self, start: Start) -> None:
        if start.round > 0:
            self.restarts += 1
        self.pump.begin_round(start.rank * self.settings.processes)
        now = time.monotonic()
        self.hangs.begin_round(start.round, start.rank * self.settings.processes, now)
        self.stages.started(start.generation, start.round, now)
        self.launcher.tell(start)

    async def _hear_launcher(self, message: FromLauncher) -> None:
        match message:
            case Ready():
                self.launcher.is_warm()
                log.info("the launcher is warm, ranks start by %s", message.start_method)
            case Stopped():
                await self._account_for_stop(message)
            case Opened():
                self._say(self.member.opened(message))
            case Finished():
                self._finish()

    async def _account_for_stop(self, stopped: Stopped) -> None:
        """Ranks are down: find out why, clear the board, and ask for the next round."""
        self.launcher.has_stopped_ranks()
        if stopped.exits:
            self.stages.stopped(time.monotonic(), failed=True)
        self._accounting = True
        try:
            await asyncio.get_running_loop().run_in_executor(None, self.pump.flush)
        finally:
            self._accounting = False
        failure = self._blame(stopped.exits)
        failure, self._hung = self._hung or failure, None
        left = failure is None and bool(stopped.exits)
        step = max(beat.step for beat in self.board.beats())
        self.launcher.kill_leftovers()
        if failure is not None:
            log.warning("rank %s: %s: %s", failure.rank, failure.reason, _last_line(failure))
        if stopped.exits and self._is_done():
            self._finish()  # however they ended after that
            return
        self._forget_progress_of_others()
        if self.orders.leaving:
            self._end(termination.left(failure))
            return
        self.board.clear()
        sayings = self.member.stopped(step, failure, left)
        if self.orders.pausing:
            self.last_failure = failure or self.last_failure
            self._pause()
        else:
            self._say(sayings)

    def _blame(self, exits: dict[int, int]) -> Failure | None:
        """The local cause. Last words count only if some rank ended by itself."""
        out_of_memory = self._ran_out_of_memory()
        if not exits:
            return None
        processes = range(self.settings.processes)
        return failures.blame(
            exits,
            self.board.failures(),
            {local: failures.tail_text(self.pump.tail(local)) for local in processes},
            (self.member.started_rank or 0) * self.settings.processes,
            out_of_memory=out_of_memory,
        )

    def _ran_out_of_memory(self) -> bool:
        """Whether the kernel has killed a process of this container since this was asked last."""
        kills, self._oom_kills = self._oom_kills, cgroup.oom_kills()
        return self._oom_kills > kills

    def _finish(self) -> None:
        """Our ranks are done. Wait for the others, but not for long: the work is saved."""
        self._say(self.member.finished())
        asyncio.get_running_loop().call_later(
            BARRIER_SECONDS, lambda: self._end(self._completion())
        )

    def _completion(self) -> Outcome:
        return termination.completion(beat.phase for beat in self.board.beats())

    def _reap(self) -> None:
        """Collect dead children; if the launcher is among them, this worker is at its end."""
        if (code := self.launcher.ended(process.reap())) is not None:
            asyncio.create_task(self._launcher_died(code))  # noqa: RUF006  # it ends this process

    async def _launcher_died(self, code: int) -> None:
        """Without it no rank can start; but ranks that are done need none."""
        await asyncio.get_running_loop().run_in_executor(None, self.pump.flush)
        if self.member.state is State.FINISHED:
            self._end(self._completion())
            return
        tail = self.pump.tail(logs.LAUNCHER)
        out_of_memory = self._ran_out_of_memory()
        # It could not stop a rank that hangs in the kernel: that one is to blame.
        failure = self._hung or failures.of_launcher(code, self.launcher.fault, tail, out_of_memory)
        leaving = self.orders.leaving
        self._end(termination.left(failure) if leaving else termination.failed(failure))


def _last_line(failure: Failure) -> str:
    return failure.message.rstrip().rpartition("\n")[2]


def _run_directory() -> Path:
    """A directory for the board and the pipes: in memory where there is some, else temporary."""
    usable = os.access(SHARED_MEMORY, os.W_OK)
    return Path(tempfile.mkdtemp(prefix="pretrain-", dir=SHARED_MEMORY if usable else None))
