"""What the operator, or ``pretrain run``, tells a supervisor through its environment.

The supervisor reads its environment once, here, so that a wrong value is one clear sentence at the
start and not a surprise later.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain_api import names

ENV_ENTRY_POINT = "PRETRAIN_ENTRY_POINT"  # module:function that every rank runs, for own trainers
DEFAULT_ENTRY_POINT = "pretrain_trainer.train:main"
DEFAULT_TERMINATION_LOG = "/dev/termination-log"
DEFAULT_GRACE_SECONDS = 30.0


class SettingsError(ValueError):
    """An environment variable is missing or wrong; the message says which and why."""


@dataclass(frozen=True)
class Settings:
    """Settings of one supervisor. Ports may be 0: the system then picks a free one."""

    config: Path
    assignment: Path
    processes: int
    http_port: int
    meeting_port: int
    termination_log: Path
    grace_seconds: float
    host: str
    entry_point: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Read the ``PRETRAIN_*`` variables. Raises :class:`SettingsError`."""
        grace = environment.get(names.ENV_GRACE_SECONDS) or str(DEFAULT_GRACE_SECONDS)
        entry_point = environment.get(ENV_ENTRY_POINT) or DEFAULT_ENTRY_POINT
        if not all(entry_point.partition(":")):
            raise SettingsError(f"{ENV_ENTRY_POINT}={entry_point!r} is not of the form module:name")
        return cls(
            config=Path(
                environment.get(names.ENV_CONFIG) or f"{names.CONFIG_DIR}/{names.CONFIG_FILE}"
            ),
            assignment=Path(
                environment.get(names.ENV_ASSIGNMENT)
                or f"{names.PODINFO_DIR}/{names.ASSIGNMENT_FILE}"
            ),
            processes=_integer(environment, names.ENV_PROCESSES, 1, 1, 1024),
            http_port=_integer(environment, names.ENV_HTTP_PORT, names.HTTP_PORT, 0, 65535),
            meeting_port=_integer(
                environment, names.ENV_MEETING_PORT, names.MEETING_PORT, 0, 65535
            ),
            termination_log=Path(
                environment.get(names.ENV_TERMINATION_LOG) or DEFAULT_TERMINATION_LOG
            ),
            grace_seconds=_seconds(names.ENV_GRACE_SECONDS, grace),
            host=environment.get(names.ENV_HOST) or "127.0.0.1",
            entry_point=entry_point,
        )


def output_folder(config: Path) -> Path | None:
    """The folder the run writes to, or None where the configuration doesn't say or isn't readable.

    Saying what is wrong with a configuration is up to the trainer.
    """
    try:
        folder = json.loads(config.read_bytes())["job"]["dump_folder"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return Path(folder) if isinstance(folder, str) else None


def _integer(
    environment: Mapping[str, str], name: str, default: int, lowest: int, highest: int
) -> int:
    text = environment.get(name) or str(default)
    try:
        value = int(text)
    except ValueError:
        raise SettingsError(f"{name}={text!r} is not a whole number") from None
    if not lowest <= value <= highest:
        raise SettingsError(f"{name}={value} is not between {lowest} and {highest}")
    return value


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise SettingsError(f"{name}={text!r} is not a number of seconds") from None
    if not 0 <= value < float("inf"):
        raise SettingsError(f"{name}={text} is not a positive number of seconds")
    return value
