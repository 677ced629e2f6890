"""The files and variables an agent finds in a pod, made for one process on this machine."""

import secrets
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from pretrain_api import names
from pretrain_api.config import RunConfig
from pretrain_api.wire import Assignment

_HOST = "127.0.0.1"
_GRACE_SECONDS = 120  # to save after Ctrl-C


@dataclass(frozen=True)
class WorkDir:
    """Variables for the agent, and where it leaves its last words."""

    environment: dict[str, str]
    termination_log: Path


def prepare(folder: Path, config: RunConfig, processes: int) -> WorkDir:
    """Write configuration and assignment into ``folder``."""
    config_file, assignment_file = folder / names.CONFIG_FILE, folder / names.ASSIGNMENT_FILE
    config_file.write_text(config.model_dump_json(indent=2))
    http_port, meeting_port = _free_ports(2)
    assignment = Assignment(
        generation=int(time.time()),  # newer than every earlier run on the same checkpoints
        rank=0,
        size=1,
        leader=f"{_HOST}:{meeting_port}",
        nonce=secrets.token_hex(16),
    )
    assignment_file.write_text(assignment.to_json())
    output = Path(config.job.dump_folder).resolve()
    termination_log = folder / "termination-log"
    environment = {
        names.ENV_CONFIG: str(config_file),
        names.ENV_ASSIGNMENT: str(assignment_file),
        names.ENV_PROCESSES: str(processes),
        names.ENV_HTTP_PORT: str(http_port),
        names.ENV_MEETING_PORT: str(meeting_port),
        names.ENV_TERMINATION_LOG: str(termination_log),
        names.ENV_GRACE_SECONDS: str(_GRACE_SECONDS),
        names.ENV_HOST: _HOST,
        names.ENV_JOB_NAME: output.name,
        # The same folder is the same job, so that its checkpoints are found to be its own.
        names.ENV_JOB_UID: str(uuid.uuid5(uuid.NAMESPACE_URL, output.as_uri())),
        names.ENV_POD_NAME: "local",
    }
    return WorkDir(environment, termination_log)


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens on; held together, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((_HOST, 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
