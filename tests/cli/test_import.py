"""``pretrain import`` turns torchtitan's TOML into a job that validates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain_api.job import PretrainJob


def test_the_documentations_file_becomes_a_job(
    pretrain: Callable[..., Any], llama3_8b: Path
) -> None:
    outcome = pretrain(
        "import", str(llama3_8b), "--workers", "2", "--processes-per-worker", "8", "--gpus"
    )
    assert outcome.code == 0
    assert outcome.err == (
        "note: model.hf_assets_path is './assets/hf/Llama-3.1-8B'; in a pod it must be a path of "
        "the image or a volume\n"
    )
    data = yaml.safe_load(outcome.out)
    assert data["metadata"] == {"name": "llama3-8b"}
    assert data["spec"]["job"] == {"description": "Llama 3.1 8B training"}
    assert data["spec"]["training"] == {
        "localBatchSize": 2,
        "seqLen": 8192,
        "maxNorm": 1.0,
        "steps": 1000,
        "dataset": "c4",
    }
    assert data["spec"]["activationCheckpoint"] == {
        "mode": "selective",
        "selectiveAcOption": "op",
    }
    assert data["spec"]["workers"] == {
        "replicas": 2,
        "processesPerWorker": 8,
        "resources": {"limits": {"nvidia.com/gpu": 8}},
    }
    assert data["spec"]["volumes"] == {"checkpoint": {"claimTemplate": {"storage": "100Gi"}}}
    job = PretrainJob.model_validate(data)
    assert job.run_config().optimizer.lr == 3e-4


def test_what_only_observes_is_left_out_with_a_note(pretrain: Callable[..., Any]) -> None:
    """The keys of torchtitan's own llama3_8b.toml, which profiles and writes for TensorBoard."""
    Path("llama3_8b.toml").write_text(
        """\
        [job]
        dump_folder = "./outputs"
        [profiling]
        enable_profiling = true
        save_traces_folder = "profile_trace"
        profile_freq = 100
        [metrics]
        log_freq = 10
        enable_tensorboard = true
        save_tb_folder = "tb"
        [model]
        name = "llama3"
        flavor = "8B"
        hf_assets_path = "/assets/Llama-3.1-8B"
        converters = []
        [optimizer]
        name = "AdamW"
        lr = 3e-4
        eps = 1e-8
        [lr_scheduler]
        warmup_steps = 200
        [training]
        local_batch_size = 1
        seq_len = 8192
        max_norm = 1.0
        steps = 1000
        dataset = "c4"
        [parallelism]
        data_parallel_replicate_degree = 1
        data_parallel_shard_degree = -1
        tensor_parallel_degree = 1
        pipeline_parallel_degree = 1
        context_parallel_degree = 1
        [checkpoint]
        enable = false
        folder = "checkpoint"
        interval = 500
        last_save_model_only = true
        export_dtype = "float32"
        async_mode = "disabled"
        [activation_checkpoint]
        mode = "selective"
        selective_ac_option = "op"
        [quantize.linear.float8]
        enable_fsdp_float8_all_gather = false
        precompute_float8_dynamic_scale_for_fsdp = false
        filter_fqns = ["output"]
        [validation]
        enable = false
        dataset = "c4_validation"
        freq = 500
        steps = -1
        """
    )
    outcome = pretrain("import", "llama3_8b.toml")
    assert outcome.err.splitlines() == [
        "note: profiling.enable_profiling is left out, because it is not supported yet",
        "note: metrics.enable_tensorboard is left out, because it is not supported yet",
    ]
    spec = yaml.safe_load(outcome.out)["spec"]
    assert spec["metrics"] == {"logFreq": 10, "saveTbFolder": "tb"}
    Path("job.yaml").write_text(outcome.out)
    assert pretrain("validate", "job.yaml").code == 0
    # What changes training is refused all the same.
    text = Path("llama3_8b.toml").read_text().replace('"disabled"', '"async"')
    Path("llama3_8b.toml").write_text(text)
    refused = pretrain("import", "llama3_8b.toml")
    assert refused.code == 1
    assert "checkpoint.async_mode" in refused.err


def test_what_is_imported_validates(pretrain: Callable[..., Any], llama3_8b: Path) -> None:
    Path("job.yaml").write_text(pretrain("import", str(llama3_8b)).out)
    outcome = pretrain("validate", "job.yaml")
    assert (outcome.code, outcome.err) == (0, "")


def test_choices(pretrain: Callable[..., Any], llama3_8b: Path) -> None:
    outcome = pretrain(
        "import", str(llama3_8b), "--name", "big", "--claim", "data", "--image", "r/t:1"
    )
    data = yaml.safe_load(outcome.out)
    assert data["metadata"]["name"] == "big"
    assert data["spec"]["workers"]["image"] == "r/t:1"
    assert data["spec"]["volumes"] == {"checkpoint": {"claimName": "data"}}


def test_without_checkpoints_no_volume_is_made(
    pretrain: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "My Run_1.toml").write_text(
        '[job]\ndump_folder = "x"\n[training]\ndataset = "c4"\n'
    )
    data = yaml.safe_load(pretrain("import", "My Run_1.toml").out)
    assert data["metadata"]["name"] == "my-run-1"
    assert set(data["spec"]) == {"training", "workers"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--name", "Not_A_Name"), "the job: metadata.name: must be lower-case letters"),
        (("--workers", "0"), "the job: spec.workers.replicas: must be at least 1, not 0"),
        (("--storage", "lots"), "claimTemplate.storage: must be a quantity"),
    ],
)
def test_a_job_that_would_be_refused_is_not_printed(
    pretrain: Callable[..., Any], llama3_8b: Path, options: tuple[str, ...], sentence: str
) -> None:
    outcome = pretrain("import", str(llama3_8b), *options)
    assert (outcome.code, outcome.out) == (1, "")
    assert sentence in outcome.err


def test_problems_of_the_file_are_told_with_its_lines(
    pretrain: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text(
        '[training]\ndataset = "c4"\n[fault_tolerance]\nenable = true\n'
    )
    outcome = pretrain("import", "c.toml")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        "c.toml:4: fault_tolerance.enable: true is not supported yet; leave it at false\n"
    )


def test_missing_file(pretrain: Callable[..., Any]) -> None:
    outcome = pretrain("import", "none.toml")
    assert (outcome.code, outcome.err) == (1, "none.toml: No such file or directory\n")
