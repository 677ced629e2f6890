"""RunConfig reads torchtitan's vocabulary, strictly and in both spellings."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_snake

from pretrain_api.config import RunConfig
from pretrain_api.flavors import llama3
from pretrain_api.support import REFINEMENTS, UNBUILT

VOCABULARY = json.loads(Path(__file__).with_name("torchtitan_vocabulary.json").read_text())

# Where our default is another, and why.
OTHER_DEFAULTS = {
    "job.dump_folder": "ours is ./outputs, as in the examples people copy",
    "training.dataset": "required: a sample that isn't ours can't be the default",
    "comm.trace_buf_size": "the recorder isn't built, so it is off",
    "parallelism.pipeline_parallel_first_stage_less_layers": "unset splits by cost",
    "parallelism.pipeline_parallel_last_stage_less_layers": "unset splits by cost",
}
READERS = ("trainer", "operator", "cli")
OUR_KEYS = {
    "model.attn_mask_type",  # a property of flavors there
    "schema_version",
    "training.data_streams",
    "training.epochs",
    "training.non_finite",
}


def minimal(**sections: dict[str, Any]) -> dict[str, Any]:
    training = {"dataset": "text", "dataset_path": "data", **sections.pop("training", {})}
    return {"training": training, **sections}


def messages(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(data)
    return [
        f"{to_snake('.'.join(map(str, error['loc'])))}: {error['msg']}"
        for error in caught.value.errors()
    ]


def leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted path and default of every key."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, (*path, name))
        else:
            yield ".".join((*path, name)), field.get_default(call_default_factory=True)


OURS = dict(leaves(RunConfig))


def test_every_key_of_torchtitan_is_known_and_no_other_but_ours() -> None:
    assert set(OURS) - set(VOCABULARY) == OUR_KEYS
    assert set(VOCABULARY) - set(OURS) == set()


@pytest.mark.parametrize("key", sorted(set(VOCABULARY) - set(OTHER_DEFAULTS)))
def test_default_is_torchtitans(key: str) -> None:
    ours = OURS[key]
    assert (list(ours) if isinstance(ours, tuple) else ours) == VOCABULARY[key]


@pytest.mark.parametrize("key", sorted(OTHER_DEFAULTS))
def test_exceptions_are_still_exceptions(key: str) -> None:
    assert OURS[key] != VOCABULARY[key]


def test_no_key_does_nothing(repository: Path) -> None:
    """What is accepted is read by somebody, or refused at any value that would ask for more."""
    files = [file for name in READERS for file in (repository / name).rglob("*.py")]
    files += (repository / "api/pretrain_api/mesh").glob("*.py")
    code = "\n".join(file.read_text() for file in files)
    unread = {key for key in OURS if not re.search(rf"\.{key.rsplit('.')[-1]}\b", code)}
    explained = REFINEMENTS | {entry.path for entry in UNBUILT} | {"schema_version"}
    assert unread <= explained


def test_tables_name_real_keys_once() -> None:
    paths = [entry.path for entry in UNBUILT]
    assert len(paths) == len(set(paths))
    assert not REFINEMENTS & set(paths)
    assert set(OURS) >= REFINEMENTS | set(paths)


def test_both_spellings_are_read_and_snake_case_is_written() -> None:
    camel = RunConfig.model_validate(
        {"training": {"dataset": "text", "datasetPath": "data", "seqLen": 64}}
    )
    snake = RunConfig.model_validate(minimal(training={"seq_len": 64}))
    assert camel == snake
    assert '"seq_len":64' in snake.model_dump_json()


def test_json_round_trip_keeps_everything() -> None:
    data = minimal(
        parallelism={"fsdp_reshard_after_forward": 2},
        checkpoint={"exclude_from_loading": ["optimizer"]},
        compile={"components": ["loss"]},
    )
    first = RunConfig.model_validate(data)
    assert RunConfig.model_validate_json(first.model_dump_json()) == first


def test_config_is_frozen_and_hashable() -> None:
    run = RunConfig.model_validate(minimal())
    with pytest.raises(ValidationError):
        run.training.steps = 5  # type: ignore[misc]  # that it fails is what is tested
    assert hash(run) == hash(RunConfig.model_validate(minimal()))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"training": {"steps": "5"}}, "training.steps"),
        ({"training": {"steps": True}}, "training.steps"),
        ({"training": {"steps": 0}}, "training.steps"),
        ({"training": {"steps": -1}}, "training.steps"),
        ({"training": {"steps": 2**31}}, "training.steps"),
        ({"training": {"steps": 2.5}}, "training.steps"),
        ({"training": {"seq_len": 0}}, "training.seq_len"),
        ({"training": {"max_norm": 0}}, "training.max_norm"),
        ({"training": {"max_norm": float("nan")}}, "training.max_norm"),
        ({"training": {"local_batch_size": -2}}, "training.local_batch_size"),
        ({"training": {"dataset": "c5"}}, "training.dataset"),
        ({"training": {"dtype": "float8"}}, "training.dtype"),
        ({"training": {"seed": -1}}, "training.seed"),
        ({"training": {"stepz": 5}}, "training.stepz"),
        ({"optimizer": {"beta1": 1.0}}, "optimizer.beta"),
        ({"optimizer": {"lr": -1e-3}}, "optimizer.lr"),
        ({"lr_scheduler": {"decay_type": "exponential"}}, "lr_scheduler.decay_type"),
        ({"lr_scheduler": {"decay_ratio": 1.5}}, "lr_scheduler.decay_ratio"),
        ({"activation_checkpoint": {"selective_ac_option": "0"}}, "selective_ac_option"),
        ({"activation_checkpoint": {"selective_ac_option": "ops"}}, "selective_ac_option"),
        ({"checkpoint": {"interval": 0}}, "checkpoint.interval"),
        ({"checkpoint": {"load_step": -2}}, "checkpoint.load_step"),
        ({"checkpoint": {"exclude_from_loading": ["weights"]}}, "exclude_from_loading"),
        ({"compile": {"components": ["optimizer"]}}, "compile.components"),
        ({"job": {"dump_folder": "a\x00b"}}, "job.dump_folder"),
        ({"typo": {}}, "typo"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_wrong_values_are_refused_at_their_key(sections: dict[str, Any], expected: str) -> None:
    assert any(expected in message for message in messages(minimal(**sections)))


def test_dataset_is_required() -> None:
    assert messages({}) == ["training: Field required"]
    assert messages({"training": {}}) == ["training.dataset: Field required"]


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"training": {"dataset_path": None}},
            "training.dataset_path: is missing; datasets text and jsonl need the file or folder to "
            "read",
        ),
        (
            {"training": {"global_batch_size": 0}},
            "training.global_batch_size: 0 sequences per step train nothing; use -1 or at least 1",
        ),
        (
            {"parallelism": {"data_parallel_shard_degree": 0}},
            "parallelism.data_parallel_shard_degree: 0 ranks hold nothing; use -1 or at least 1",
        ),
        (
            {"checkpoint": {"keep_latest_k": 1}},
            "checkpoint.keep_latest_k: 1 would leave nothing if the newest is damaged; use 0 "
            "for all or at least 2",
        ),
        (
            {"checkpoint": {"create_seed_checkpoint": True}},
            "checkpoint.create_seed_checkpoint: needs checkpoint.enable, and checkpoint.load_only "
            "off",
        ),
        *(
            (
                {"checkpoint": {"folder": folder}},
                "checkpoint.folder: must be a relative path without . or .. or //",
            )
            for folder in ("", "/absolute", "../up", "a/../../b", "a//b", ".")
        ),
        (
            {"model": {"flavor": "7B"}},
            "model.flavor: llama3 has no flavor 7B, only tiny, tiny8, tiny_moe, debugmodel, 8B, "
            "70B, 405B; did you mean 70B?",
        ),
        (
            {"model": {"name": "qwen3"}},
            "model.name: qwen3 is not supported yet; use llama3",
        ),
    ],
)
def test_rules_have_sentences(sections: dict[str, Any], sentence: str) -> None:
    assert messages(minimal(**sections)) == [sentence]


def test_model_of_ones_own_is_left_to_the_trainer() -> None:
    run = RunConfig.model_validate(minimal(model={"name": "mamba", "flavor": "tiny"}))
    assert run.model.name == "mamba"


def test_older_spelling_of_the_data_position_is_understood() -> None:
    run = RunConfig.model_validate(minimal(checkpoint={"exclude_from_loading": ["dataloader"]}))
    assert run.checkpoint.exclude_from_loading == ("data_loader",)


def test_every_key_is_explained() -> None:
    def undescribed(model: type[BaseModel]) -> Iterator[str]:
        for name, field in model.model_fields.items():
            if not field.description:
                yield f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from undescribed(field.annotation)

    assert list(undescribed(RunConfig)) == []


@pytest.mark.parametrize(
    ("flavor", "parameters"), [("8B", 8.03e9), ("70B", 70.55e9), ("405B", 405.85e9)]
)
def test_published_sizes_have_their_published_number_of_parameters(
    flavor: str, parameters: float
) -> None:
    shape = llama3.FLAVORS[flavor]
    assert shape.vocab_size is not None
    attention = 2 * shape.dim * shape.dim + 2 * shape.dim * shape.n_kv_heads * shape.head_dim
    layer = attention + 3 * shape.dim * shape.hidden_dim + 2 * shape.dim
    total = shape.n_layers * layer + 2 * shape.vocab_size * shape.dim + shape.dim
    assert total == pytest.approx(parameters, rel=1e-3)
