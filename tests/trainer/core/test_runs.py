"""How runs begin and end: orders, bad input, seeds, finite data, and what a start may load."""

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain_agent.board import Board
from pretrain_api import names
from pretrain_api.config import RunConfig
from pretrain_api.flavors.llama3 import FLAVORS, RopeScaling
from pretrain_api.wire import ExitCode, Order, Phase
from pretrain_trainer import train
from pretrain_trainer.checkpoint.errors import CheckpointConfigError
from pretrain_trainer.checkpoint.manager import CheckpointManager
from pretrain_trainer.checkpoint.root import Root
from pretrain_trainer.data.tokenizer import load_tokenizer
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.settings import Place, load_config
from pretrain_trainer.trainer import fingerprint, open_checkpoints

Run = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]
Saved = Callable[[RunConfig, int], dict[str, Tensor]]


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board.create(tmp_path / "board", processes=2)


@pytest.fixture
def supervised(board: Board, tmp_path: Path) -> dict[str, str]:
    """Environment of ranks that see the board."""
    assert board.processes == 2
    return {names.ENV_BOARD: str(tmp_path / "board")}


def checkpoints(config: RunConfig) -> list[str]:
    root = Path(config.job.dump_folder) / config.checkpoint.folder
    return sorted(path.name for path in root.glob("step-*"))


def test_drain_saves_on_all_ranks_and_leaves(
    run: Run, run_config: MakeConfig, board: Board, supervised: dict[str, str]
) -> None:
    config = run_config(checkpoint={"interval": 100})
    board.order = Order.DRAIN
    assert run(2, config, **supervised).code == ExitCode.PREEMPTED
    assert checkpoints(config) == ["step-1"]
    assert [beat.phase for beat in board.beats()] == [Phase.SAVE, Phase.SAVE]
    progress = board.progress()
    assert progress is not None
    assert progress.checkpoint is not None
    assert (progress.step, progress.checkpoint.step) == (1, 1)

    board.order = Order.NONE
    outcome = run(2, config, **supervised)
    assert (outcome.code, list(outcome.losses)) == (0, [2, 3, 4])
    assert [beat.phase for beat in board.beats()] == [Phase.DONE, Phase.DONE]
    progress = board.progress()
    assert progress is not None
    assert progress.checkpoint is not None
    assert (progress.step, progress.steps, progress.resumed_from) == (4, 4, 1)
    assert (progress.checkpoint.step, progress.checkpoint.path) == (4, "checkpoint/step-4")
    assert progress.first_loss != progress.loss


