"""Starts ranks: torch's elastic agent, which is what torchrun runs, over a fork server.

Importing torch takes seconds, forking a process that has done so takes milliseconds. So a fork
server imports the trainer once, while the pod still waits for its place in the world, and every
start and restart of ranks is a fork. That is only sound while the server has neither threads at
work nor a CUDA context; a probe finds out, and ranks are spawned afresh, slowly, if not.

``python -m pretrain_agent.launcher`` is started by the supervisor and ends with it.
"""

import argparse
import json
import logging
import multiprocessing
import os
import socket
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

from pretrain_agent import rank
from pretrain_agent.link import Ready
from pretrain_agent.process import die_with_parent
from pretrain_api import names

log = logging.getLogger(__name__)

PROBE_SECONDS = 600.0  # importing the trainer may be slow on a cold disk, but not forever
PRELOAD = (
    "pretrain_agent.preload",
    "torch.distributed.elastic.multiprocessing",
    # Imported by torch.use_deterministic_algorithms() and torch.compile, for seconds in every rank.
    "torch._inductor.config",
)
# What takes seconds to import as well and only some runs use: in the section, a value other than
# these of the key asks for the module. That of torchao asks whether there are GPUs, which the
# variable below makes safe.
PRELOAD_FOR = {
    "pretrain_trainer.precision.ao": ("model", "converters", (None, [])),
    "pretrain_trainer.parallel.pipeline": ("parallelism", "pipeline_parallel_degree", (None, 1)),
}


def main(arguments: list[str]) -> None:
    """Warm the fork server, then start ranks as told until the supervisor ends this process."""
    parser = argparse.ArgumentParser(prog="pretrain_agent.launcher")
    parser.add_argument("--link", type=int, required=True, help="descriptor of the socket")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--entry-point", required=True)
    parser.add_argument("--config", required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="launcher: %(message)s", level=logging.INFO)
    die_with_parent()
    prepare_environment(options.processes)
    start_fork_server(options.entry_point, Path(options.config))
    # torch takes seconds to import; the fork server does the same at the same time
    from pretrain_agent import agent

    link = agent.Link(socket.socket(fileno=options.link))
    start_method = choose_start_method()
    link.say(Ready(start_method=start_method))
    agent.run_ranks(link, options.processes, start_method, options.entry_point, options.config)


def prepare_environment(processes: int) -> None:
    """Variables that have to be set before anything imports torch."""
    # Ranks and launcher are killed, never asked to go, and the tracker says so at length.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    # Without it, asking torch whether there is a GPU creates a context and spoils later forks.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does


def start_fork_server(entry_point: str, config: Path) -> None:
    """Start it and let it import the trainer and what the run uses of it; returns at once.

    Its socket goes to where the board is: that is removed at the end, and its path is short enough
    for a socket whatever the temporary directory is.
    """
    module = entry_point.partition(":")[0]
    multiprocessing.set_forkserver_preload([*PRELOAD, *asked_for(config), module])
    tempfile.tempdir = os.path.dirname(os.environ[names.ENV_BOARD])
    forkserver.ensure_running()
    tempfile.tempdir = None


def asked_for(config: Path) -> list[str]:
    """Modules of :data:`PRELOAD_FOR` that a run uses. A file that can't be read is left to it."""
    try:
        sections = json.loads(config.read_bytes())
        return [
            module
            for module, (section, key, without) in PRELOAD_FOR.items()
            if sections.get(section, {}).get(key) not in without
        ]
    except (OSError, ValueError, AttributeError):
        return []


def choose_start_method() -> str:
    """Wait until the fork server has imported everything, and check that its forks are usable."""
    context = multiprocessing.get_context("forkserver")
    try:
        process = context.Process(target=rank.probe)
        process.start()
        process.join(PROBE_SECONDS)
        code = process.exitcode
    except (OSError, EOFError) as error:
        code = repr(error)
    if code == 0:
        return "forkserver"
    if code == rank.CUDA_INITIALIZED:
        log.warning("importing the trainer initialises CUDA: restarts of ranks will be slow")
    else:
        log.warning("the fork server does not work (%s): restarts of ranks will be slow", code)
    return "spawn"


if __name__ == "__main__":
    main(sys.argv[1:])
