"""Several ranks: sharded state, other world sizes, and one rank's trouble told to all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pretrain_trainer.checkpoint import digest
from pretrain_trainer.checkpoint.errors import (
    CheckpointConfigError,
    CheckpointError,
    FencedError,
    SaveFailedError,
)
from pretrain_trainer.checkpoint.peers import Peers
from pretrain_trainer.checkpoint.root import Identity, Root
from pretrain_trainer.checkpoint.verify import verified


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "checkpoint"


def sharded(mesh: tuple[int, ...], seed: int) -> dict[str, Any]:
    """A model and something like AdamW's state, FSDP or (two dimensions) HSDP."""
    torch.manual_seed(seed)
    # 7 and 3 rows: uneven shards, and ranks that hold nothing of a tensor.
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    names = ("replicate", "shard") if len(mesh) == 2 else ("shard",)
    fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
    moments = {
        name: {"exp_avg": weight / 2, "exp_avg_sq": weight * weight, "step": torch.tensor(1.0)}
        for name, weight in model.state_dict().items()
    }
    return {
        "model": model.state_dict(),
        "optimizer": moments,
        "train_state": {"step": torch.tensor(seed)},
        "ledger": torch.full((5,), seed),
    }


def whole(state: Any) -> Any:
    """The state as plain numbers, put together from all ranks."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    full = state.full_tensor() if isinstance(state, DTensor) else state
    return full.detach().tolist()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4,), (2,)),
        ((2,), (1,)),
        ((1,), (3,)),
        ((2, 2), (4,)),
        ((3,), (2, 2)),
    ],
    ids=["4 to 2", "2 to 1", "1 to 3", "HSDP to FSDP", "FSDP to HSDP"],
)
def test_what_one_layout_saved_another_loads(run_ranks, manager, root, tmp_path, before, after):
    def save(rank: int) -> Any:
        state = sharded(before, 1)
        report = manager().save(10, state)
        assert report.bytes > 0
        return whole(state)

    def load(rank: int) -> Any:
        state = sharded(after, 2)
        saver = manager(generation=2)
        assert saver.load(state).step == 10
        saver.save(11, state)
        return whole(state)

    saved = run_ranks(torch.Size(before).numel(), save)[0]
    loaded = run_ranks(torch.Size(after).numel(), load)
    assert all(each == saved for each in loaded)
    # The digest doesn't see the layout, and torch's tool puts the same tensors together.
    assert digest.digests(root / "step-10") == digest.digests(root / "step-11")
    dcp_to_torch_save(root / "step-10", tmp_path / "out.pt")
    assert whole(torch.load(tmp_path / "out.pt", weights_only=True)) == saved


def test_replicas_are_stored_once(run_ranks, manager, root):
    def save(mesh: tuple[int, ...], step: int) -> Callable[[int], int]:
        return lambda rank: manager(generation=step).save(step, sharded(mesh, 1)).bytes

    (one,) = run_ranks(1, save((1,), 1))
    many = run_ranks(4, save((4, 1), 2))
    names = {path.name for path in (root / "step-2").iterdir()}
    assert names == {".metadata", "manifest.json", *(f"__{rank}_0.distcp" for rank in range(4))}
    assert max(many) < 1.5 * one


def test_all_ranks_pass_over_what_one_rank_finds_damaged(run_ranks, manager, root):
    def save(rank: int) -> None:
        saver = manager()
        saver.save(10, sharded((3,), 1))
        saver.save(20, sharded((3,), 2))

    def load(rank: int) -> Any:
        state = sharded((3,), 3)
        report = manager(generation=2).load(state)
        return report.step, [each.reason for each in report.skipped], whole(state)

    def undisturbed(rank: int) -> Any:
        return whole(sharded((3,), 1))

    run_ranks(3, save)
    # Only rank 2 reads this file: each rank's own shard is in its own file.
    path = root / "step-20" / "__2_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    answers = run_ranks(3, load)

    expected = run_ranks(3, undisturbed)[0]
    assert all(step == 10 and state == expected for step, _, state in answers)
    reasons = {tuple(reasons) for _, reasons, _ in answers}
    assert len(reasons) == 1
    assert "__2_0.distcp is damaged" in reasons.pop()[0]


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_one_rank_that_cannot_write_fails_the_save_of_all(run_ranks, manager, root, call):
    def save(rank: int) -> str:
        saver = manager()
        saver.save(10, sharded((3,), 1))
        real = getattr(os, call)

        def full(*arguments: Any, **keywords: Any) -> Any:
            if call != "open" or arguments[1] & os.O_CREAT:
                raise OSError(28, "No space left on device")
            return real(*arguments, **keywords)

        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(os, call, full)
            with pytest.raises(SaveFailedError) as failed:
                saver.save(20, sharded((3,), 2))
        saver.save(30, sharded((3,), 3))  # nobody hangs, and the next save works
        return str(failed.value)

    answers = run_ranks(3, save)
    assert all(answer.startswith("step-20 was not saved: No space left") for answer in answers)
    assert sorted(path.name for path in root.glob("*step-*")) == ["step-10", "step-30"]
    for step in (10, 30):
        verified(root / f"step-{step}")


def test_a_stale_world_stops_once_a_newer_one_has_come(run_ranks, manager, root):
    """Ranks of generation 1 go on saving; generation 2 takes over, and then loads."""

    def old(rank: int) -> list[str]:
        saver = manager(generation=1)
        outcomes = []
        for step in (10, 20, 30):
            if step == 30 and rank == 0:
                Root(root, Identity("job-1", 2, "secret")).enter()
            try:
                saver.save(step, sharded((2,), step))
                outcomes.append(f"saved {step}")
            except FencedError as fenced:
                outcomes.append(f"{step}: {fenced}")
        return outcomes

    answers = run_ranks(2, old)
    assert answers[0] == answers[1]
    assert answers[0][:2] == ["saved 10", "saved 20"]
    assert "generation 2 (round 0) has taken over" in answers[0][2]
    assert sorted(path.name for path in root.glob("*step-*")) == ["step-10", "step-20"]
    (loaded,) = run_ranks(1, lambda rank: manager(generation=2).load(sharded((1,), 0)).step)
    assert loaded == 20


def test_refusals_reach_every_rank_as_the_same_error(run_ranks, manager):
    def load(rank: int) -> str:
        state = {"model": {"w": torch.zeros(3)}}
        manager().save(10, state)
        if rank == 1:
            state["model"]["extra"] = torch.zeros(1)
        with pytest.raises(CheckpointConfigError) as refused:
            manager().load(state)
        return str(refused.value)

    answers = set(run_ranks(2, load))
    assert len(answers) == 1
    assert "no tensor model.extra" in answers.pop()


def test_an_unforeseen_error_of_one_rank_is_raised_by_all(run_ranks):
    def work(rank: int) -> tuple[str, str]:
        peers = Peers(dist.group.WORLD)

        def fail() -> int:
            if rank == 1:
                raise ZeroDivisionError("a rank's own mistake")
            return rank

        with pytest.raises((CheckpointError, ZeroDivisionError)) as failed:
            peers.everywhere(fail)
        return type(failed.value).__name__, str(failed.value)

    told = "rank 1 failed: ZeroDivisionError: a rank's own mistake"
    assert run_ranks(3, work) == [
        ("CheckpointError", told),
        ("ZeroDivisionError", "a rank's own mistake"),
        ("CheckpointError", told),
    ]


def test_values_travel_as_json(run_ranks):
    def talk(rank: int) -> list[Any]:
        peers = Peers(dist.group.WORLD)
        mine = {"rank": rank, "text": "é" * (rank * 1000)}
        gathered = peers.gather(mine)
        answer = peers.broadcast([1, None, "x"] if rank == 0 else None)
        own = peers.scatter(gathered)
        return [own == mine, answer, peers.first(lambda: {"by": peers.rank}), peers.size]

    assert run_ranks(3, talk) == [[True, [1, None, "x"], {"by": 0}, 3]] * 3


def test_no_pickled_collective_is_used(run_ranks, manager, monkeypatch):
    """torch's object collectives are pickles; none of them may be called."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickled collective")

    def save_and_load(rank: int) -> int | None:
        names = ("all_gather_object", "gather_object", "broadcast_object_list")
        for name in (*names, "scatter_object_list", "send_object_list", "recv_object_list"):
            monkeypatch.setattr(torch.distributed, name, forbidden)
        saver = manager(keep_latest_k=2)
        for step in (1, 2, 3):
            saver.save(step, sharded((2,), step))
        assert saver.prune() == [1]
        return manager(generation=2).load(sharded((2,), 0)).step

    assert run_ranks(2, save_and_load) == [3, 3]
