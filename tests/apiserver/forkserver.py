"""A program that starts operators by forking a process that has imported everything already.

Importing is three quarters of an operator's start, and the crash points start hundreds. A fork of a
process in which nothing but imports has happened is as good as a new one. All operators of a
session are of the same code then, also while somebody edits it.

Reads a line of JSON per operator (its environment, and the file for its log), answers with its
process ID, and ends with its standard input. Operators end with it.
"""

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1


def become_operator(environment: dict[str, str], log: str) -> NoReturn:
    """In the child: what ``python -m pretrain_operator`` is in a container."""
    from kubernetes.aio.config import kube_config

    from pretrain_operator.__main__ import main

    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(source, descriptor)
        os.environ.clear()
        os.environ.update(environment)
        # The client has looked at the variable when it was imported.
        kube_config.KUBE_CONFIG_DEFAULT_LOCATION = environment["KUBECONFIG"]
        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    import pretrain_operator.__main__  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children that ended leave nothing behind
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become_operator(order["environment"], order["log"])
        print(pid, flush=True)
