"""A trainer small enough to start in milliseconds: counts steps, agrees on them with all_reduce.

Run by real ranks under the real supervisor. Its config is JSON: ``state`` (a folder), ``steps``,
``step_seconds``, ``save_every`` and ``faults``, each with ``rank``, ``step`` and ``do``, and if
need be ``phase`` (a step's by default), ``once`` and ``seconds``. Every rank notes its start in
``state/starts``, one line of JSON each.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain_agent.board import Board
from pretrain_api import names
from pretrain_api.wire import Order, Phase, Progress

ACTIONS = {
    "raise": lambda: (_ for _ in ()).throw(ValueError("the toy is broken")),
    "config": lambda: sys.exit("never reached") if False else _say_and_exit(78),
    "exit 7": lambda: sys.exit(7),
    "exit 0": lambda: sys.exit(0),
    "vanish": lambda: os._exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "deafen": lambda: signal.signal(signal.SIGTERM, lambda *_: None),
    "hang": lambda: time.sleep(3600),
    "abort": os.abort,
}


def _say_and_exit(code: int) -> None:
    print("run.json: the toy does not like its configuration", file=sys.stderr)
    sys.exit(code)


def main(config_path: str) -> None:
    """Count to ``steps`` together with all other ranks."""
    config = json.loads(Path(config_path).read_text())
    state = Path(config["state"])
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    board = Board.open(Path(os.environ[names.ENV_BOARD]))
    _note_start(state, rank)
    dist.init_process_group("gloo", timeout=timedelta(seconds=config.get("timeout", 60)))
    saved = state / "step"
    step = int(saved.read_text()) if saved.exists() else 0
    print(f"toy starts at step {step}")
    first = step
    while step < config["steps"]:
        board.publish(local_rank, Phase.DATA, step)
        _fail_as_planned(config, state, rank, step + 1, Phase.DATA)
        board.publish(local_rank, Phase.FIRST_STEP if step == first else Phase.STEP, step)
        _fail_as_planned(config, state, rank, step + 1, Phase.STEP)
        votes = torch.tensor([1, int(board.order is Order.DRAIN)])
        dist.all_reduce(votes)
        assert votes[0] == dist.get_world_size()
        step += 1
        if rank == 0:
            partial = state / "step.partial"
            partial.write_text(str(step))
            partial.rename(saved)
            board.put_progress(Progress(step=step, steps=config["steps"], loss=1.0 / step))
        if votes[1] or step % config.get("save_every", config["steps"] + 1) == 0:
            board.publish(local_rank, Phase.SAVE, step)
            _fail_as_planned(config, state, rank, step, Phase.SAVE)
            time.sleep(config.get("save_seconds", 0))
            dist.barrier()
        if votes[1]:
            sys.exit(143)
        time.sleep(config.get("step_seconds", 0.01))
    if not config.get("forget_marker"):
        board.publish(local_rank, Phase.DONE, step)
    dist.destroy_process_group()


def _note_start(state: Path, rank: int) -> None:
    note = {
        "rank": rank,
        "pid": os.getpid(),
        "world": int(os.environ["WORLD_SIZE"]),
        "generation": int(os.environ[names.ENV_GENERATION]),
        "round": int(os.environ[names.ENV_ROUND]),
        "time": time.monotonic(),
    }
    with (state / "starts").open("a") as file:
        file.write(json.dumps(note) + "\n")


def _fail_as_planned(config: dict, state: Path, rank: int, step: int, phase: Phase) -> None:
    for number, fault in enumerate(config.get("faults", ())):
        here = (fault["rank"], fault["step"], fault.get("phase", Phase.STEP))
        if here != (rank, step, phase):
            continue
        marker = state / f"fault-{number}"
        if fault.get("once") and marker.exists():
            continue
        marker.touch()
        if fault["do"] == "sleep":
            time.sleep(fault["seconds"])
        else:
            ACTIONS[fault["do"]]()
