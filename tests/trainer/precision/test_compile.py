"""Compilation changes time, hardly the numbers, and is done once in the life of a job.

Losses of compiled blocks are within 1e-5 of eager ones, relative: kernels that are fused add in
another order. Most tests use ``aot_eager``, which captures, differentiates and plans as inductor
does, and then calls the same kernels as without compiler: seconds instead of a minute. Those of
inductor need a C++ compiler, as the image has one.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain_api.config import RunConfig
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_trainer.init import initialise
from pretrain_trainer.models.llama3 import Llama3
from pretrain_trainer.precision.compile import (
    CACHE_FOLDER,
    CACHE_VARIABLE,
    PARETO_FOLDER,
    compile_blocks,
    set_up_compiler,
)

from ..core.watched import watched_steps

Ranks = Callable[..., Any]
Run = Callable[..., Any]
MakeConfig = Callable[..., RunConfig]

TOLERANCE = 1e-5
ONE_THREAD = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # or it starts a process per core
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor calls g++")
SELECTIVE = {"mode": "selective", "selective_ac_option": "op"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float8"])
def test_compiled_blocks_train_alike_under_fsdp(
    ranks: Ranks, run_config: MakeConfig, precision: str
) -> None:
    float8 = {
        "model": {"converters": ["quantize.linear.float8"]},
        "quantize": {"linear": {"float8": {"emulate": True}}},
    }
    shared: dict[str, dict[str, Any]] = {
        **(float8 if precision == "float8" else {}),
        "activation_checkpoint": SELECTIVE,
        "checkpoint": {"enable": False},
        "training": {"steps": 2},
    }
    compiled = {"enable": True, "backend": "aot_eager"}
    eager = ranks(2, watched_steps, run_config(**shared))
    found = ranks(2, watched_steps, run_config(compile=compiled, **shared))
    for (_, losses), (_, expected) in zip(found, eager, strict=True):
        assert losses == pytest.approx(expected, rel=TOLERANCE)
    for name, value in eager[0][0].items():
        room = 2e-5 * float(np.abs(value).max())
        np.testing.assert_allclose(found[0][0][name], value, rtol=0, atol=room, err_msg=name)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_trains_alike(run: Run, run_config: MakeConfig) -> None:
    shared: dict[str, dict[str, Any]] = {
        "activation_checkpoint": SELECTIVE,
        "checkpoint": {"enable": False},
        "training": {"steps": 2},
    }
    eager = run(2, run_config(**shared))
    compiled = run(2, run_config(compile={"enable": True}, **shared), timeout=500, **ONE_THREAD)
    assert compiled.losses == pytest.approx(eager.losses, rel=TOLERANCE)
    assert list(compiled.losses) == [1, 2]


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_restart_finds_what_was_compiled(run_config: MakeConfig) -> None:
    config = run_config(
        compile={"enable": True, "components": ["model"]},
        training={"steps": 1},
        checkpoint={"enable": False},
    )
    output = Path(config.job.dump_folder)
    output.mkdir()
    path = output / "run.json"
    path.write_text(config.model_dump_json())

    def fresh_process() -> tuple[int, int, float]:
        """Graphs from the cache and graphs compiled, as its log says, and its loss."""
        environment = {**os.environ, **ONE_THREAD, "MASTER_ADDR": "127.0.0.1"}
        environment.pop(CACHE_VARIABLE, None)
        done = subprocess.run(
            [sys.executable, "-m", "pretrain_trainer.train", str(path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        (cache,) = (line for line in lines if "compiled_new" in line)
        (step,) = (line for line in lines if "loss" in line)
        return cache["compiled_from_cache"], cache["compiled_new"], step["loss"]

    known, new, loss = fresh_process()
    assert known == 0
    assert new >= 2  # a block forward and backward
    assert any((output / CACHE_FOLDER / "local").iterdir())
    assert fresh_process() == (new, 0, loss)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Without a cache chosen, and with torch's settings put back afterwards."""
    from torch._functorch import config as functorch

    monkeypatch.setenv(CACHE_VARIABLE, "")  # so that whatever the test makes of it is undone
    monkeypatch.delenv(CACHE_VARIABLE)
    with functorch.patch(
        activation_memory_budget=1.0,
        visualize_memory_budget_pareto=False,
        memory_budget_pareto_dir=None,
    ):
        yield monkeypatch


