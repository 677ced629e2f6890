"""``python -m pretrain_agent``: supervise the ranks of one worker until they end."""

import asyncio
import logging
import os
import sys
from pathlib import Path

from pretrain_agent import termination
from pretrain_agent.settings import DEFAULT_TERMINATION_LOG, Settings, SettingsError
from pretrain_agent.supervisor import Supervisor
from pretrain_api import names
from pretrain_api.wire import ExitCode, Failure, Result, TerminationMessage


def main() -> int:
    """Run; returns the exit code of the worker."""
    logging.basicConfig(format="pretrain-agent: %(message)s", level=logging.INFO)
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as error:
        return _refuse(str(error))
    return asyncio.run(Supervisor(settings).run())


def _refuse(message: str) -> int:
    """Say what is wrong with the environment, where people and the operator look."""
    logging.error("%s", message)
    path = os.environ.get(names.ENV_TERMINATION_LOG) or DEFAULT_TERMINATION_LOG
    failure = Failure(exit_code=ExitCode.CONFIG, reason="Config", message=message)
    document = TerminationMessage(result=Result.CONFIG, exit_code=ExitCode.CONFIG, failure=failure)
    termination.write(Path(path), document)
    return ExitCode.CONFIG


if __name__ == "__main__":
    sys.exit(main())
