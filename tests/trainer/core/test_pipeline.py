"""Cutting a model into stages, and what makes a pipeline impossible."""

import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain_api.config import RunConfig
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_api.wire import ExitCode, Order
from pretrain_trainer import step as step_module
from pretrain_trainer.alive import unwatched
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.init import initialise
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.parallel.order import read_order
from pretrain_trainer.parallel.pipeline import Plan, backward_at_once
from pretrain_trainer.parallel.stages import by_cost, by_hand, by_layers, cut
from pretrain_trainer.settings import Place
from pretrain_trainer.supervision import Supervision
from pretrain_trainer.trainer import build_trainer
from pretrain_trainer.world import joined_world

Ranks = Callable[..., Any]
Run = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]

CPU = torch.device("cpu")
SHAPE = LlamaShape(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32)
NAMES = ("tok_embeddings", "layers.0", "layers.1", "layers.2", "layers.3", "norm", "output")
STAGES = (NAMES[:3], NAMES[3:4], NAMES[4:])
PIPELINE: dict[str, Any] = {
    "training": {"local_batch_size": 2},
    "parallelism": {"pipeline_parallel_degree": 2},
}


def whole() -> Llama3:
    with torch.device("meta"):
        return Llama3(SHAPE, seq_len=8)


def filled(model: Llama3) -> Llama3:
    model.to_empty(device=CPU)
    initialise(model, 3, CPU)
    return model


def test_units_are_split_by_what_they_cost() -> None:
    costs = dict(zip(NAMES, (0, 10, 10, 10, 10, 1, 25), strict=True))
    assert by_cost(costs, 2) == (NAMES[:4], NAMES[4:])
    assert by_cost(costs, 3) == (NAMES[:3], NAMES[3:5], NAMES[5:])
    assert by_cost(costs, 6) == (*((name,) for name in NAMES[:5]), NAMES[5:])
    with pytest.raises(BadInputError, match="7 stages can't share a model that comes in 6 pieces"):
        by_cost(costs, 7)


def test_costs_are_those_of_the_whole_model() -> None:
    model = whole()
    assert tuple(model.costs()) == NAMES
    assert sum(model.costs().values()) == model.flops_per_token()
    parts = [cut(model, names) for names in STAGES]
    assert sum(part.flops_per_token() for part in parts) == model.flops_per_token()


def test_layers_are_split_by_number() -> None:
    assert by_layers(NAMES, (0, 3, 1)) == (NAMES[:1], NAMES[1:4], NAMES[4:])
    assert by_layers(NAMES, (4, 0)) == (NAMES[:5], NAMES[5:])


def test_what_is_named_by_hand_is_taken_as_it_is() -> None:
    assert by_hand(NAMES, STAGES) == STAGES


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ((NAMES[:5],), "after layers.3 comes nothing instead of norm"),
        ((NAMES[1:],), "first comes layers.0 instead of tok_embeddings"),
        ((NAMES[:3], NAMES[4:]), "after layers.1 comes layers.3 instead of layers.2"),
        ((NAMES[:3], NAMES[2:]), "after layers.1 comes layers.1 instead of layers.2"),
        ((NAMES, ("layers.4",)), "after output comes layers.4 instead of nothing"),
        ((NAMES[:3], (), NAMES[3:]), "part 1 is empty; name its modules"),
    ],
)
def test_what_is_named_by_hand_must_be_the_model(
    stages: tuple[tuple[str, ...], ...], sentence: str
) -> None:
    with pytest.raises(BadInputError, match="module_fqns_per_model_part: ") as caught:
        by_hand(NAMES, stages)
    assert sentence in str(caught.value)


def test_parts_one_after_the_other_are_the_model() -> None:
    model = whole()
    parts = [filled(cut(model, names)) for names in STAGES]
    model = filled(model)
    theirs = dict(chain.from_iterable(part.named_parameters() for part in parts))
    for name, parameter in model.named_parameters():
        assert torch.equal(theirs.pop(name), parameter), name
    assert not theirs
    tokens = torch.arange(16).view(2, 8)
    stream = tokens
    for part in parts:
        stream = part(stream)
    assert torch.equal(stream, model(tokens))