def run_on_a_full_volume(path: str) -> None:
    """One rank of a run whose volume has room for checkpoints no more."""

    def full(self: Root, step: int) -> Path:
        raise OSError(errno.ENOSPC, f"no room for step {step} in {self.path}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Root, "begin", full)
        train.main(path)


@pytest.mark.parametrize(("order", "failing"), [(Order.DRAIN, 1), (Order.SAVE, 4)])
def test_leaving_without_the_save_that_was_ordered_is_a_failure(
    ranks: Callable[..., Any],
    run_config: MakeConfig,
    board: Board,
    supervised: dict[str, str],
    tmp_path: Path,
    order: Order,
    failing: int,
) -> None:
    config = run_config(checkpoint={"interval": 100})
    path = tmp_path / "run.json"
    path.write_text(config.model_dump_json())
    board.order = order
    with pytest.raises(AssertionError, match=r"SaveFailedError: .*no room for step"):
        ranks(1, run_on_a_full_volume, str(path), environment=supervised)
    # A failed save alone doesn't end training: leaving after it does.
    assert (board.read(0).phase, board.read(0).step) == (Phase.SAVE, failing)


def test_an_order_to_save_is_obeyed_once(
    run: Run, run_config: MakeConfig, board: Board, supervised: dict[str, str]
) -> None:
    config = run_config(checkpoint={"interval": 100})
    board.order = Order.SAVE
    assert run(1, config, **supervised).code == 0
    assert checkpoints(config) == ["step-1", "step-4"]


def test_stop_leaves_at_once(
    run: Run, run_config: MakeConfig, board: Board, supervised: dict[str, str]
) -> None:
    config = run_config()
    board.order = Order.STOP
    assert run(2, config, **supervised).code == ExitCode.PREEMPTED
    assert checkpoints(config) == []


BAD_INPUT: dict[str, tuple[int, dict[str, dict[str, Any]], str]] = {
    "unknown model": (1, {"model": {"name": "llama9"}}, "there is no model 'llama9'"),
    "missing tokenizer": (1, {"model": {"hf_assets_path": "/nowhere"}}, "/nowhere is no folder"),
    "missing data": (1, {"training": {"dataset_path": "/nowhere"}}, "/nowhere"),
    "batch not divisible": (2, {"training": {"global_batch_size": 3}}, "use -1 or 2 or 4"),
    "impossible degree": (
        2,
        {"parallelism": {"data_parallel_shard_degree": 3}},
        "2 ranks; use -1 or 2",
    ),
    "asynchronous tensor parallelism without GPUs": (
        2,
        {
            "parallelism": {"tensor_parallel_degree": 2, "enable_async_tensor_parallel": True},
            "compile": {"enable": True},
        },
        "parallelism.enable_async_tensor_parallel: needs GPUs",
    ),
    "seed on several ranks": (
        2,
        {"checkpoint": {"create_seed_checkpoint": True}},
        "needs checkpoint.enable and a single process",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence_and_final(
    run: Run, run_config: MakeConfig, board: Board, supervised: dict[str, str], name: str
) -> None:
    size, changes, sentence = BAD_INPUT[name]
    assert run(size, run_config(**changes), **supervised).code == ExitCode.CONFIG
    failure = board.failures()[0]
    assert sentence in failure.message
    assert "\n" not in failure.message
    assert (failure.reason, failure.exit_code, failure.rank) == ("Config", ExitCode.CONFIG, 0)


def test_configuration_errors_name_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(BadInputError, match=r"run\.json: can't read the configuration: No"):
        load_config(path)
    path.write_text('{"training": {"dataset": "text", "seqlen": 3}}')
    with pytest.raises(BadInputError, match=r"run\.json: training\.seqlen: .*seq_?[lL]en|Extra"):
        load_config(path)


def test_finite_data_ends_the_run_cleanly(
    run: Run, run_config: MakeConfig, board: Board, supervised: dict[str, str], saved: Saved
) -> None:
    config = run_config(training={"steps": 10_000, "epochs": 1}, checkpoint={"interval": 1000})
    outcome = run(2, config, **supervised)
    assert outcome.code == 0
    last = max(outcome.losses)
    assert 4 < last < 1000
    assert checkpoints(config) == [f"step-{last}"]
    assert board.read(0).phase == Phase.DONE
    assert saved(config, last)["train_state.step"] == last
    assert run(2, config, **supervised).losses == {}  # started again, there is nothing left
    assert board.read(0).phase == Phase.DONE


def test_last_save_of_weights_alone(
    run: Run, run_config: MakeConfig, saved: Saved, board: Board, supervised: dict[str, str]
) -> None:
    options = {"last_save_model_only": True, "export_dtype": "bfloat16"}
    config = run_config(checkpoint=options)
    run(1, config)
    weights = saved(config, 4)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert "layers.0.attention.wq.weight" in weights
    again = run(1, config, **supervised)
    assert (again.code, again.losses) == (0, {})
    progress = board.progress()
    assert progress is not None
    assert progress.step == 4
    longer = run_config(checkpoint=options, training={"steps": 9})
    assert run(1, longer, **supervised).code == ExitCode.CONFIG
    assert "step-4, holds only weights" in board.failures()[0].message


def test_seed_checkpoint_starts_other_layouts(run: Run, run_config: MakeConfig) -> None:
    seed = run_config(checkpoint={"create_seed_checkpoint": True})
    assert run(1, seed).code == 0
    assert checkpoints(seed) == ["step-0"]
    # Another seed of the run would start elsewhere, if the weights weren't loaded.
    started = run(2, run_config())
    other = run_config(job={"dump_folder": seed.job.dump_folder + "-other"})
    assert started.losses == pytest.approx(run(1, other).losses, rel=1e-5)
    assert list(started.losses) == [1, 2, 3, 4]


def test_a_seed_after_damaged_steps_starts_like_the_seed_alone(
    run: Run, run_config: MakeConfig
) -> None:
    config = run_config(checkpoint={"create_seed_checkpoint": True})
    run(1, config)
    undisturbed = run(2, run_config())
    for step in ("step-2", "step-4"):  # rank 0's half is good and is filled in before it is known
        half = Path(config.job.dump_folder) / "checkpoint" / step / "__1_0.distcp"
        data = bytearray(half.read_bytes())
        data[len(data) // 2] ^= 1
        half.write_bytes(data)
    assert run(2, run_config()).losses == undisturbed.losses


def test_initial_weights_of_another_run(run: Run, run_config: MakeConfig, saved: Saved) -> None:
    first = run_config()
    run(1, first)
    source = Path(first.job.dump_folder) / "checkpoint" / "step-4"
    second = run_config(
        job={"dump_folder": first.job.dump_folder + "-second"},
        checkpoint={"initial_load_path": str(source), "enable_first_step_checkpoint": True},
        optimizer={"lr": 0.0},
    )
    outcome = run(2, second)
    assert list(outcome.losses) == [1, 2, 3, 4]
    assert checkpoints(second) == ["step-1", "step-2", "step-4"]
    ours, theirs = saved(second, 4), saved(first, 4)
    name = "model.output.weight" if "model.output.weight" in ours else "output.weight"
    assert torch.equal(ours[name], theirs[name])


def test_options_of_a_beginning_apply_to_the_first_start_only(
    run: Run, run_config: MakeConfig
) -> None:
    config = run_config(training={"steps": 6})
    run(1, config)
    again = run_config(training={"steps": 6}, checkpoint={"load_step": 2, "load_only": True})
    assert list(run(1, again).losses) == [3, 4, 5, 6]
    replaced_pod = {names.ENV_GENERATION: "2", names.ENV_NAMESPACE: "team"}
    restarted = run(1, again, **replaced_pod)
    assert restarted.losses == {}  # the newest, which is the last
    fresh_data = run_config(
        training={"steps": 6},
        checkpoint={"load_step": 4, "load_only": True, "exclude_from_loading": ["data_loader"]},
    )
    assert run(1, fresh_data).losses.keys() == {5, 6}


def test_a_rolled_back_run_saves_what_it_trains(
    run: Run, run_config: MakeConfig, board: Board, supervised: dict[str, str], saved: Saved
) -> None:
    run(1, run_config(training={"steps": 6}))
    back = run_config(training={"steps": 6}, checkpoint={"load_step": 2}, optimizer={"lr": 1e-4})
    before = saved(back, 6)
    assert run(1, back, **supervised).code == ExitCode.CONFIG
    assert "newer checkpoints (step-6, step-4)" in board.failures()[0].message

    root = Path(back.job.dump_folder) / "checkpoint"
    for step in (4, 6):
        (root / f"step-{step}").rename(root / f"abandoned-{step}")
    assert list(run(1, back).losses) == [3, 4, 5, 6]
    assert checkpoints(back) == ["step-2", "step-4", "step-6"]
    assert not torch.equal(saved(back, 6)["model.output.weight"], before["model.output.weight"])


@pytest.mark.parametrize(
    ("shape", "other", "part"),
    [
        ({"rope_theta": 10_000.0}, {}, r"model\.rope_theta \(500000\.0 instead of 10000\.0\)"),
        ({"n_heads": 8, "n_kv_heads": 4}, {}, r"model\.n_heads"),
        ({"norm_eps": 1e-6}, {}, r"model\.norm_eps"),
        ({"rope_scaling": RopeScaling(factor=32.0)}, {}, r"model\.rope_scaling\.factor"),
        ({}, {"mask": "block_causal"}, r"model\.attn_mask_type \(causal instead of block_causal\)"),
        ({}, {"digest": "of another one"}, "tokenizer"),
    ],
)
def test_a_model_of_equal_shapes_but_another_meaning_is_refused(
    run_config: MakeConfig, shape: dict[str, Any], other: dict[str, str], part: str
) -> None:
    def opened(
        mask: str = "causal", digest: str | None = None, **changed: Any
    ) -> tuple[CheckpointManager, dict[str, Any]]:
        config = run_config(model={"attn_mask_type": mask})
        tokenizer = load_tokenizer(config.model.hf_assets_path)
        tokenizer.digest = digest or tokenizer.digest
        small = dataclasses.replace(FLAVORS["tiny"], vocab_size=64, **changed)
        model = Llama3(small, seq_len=8)
        checkpoints = open_checkpoints(config, Place(), fingerprint(model, tokenizer, config))
        assert checkpoints is not None
        return checkpoints, {"model": dict(model.state_dict())}

    checkpoints, state = opened()
    checkpoints.save(1, state)
    checkpoints, state = opened()
    assert checkpoints.load(state).step == 1

    checkpoints, state = opened(**other, **shape)
    with pytest.raises(CheckpointConfigError, match=f"step-1 was made with another {part}"):
        checkpoints.load(state)


def test_place_without_torchrun_and_agent() -> None:
    place = Place.from_environment({})
    assert (place.rank, place.world_size, place.board, place.first_start) == (0, 1, None, True)
    assert place.saved_step is None
    assert Place.from_environment({names.ENV_SAVED_STEP: "0"}).saved_step == 0


@pytest.mark.parametrize(
    ("generation", "round_", "namespace", "first"),
    [
        ("1", "0", "team", True),
        ("2", "0", "team", False),  # a pod was replaced
        ("1", "1", "team", False),  # a rank was restarted
        ("1795229036", "0", "", True),  # a person at a terminal, again
        ("1795229036", "1", "", False),
    ],
)
def test_recoveries_are_no_first_starts(
    generation: str, round_: str, namespace: str, first: bool
) -> None:
    environment = {
        names.ENV_GENERATION: generation,
        names.ENV_ROUND: round_,
        names.ENV_NAMESPACE: namespace,
    }
    assert Place.from_environment(environment).first_start == first


@pytest.mark.parametrize("flavor", ["debugmodel"])
def test_defaults_of_torchtitan_train_on_a_cpu(
    run: Run, run_config: MakeConfig, flavor: str
) -> None:
    config = run_config(
        model={"flavor": flavor},
        training={"steps": 2, "mixed_precision_param": "bfloat16"},
        activation_checkpoint={"mode": "selective", "selective_ac_option": "op"},
        checkpoint={"enable": False},
    )
    assert list(run(1, config).losses) == [1, 2]
