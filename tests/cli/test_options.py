"""Options in torchtitan's manner become values of the right type."""

from collections.abc import Callable
from typing import Any

import pytest

from pretrain_cli.options import (
    OptionError,
    describe,
    keys,
    merge,
    parse_overrides,
    split_options,
)


@pytest.mark.parametrize(
    ("line", "rest", "data"),
    [
        ("run a.yaml", ["run", "a.yaml"], {}),
        (
            "run a.toml --training.steps 20 --nproc 2",
            ["run", "a.toml", "--nproc", "2"],
            {"training": {"steps": 20}},
        ),
        ("--training.steps=20", [], {"training": {"steps": 20}}),
        ("--training.local-batch-size 2", [], {"training": {"local_batch_size": 2}}),
        (
            "--parallelism.data_parallel_shard_degree -1",
            [],
            {"parallelism": {"data_parallel_shard_degree": -1}},
        ),
        ("--optimizer.lr 3e-4", [], {"optimizer": {"lr": 3e-4}}),
        ("--compile.enable", [], {"compile": {"enable": True}}),
        ("--compile.enable a.yaml", ["a.yaml"], {"compile": {"enable": True}}),
        ("--compile.enable false", [], {"compile": {"enable": False}}),
        ("--compile.no_enable a.yaml", ["a.yaml"], {"compile": {"enable": False}}),
        (
            "--checkpoint.no-initial-load-model-only",
            [],
            {"checkpoint": {"initial_load_model_only": False}},
        ),
        (
            "--checkpoint.exclude_from_loading data_loader,lr_scheduler",
            [],
            {"checkpoint": {"exclude_from_loading": ["data_loader", "lr_scheduler"]}},
        ),
        (
            "--parallelism.fsdp_reshard_after_forward 2",
            [],
            {"parallelism": {"fsdp_reshard_after_forward": 2}},
        ),
        (
            "--parallelism.fsdp_reshard_after_forward never",
            [],
            {"parallelism": {"fsdp_reshard_after_forward": "never"}},
        ),
        ("--training.seed none", [], {"training": {"seed": None}}),
        (
            "--quantize.linear.float8.filter_fqns output",
            [],
            {"quantize": {"linear": {"float8": {"filter_fqns": ["output"]}}}},
        ),
        (
            "--checkpoint.enable --checkpoint.create_seed_checkpoint "
            "--parallelism.tensor_parallel_degree 1",
            [],
            {
                "checkpoint": {"enable": True, "create_seed_checkpoint": True},
                "parallelism": {"tensor_parallel_degree": 1},
            },
        ),
        ("--training.steps ten", [], {"training": {"steps": "ten"}}),
    ],
)
def test_options(line: str, rest: list[str], data: dict[str, Any]) -> None:
    others, overrides = split_options(line.split())
    assert others == rest
    assert parse_overrides(overrides) == data


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--training.step 3", "--training.step: unknown option; did you mean --training.steps?"),
        (
            "--training.batch_size 3",
            "--training.batch_size: unknown option; did you mean --training.local_batch_size?",
        ),
        ("--zebra.stripes 3", "--zebra.stripes: unknown option"),
        ("--training 3 --training.steps", "--training.steps: needs a value"),
        ("--training.no_steps 3", "--training.no_steps: unknown option; did you mean"),
    ],
)
def test_option_sentences(line: str, sentence: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_overrides(split_options(line.split())[1])
    assert str(caught.value).startswith(sentence)


def test_options_win_over_the_file_key_by_key() -> None:
    file = {"training": {"steps": 1, "seq_len": 2}, "model": {"flavor": "8B"}}
    merged = merge(file, {"training": {"steps": 3}, "job": {"description": "d"}})
    assert merged == {
        "training": {"steps": 3, "seq_len": 2},
        "model": {"flavor": "8B"},
        "job": {"description": "d"},
    }
    assert file["training"]["steps"] == 1


def test_keys_are_paths() -> None:
    data = {"training": {"steps": 3}, "quantize": {"linear": {"float8": {"emulate": True}}}}
    assert list(keys(data)) == [
        ("training", "steps"),
        ("quantize", "linear", "float8", "emulate"),
    ]


def test_help_shows_what_works_and_nothing_else() -> None:
    text = describe()
    assert "  --training.steps\n      Number of optimizer steps of the whole run" in text
    assert "(default: 10000)" in text
    assert "fault_tolerance.enable" not in text
    assert "profile_freq" not in text
    assert "--training\n" not in text
    for line in text.splitlines():
        if line.startswith("  --"):
            assert split_options([f"{line.strip()}=1"])[1]
            assert len(line) <= 100


@pytest.mark.parametrize("command", [(), ("run",), ("validate",), ("import",)])
def test_help(pretrain: Callable[..., Any], command: tuple[str, ...]) -> None:
    outcome = pretrain(*command, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith("usage: pretrain")
