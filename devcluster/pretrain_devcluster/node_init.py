"""First process of a node: mounts, starts the node's programs, reaps orphans.

It runs as process 1 of a process namespace, so killing it kills the whole node at once, kubelet,
containerd and containers, as a power cut would. It is run by path and imports nothing of this
package: its only input is a JSON file.

    {"hostname": "node1",
     "binds": [["/machine/folder", "/folder/in/node"], ...],
     "programs": [{"argv": [...], "log": "/file", "after": "/socket or null"}, ...]}
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TypedDict

_RESTART_PAUSE = 0.5  # seconds


class Program(TypedDict):
    """One program of the node; `after` is a file to wait for before the first start."""

    argv: list[str]
    log: str
    after: str | None


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def prepare(hostname: str, binds: list[tuple[str, str]]) -> None:
    """Gives the node mounts, a host name and forwarding of its own.

    Mounts are shared only inside the node, for containers that ask for propagation. /run is empty
    as after a boot, and folders of the machine that the programs hard-code are covered by the
    node's own.
    """
    _mount("--make-rprivate", "/")
    _mount("--make-rshared", "/")
    _mount("-t", "proc", "proc", "/proc")
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for source, target in binds:
        _mount("--bind", source, target)
    socket.sethostname(hostname)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def start(program: Program) -> subprocess.Popen[bytes]:
    """Starts a program with its output appended to its log."""
    while program["after"] is not None and not os.path.exists(program["after"]):
        time.sleep(0.05)
    with open(program["log"], "ab") as log:
        return subprocess.Popen(
            program["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


def serve(programs: list[Program]) -> None:
    """Keeps the programs running for ever; whatever else ends is an orphan and is only reaped."""
    started = {start(program).pid: program for program in programs}
    while True:
        pid, _ = os.waitpid(-1, 0)
        ended = started.pop(pid, None)
        if ended is not None:
            time.sleep(_RESTART_PAUSE)
            started[start(ended).pid] = ended


def main(file: str) -> None:
    """Becomes the node that the file describes."""
    node = json.loads(Path(file).read_text())
    prepare(node["hostname"], node["binds"])
    serve(node["programs"])


if __name__ == "__main__":
    main(sys.argv[1])
