"""``python -m pretrain_agent``: supervise the ranks of one worker until they end."""

import signal

if __name__ == "__main__":
    # The first process of a container ignores what it has no handler for. So that a pod which is
    # deleted while all below is imported doesn't live on, these wait until somebody listens.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))

import asyncio
import logging
import os
import sys
from pathlib import Path

from pretrain_agent import termination
from pretrain_agent.settings import DEFAULT_TERMINATION_LOG, Settings, SettingsError
from pretrain_agent.supervisor import Supervisor
from pretrain_agent.termination import Outcome
from pretrain_agent.wires import PortTakenError
from pretrain_api import names
from pretrain_api.wire import ExitCode, Failure, TerminationMessage


def main() -> int:
    """Run; returns the exit code of the worker."""
    logging.basicConfig(format="pretrain-agent: %(message)s", level=logging.INFO)
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as error:
        failure = Failure(exit_code=ExitCode.CONFIG, reason="Config", message=str(error))
        return _refuse(termination.failed(failure))
    try:
        return asyncio.run(Supervisor(settings).run())
    except PortTakenError as error:
        return _refuse(termination.failed(Failure(reason="Launcher", message=str(error))))


def _refuse(outcome: Outcome) -> int:
    """Say why there was no start, where people and the operator look."""
    logging.error("%s", outcome.failure.message if outcome.failure else outcome.result)
    path = os.environ.get(names.ENV_TERMINATION_LOG) or DEFAULT_TERMINATION_LOG
    document = TerminationMessage(
        result=outcome.result, exit_code=outcome.exit_code, failure=outcome.failure
    )
    termination.write(Path(path), document)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