def test_each_job_has_a_cache_of_its_own_on_its_volume(
    run_config: MakeConfig, environment: pytest.MonkeyPatch
) -> None:
    config = run_config(compile={"enable": True})
    set_up_compiler(config, "uid-1")
    folder = Path(config.job.dump_folder) / CACHE_FOLDER / "uid-1"
    assert os.environ[CACHE_VARIABLE] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_torch_itself_has_not_chosen(
    run_config: MakeConfig, environment: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    default = cache_dir()  # as torch does when it is imported
    assert os.environ[CACHE_VARIABLE] == default
    set_up_compiler(run_config(compile={"enable": True}), "uid-1")
    assert os.environ[CACHE_VARIABLE].startswith(run_config().job.dump_folder)


def test_whoever_chose_a_cache_keeps_it(
    run_config: MakeConfig, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv(CACHE_VARIABLE, "/elsewhere")
    config = run_config(compile={"enable": True})
    set_up_compiler(config, "uid-1")
    assert os.environ[CACHE_VARIABLE] == "/elsewhere"
    assert not Path(config.job.dump_folder).exists()


def test_a_run_without_compiler_leaves_no_folder(
    run_config: MakeConfig, environment: pytest.MonkeyPatch
) -> None:
    config = run_config()
    set_up_compiler(config, "uid-1")
    assert CACHE_VARIABLE not in os.environ
    assert not Path(config.job.dump_folder).exists()


def test_an_unwritable_volume_costs_the_cache_and_not_the_run(
    run_config: MakeConfig, environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(compile={"enable": True})
    Path(config.job.dump_folder).write_text("a file where the folder should be")
    set_up_compiler(config, "uid-1")
    assert CACHE_VARIABLE not in os.environ
    assert "compiled code is not kept there" in caplog.text


SHAPE = LlamaShape(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32)


def budgeted(make: MakeConfig, budget: float, **options: Any) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients and bytes kept for the backward pass, with a budget of memory."""
    torch._dynamo.reset()
    config = make(
        activation_checkpoint={"mode": "memory_budget", "memory_budget": budget, **options},
        compile={"enable": True, "backend": "aot_eager"},
    )
    set_up_compiler(config, "")
    model = Llama3(SHAPE, seq_len=24)
    initialise(model, 0, torch.device("cpu"))
    compile_blocks(model, config.compile)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(torch.arange(48).view(2, 24)).float().logsumexp(-1).mean()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.detach(), gradients, sum(kept.values())


@pytest.mark.slow
def test_a_memory_budget_is_kept_and_changes_nothing(
    run_config: MakeConfig, environment: pytest.MonkeyPatch
) -> None:
    loss, gradients, everything = budgeted(run_config, 1.0)
    tight_loss, tight_gradients, little = budgeted(run_config, 0.2)
    assert torch.equal(loss, tight_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, tight_gradients, strict=True))
    weights = sum(p.numel() * 4 for p in Llama3(SHAPE, seq_len=24).parameters())
    assert little - weights < (everything - weights) / 2


@pytest.mark.slow
def test_memory_against_compute_is_drawn(
    run_config: MakeConfig, environment: pytest.MonkeyPatch
) -> None:
    budgeted(run_config, 0.2, visualize_memory_budget_pareto=True)
    folder = Path(run_config().job.dump_folder) / PARETO_FOLDER
    assert [path.suffix for path in folder.iterdir()] == [".svg"]


@pytest.mark.parametrize(
    "compiler", [{}, {"enable": True, "components": ["loss"]}, {"enable": True, "backend": "eager"}]
)
def test_a_memory_budget_without_compiler_is_refused(
    run_config: MakeConfig, compiler: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as caught:
        run_config(activation_checkpoint={"mode": "memory_budget"}, compile=compiler)
    (error,) = caught.value.errors()
    assert error["msg"].startswith("memory_budget is planned by the compiler; set compile.enable,")
