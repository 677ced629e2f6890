"""Joining the world: device, process group, mesh; and leaving it in order.

Two groups span the whole world. Gradients travel in torch's default group, over nccl where there is
a GPU, and once training runs a rank that is a minute late with them has a problem. What ranks have
to tell each other on the host (what a step consists of, everything about checkpoints) travels in a
control group over gloo: there a rank may be late because its data is, or its storage, and that is
no problem at all. So the two have different timeouts.

Nothing here happens at import, because the fork server that imports this module must not touch a
device.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed import (
    HashStore,  # pyright: ignore[reportPrivateImportUsage]  # public, but not listed
    distributed_c10d,
)

from pretrain_api.config import RunConfig
from pretrain_api.mesh import BatchPlan, MeshError, batch_plan, resolve
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.parallel.mesh import Mesh, build_mesh
from pretrain_trainer.settings import Place

GPU_FILES: Final = Path("/dev")

# Slow data and slow storage are no failures: ranks wait this long for each other. A peer that dies
# is noticed at once, because its connection closes; one that hangs is the supervisor's to find, in
# the age of its last beat. This is for runs without one.
CONTROL_TIMEOUT: Final = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class World:
    """This rank's device, its place in the mesh, and the group in which ranks talk on the host."""

    place: Place
    device: torch.device
    mesh: Mesh
    control: dist.ProcessGroup
    plan: BatchPlan


@contextmanager
def joined_world(config: RunConfig, place: Place) -> Iterator[World]:
    """Join all ranks of the run for the duration of the block. Collective.

    The process group is destroyed only on the way out without an error: after one, peers may be
    gone, and waiting for them would hide it.

    Raises:
        BadInputError: degrees or batch sizes don't fit the number of ranks.
    """
    try:
        degrees = resolve(config.parallelism, place.world_size)
        plan = batch_plan(config, place.world_size)
    except MeshError as error:
        raise BadInputError(str(error)) from error
    device = own_device(place)
    make_deterministic(config.training.deterministic)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=place.rank,
        world_size=place.world_size,
        # A rank alone needs no peers to find; with peers, torchrun says where they meet.
        store=HashStore() if place.world_size == 1 else None,
        timeout=timedelta(seconds=config.comm.init_timeout_seconds),
    )
    mesh = build_mesh(degrees, device)
    set_timeouts(mesh, config.comm.init_timeout_seconds)  # new groups have the backend's own
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    assert isinstance(control, dist.ProcessGroup), "every rank is a member"
    yield World(place, device, mesh, control, plan)
    dist.destroy_process_group()


def own_device(place: Place) -> torch.device:
    """This rank's GPU, or the CPU where there is none; becomes the current device.

    Raises:
        BadInputError, RuntimeError: as :func:`choose_device` does.
    """
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = choose_device(place, usable, gpus_expected(os.environ, GPU_FILES))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_device(place: Place, usable: int, expected: bool) -> torch.device:
    """Decide where this rank computes: a GPU of its own, or the CPU on a machine without any.

    Args:
        place: how many ranks share the machine.
        usable: GPUs that torch can use.
        expected: this machine was given GPUs.

    Raises:
        BadInputError: there are GPUs, but fewer than ranks.
        RuntimeError: GPUs were given and can't be used. A driver that fails may work again after a
            restart or on another machine, so this may be retried.
    """
    if not usable and expected:
        raise RuntimeError(
            "this machine was given GPUs, but torch can't use any: check that driver and torch fit "
            "each other (nvidia-smi, torch.version.cuda); to train on the CPU nonetheless set "
            "CUDA_VISIBLE_DEVICES to an empty string"
        )
    if not usable:
        return torch.device("cpu")
    if place.local_world_size > usable:
        raise BadInputError(
            f"workers.processesPerWorker: {place.local_world_size} processes need a GPU each, but "
            f"there are {usable}; use {usable}, or ask for more GPUs in workers.resources"
        )
    return torch.device("cuda", place.local_rank)


def gpus_expected(environment: Mapping[str, str], files: Path) -> bool:
    """Whether somebody gave this machine NVIDIA GPUs, whatever torch thinks of it.

    Args:
        environment: NVIDIA_VISIBLE_DEVICES is what container runtimes and device plugins set.
            ``all`` says nothing, because CUDA images carry it to machines without a GPU as well. An
            empty CUDA_VISIBLE_DEVICES hides all GPUs on purpose.
        files: folder of the device files.
    """
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    given = environment.get("NVIDIA_VISIBLE_DEVICES", "")
    return given not in ("", "void", "none", "all") or any(files.glob("nvidia[0-9]*"))


def make_deterministic(enabled: bool) -> None:
    """Let torch use only kernels that repeat bit for bit, even where they are slower."""
    if enabled:
        # cuBLAS reads this when its handle is made, which is after this point.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(enabled)


def set_timeouts(mesh: Mesh, seconds: int) -> None:
    """How long collectives of gradients and activations may take from now on.

    Not those of the control group, in which ranks wait for data and for storage.
    """
    # Public since torch 2.15, deprecated under its old name there.
    change = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in (dist.group.WORLD, *mesh.groups()):
        change(timedelta(seconds=seconds), group)
