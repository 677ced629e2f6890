"""The server of the pool of ranks: imports the trainer once and forks ranks on request.

Started by ``conftest.py`` as a process of its own, which imports torch before it has any thread or
group of its own; that is also how the agent starts ranks. Each line on standard input is an order
to fork the rank of that number. A rank connects back, runs one function after the other, and lives
until it fails, its connection closes, or this server is gone.
"""

import ctypes
import faulthandler
import gc
import importlib.util
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Client, Connection
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor._redistribute import (
    _gen_transform_infos,
    clear_redistribute_planner_cache,
)
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

import pretrain_trainer.train  # so that every fork has it

PR_SET_PDEATHSIG = 1


def serve(address: str) -> None:
    """Fork a rank for every line until standard input closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for ranks, so leave no zombies
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            work(Client(address), int(line))
            os._exit(0)


def work(connection: Connection, number: int) -> None:
    """Run tasks as they come: (file, function, arguments, environment) to (succeeded, result)."""
    faulthandler.enable()
    connection.send((number, os.getpid()))
    inherited = dict(os.environ)
    modules: dict[str, ModuleType] = {}
    while True:
        try:
            path, name, arguments, environment = connection.recv()
        except EOFError:
            return
        os.environ.clear()
        os.environ.update(inherited | environment)
        try:
            answer = (True, getattr(load(path, modules), name)(*arguments))
        except BaseException:  # a test may well exit
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))  # by value: no shared memory to keep alive
        tidy_up()


def load(path: str, modules: dict[str, ModuleType]) -> Any:
    """The module in a test file, which belongs to no package."""
    if path not in modules:
        spec = importlib.util.spec_from_file_location(f"rank_{len(modules)}", path)
        assert spec is not None
        assert spec.loader is not None
        modules[path] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = modules[path]
        spec.loader.exec_module(modules[path])
    return modules[path]


def tidy_up() -> None:
    """Leave nothing of one test to the next."""
    if dist.is_initialized():
        dist.destroy_process_group()
    # What DTensor remembers of a mesh it finds again for another that looks the same, whose groups
    # have other names.
    _clear_sharding_prop_cache()
    _gen_transform_infos.cache_clear()
    clear_redistribute_planner_cache()
    torch.use_deterministic_algorithms(False)
    gc.enable()
    gc.collect()


if __name__ == "__main__":
    assert pretrain_trainer.train
    serve(sys.argv[1])