def test_a_part_takes_positions() -> None:
    first, *rest = (filled(cut(whole(), names)) for names in STAGES)
    tokens, positions = torch.arange(6).view(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    stream = first(tokens, positions=positions)
    for part in rest:
        stream = part(stream, positions=positions)
    expected = filled(whole())(tokens, positions=positions)
    assert torch.equal(stream, expected)


def test_one_matrix_cannot_be_at_both_ends() -> None:
    model = whole()
    assert model.tok_embeddings is not None
    assert model.output is not None
    model.output.weight = model.tok_embeddings.weight
    with pytest.raises(BadInputError, match="embedding and output of this model are one matrix"):
        cut(model, NAMES[:3])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0F0,0B0\n", "has something to do for 1 ranks, but .*_degree is 2"),
        ("0F0,0B0\n\n,,\n", "has something to do for 1 ranks"),
        ("0F0,0B0\n1F0,forward\n", "can't be read as a schedule: Invalid action string: forward"),
    ],
)
def test_a_file_must_be_a_schedule(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "order.csv"
    path.write_text(text)
    with pytest.raises(BadInputError, match=sentence):
        read_order(path, 2)
    with pytest.raises(BadInputError, match="No such file"):
        read_order(tmp_path / "another.csv", 2)


@pytest.mark.parametrize(
    "text",
    [
        "0F0,0B0\n1F0,1B0\n",  # one microbatch of two
        "0B0,0F0,0F1,0B1\n1F0,1B0,1F1,1B1\n",  # backward before forward
        "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n",  # each rank waits for the other
    ],
)
def test_an_order_that_cannot_be_followed_is_refused(
    run: Run, run_config: MakeConfig, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "order.csv"
    path.write_text(text)
    layout = PIPELINE["parallelism"] | {"pipeline_parallel_schedule_csv": str(path)}
    assert run(2, run_config(**PIPELINE | {"parallelism": layout})).code == ExitCode.CONFIG


def test_a_file_and_the_modules_named_by_hand_agree_on_stages(
    run: Run, run_config: MakeConfig
) -> None:
    stages = (("tok_embeddings",), ("layers.0",), ("layers.1",), ("norm", "output"))
    layout = PIPELINE["parallelism"] | {
        "pipeline_parallel_schedule_csv": str(Path(__file__).with_name("schedule.csv")),
        "module_fqns_per_model_part": stages,
    }
    assert run(2, run_config(**PIPELINE | {"parallelism": layout})).code == ExitCode.CONFIG


@pytest.mark.parametrize(
    ("sections", "at_once"),
    [
        ({}, False),
        ({"activation_checkpoint": {"mode": "full"}}, True),
        ({"compile": {"enable": True}}, True),
        ({"parallelism": {"fsdp_reshard_after_forward": "always"}}, True),
    ],
)
def test_a_backward_pass_is_split_where_its_graph_stays(
    run_config: MakeConfig, sections: dict[str, Any], at_once: bool
) -> None:
    def decided(schedule: str) -> bool:
        layout = {"pipeline_parallel_schedule": schedule, **sections.get("parallelism", {})}
        config = run_config(**sections | {"parallelism": layout})
        return backward_at_once(Plan(STAGES, (0,), width=32), config)

    assert decided("ZBVZeroBubble") == at_once
    assert not decided("1F1B")


def one_step(config: RunConfig) -> dict[str, Any]:
    """What a rank sees of a second step, without ever sending a pickle."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import CommDebugMode

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle travels")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "send_object_list", refuse)
        patch.setattr(dist, "recv_object_list", refuse)
        with joined_world(config, Place.from_environment(os.environ)) as world:
            trainer = build_trainer(config, world, Supervision(world.place))
            machine = trainer.machine
            losses: list[Tensor] = []
            for _ in range(2):
                data = step_module.fetch(machine.loader, unwatched)
                with CommDebugMode() as seen:
                    report = step_module.run_step(
                        machine, trainer.state, config.training, Order.NONE, data
                    )
                assert report is not None
                losses.append(report.loss)
            machine.loader.close()
            counts = {str(name): calls for name, calls in seen.get_comm_counts().items()}
            return {
                "reductions": sum(n for name, n in counts.items() if "reduce_scatter" in name),
                "loss": float(losses[-1]),
                "norm": report.grad_norm,
                "flops": trainer.telemetry._flops_per_token,
            }


def test_only_the_last_stage_has_a_loss_and_gradients_are_reduced_once(
    ranks: Ranks, run_config: MakeConfig
) -> None:
    def steps(local_batch_size: int) -> list[dict[str, Any]]:
        training = {"local_batch_size": local_batch_size, "global_batch_size": 8}
        return ranks(4, one_step, run_config(**PIPELINE | {"training": training}))

    accumulated, at_once = steps(2), steps(4)
    (alone,) = ranks(1, one_step, run_config(training={"global_batch_size": 8}))
    for seen, reference in zip(accumulated, at_once, strict=True):
        assert seen["reductions"] == reference["reductions"] > 0
        assert seen["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        assert seen["flops"] == alone["flops"]
    assert [seen["loss"] > 0 for seen in accumulated] == [False, False, True, True]
    assert sum(seen["loss"] for seen in accumulated) == pytest.approx(alone["loss"], rel=1e-5)
