"""``pretrain validate`` tells everything that is wrong, where, and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOOD = """\
apiVersion: pretrain.dev/v1alpha1
kind: PretrainJob
metadata:
  name: demo
spec:
  training: {dataset: text, datasetPath: /data, localBatchSize: 2}
  optimizer: {lr: 3e-4}
  workers: {replicas: 2, processesPerWorker: 2}
"""

BAD = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: beside}
---
apiVersion: pretrain.dev/v1alpha1
kind: PretrainJob
metadata:
  name: Bad_Name
spec:
  modle: {}
  model: {flavor: 8b}
  training:
    dataset: texts
    stepz: 100
    localBatchSize: -2
    lr: 3e-4
    seqLen: "5"
  faultTolerance: {enable: true}
  parallelism:
    fsdpReshardAfterForward: sometimes
  checkpoint: {enable: yes, keepLatestK: 1}
  workers:
    replicas: 2
    podTemplate:
      hostNetwork: true
      env:
      - {name: RANK, value: "1"}
      - {name: A, value: "1"}
      - {name: A, value: "2"}
      volumes:
      - {name: v, hostPath: {path: /}}
"""

EXPECTED = """\
bad.yaml:8: metadata.name: must be lower-case letters, digits and dashes, with a letter or digit \
at both ends, not 'Bad_Name'
bad.yaml:9: spec.volumes.checkpoint: is missing but checkpoint.enable is on; add a claimTemplate \
with a storage size, or the claimName of a claim that exists
bad.yaml:10: spec.modle: unknown key; did you mean model?
bad.yaml:11: spec.model.flavor: llama3 has no flavor 8b, only tiny, tiny8, tiny_moe, \
debugmodel, 8B, 70B, 405B; did you mean 8B?
bad.yaml:13: spec.training.dataset: must be one of c4, text, jsonl, not 'texts'; did you mean text?
bad.yaml:14: spec.training.stepz: unknown key; did you mean steps?
bad.yaml:15: spec.training.localBatchSize: must be at least 1, not -2
bad.yaml:16: spec.training.lr: unknown key; did you mean spec.optimizer.lr?
bad.yaml:17: spec.training.seqLen: must be a whole number, not '5'
bad.yaml:18: spec.faultTolerance.enable: true is not supported yet; leave it at false
bad.yaml:20: spec.parallelism.fsdpReshardAfterForward: must be one of default, always, never or a \
whole number, not 'sometimes'
bad.yaml:21: spec.checkpoint.keepLatestK: 1 would leave nothing if the newest is damaged; use 0 \
for all or at least 2
bad.yaml:25: spec.workers.podTemplate.hostNetwork: is not allowed: workers never share a node's \
namespaces
bad.yaml:26: spec.workers.podTemplate.env: A is there more than once; names must differ
bad.yaml:27: spec.workers.podTemplate.env[0].name: RANK is set by the operator or changes which \
code runs; remove it
bad.yaml:31: spec.workers.podTemplate.volumes[0].hostPath: is not allowed: workers never reach a \
node's files; use persistentVolumeClaim
"""


@pytest.fixture
def check(pretrain: Callable[..., Any]) -> Callable[..., Any]:
    def call(text: str, name: str = "job.yaml") -> Any:
        Path(name).write_text(text)
        return pretrain("validate", name)

    return call


def test_a_good_job_is_summed_up(check: Callable[..., Any]) -> None:
    outcome = check(GOOD)
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out == (
        "job.yaml: demo is valid (2 x 2 processes, 8 sequences per step in 1 passes)\n"
    )


def test_everything_is_told_at_once_in_order(check: Callable[..., Any]) -> None:
    outcome = check(BAD, "bad.yaml")
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err == EXPECTED


def test_examples_are_valid(pretrain: Callable[..., Any], repository: Path) -> None:
    examples = sorted((repository / "manifests/examples").glob("*.yaml"))
    assert examples
    outcome = pretrain("validate", *map(str, examples))
    assert outcome.err == ""
    assert outcome.code == 0


def test_gpus_that_no_process_uses_are_noted(pretrain: Callable[..., Any]) -> None:
    text = GOOD.replace("{replicas: 2", "{resources: {limits: {nvidia.com/gpu: 4}}, replicas: 2")
    Path("job.yaml").write_text(text)
    outcome = pretrain("validate", "job.yaml")
    assert outcome.code == 0
    assert (
        "note: each worker has 4 GPUs by resources.limits for processesPerWorker 2" in outcome.out
    )


def test_toml_of_the_documentation_is_valid(pretrain: Callable[..., Any], llama3_8b: Path) -> None:
    outcome = pretrain("validate", str(llama3_8b))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"{llama3_8b}: valid (llama3 8B, 1000 steps)\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '[training]\ndataset = "c4"\nbatch_size = 4\n',
            "c.toml:3: training.batch_size: unknown key; did you mean training.local_batch_size?",
        ),
        (
            '[float8]\n[training]\ndataset = "c4"\n',
            "c.toml:1: float8: unknown key; did you mean quantize.linear.float8?",
        ),
        (
            '[training]\ndataset = "c4"\n[checkpoint]\nenable_checkpoint = true\n',
            "c.toml:4: checkpoint.enable_checkpoint: unknown key; did you mean checkpoint.enable?",
        ),
        (
            '[training]\ndataset = "c4"\n[lr_scheduler]\nlr_min = 0.1\n',
            "c.toml:4: lr_scheduler.lr_min: unknown key; did you mean lr_scheduler.min_lr_factor?",
        ),
        (
            '[training]\ndataset = "c4"\n[zebra]\n',
            "c.toml:3: zebra: unknown key; remove it",
        ),
        (
            "[training]\nsteps = 5\n",
            "c.toml:1: training.dataset: is missing; Where samples come from: c4 is streamed from "
            "Hugging Face; text and jsonl are read from dataset_path",
        ),
        (
            '[training]\ndataset = "c4"\nglobal_batch_size = 7\nlocal_batch_size = 2\n',
            "c.toml:3: training.global_batch_size: 7 is no multiple of local_batch_size 2 x "
            "data-parallel degree 1; use -1 or 6 or 8",
        ),
        (
            '[training]\ndataset = "c4"\n[parallelism]\ndata_parallel_shard_degree = 4\n'
            "fsdp_reshard_after_forward = 3\n",
            "c.toml:5: parallelism.fsdp_reshard_after_forward: 3 doesn't divide the sharding "
            "degree 4; use one of 1, 2, 4",
        ),
        (
            '[model]\nflavor = "8B"\n[training]\ndataset = "c4"\n[parallelism]\n'
            "tensor_parallel_degree = 16\n",
            "c.toml:6: parallelism.tensor_parallel_degree: 16 doesn't divide the 32 heads, 8 of "
            "keys and values, and 14336 features of llama3 8B; use one of 1, 2, 4, 8",
        ),
        (
            '[training]\ndataset = "c4"\n[optimizer]\nlr = "fast"\n',
            "c.toml:4: optimizer.lr: must be a number, not 'fast'",
        ),
        (
            '[training]\ndataset = "c4"\nmax_norm = nan\n',
            "c.toml:3: training.max_norm: must be a finite number, not nan",
        ),
        (
            '[job]\nconfig_file = "x"\n[training]\ndataset = "c4"\n',
            'c.toml:2: job.config_file: "x" is not supported yet; it is an option of the command '
            "line; remove it",
        ),
    ],
)
def test_toml_sentences(check: Callable[..., Any], text: str, sentence: str) -> None:
    outcome = check(text, "c.toml")
    assert (outcome.code, outcome.err) == (1, sentence + "\n")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("kind: PretrainJob", "kind: PretrainJobs"), "must be PretrainJob, not 'PretrainJobs'"),
        (("v1alpha1", "v2"), "must be pretrain.dev/v1alpha1, not 'pretrain.dev/v2'"),
        (("replicas: 2", "replicas: 0"), "workers.replicas: must be at least 1, not 0"),
        (("replicas: 2", "replicas: two"), "workers.replicas: must be a whole number, not 'two'"),
        (("replicas: 2", "replica: 2"), "workers.replica: unknown key; did you mean replicas?"),
        (("lr: 3e-4", "lr: .inf"), "optimizer.lr: must be a finite number, not inf"),
        (("workers: {", "workers: {podTemplate: 3, "), "must be a section with keys of its own"),
        (("lr: 3e-4", "lr:"), "optimizer.lr: must be a number, not empty"),
    ],
)
def test_yaml_sentences(check: Callable[..., Any], change: tuple[str, str], sentence: str) -> None:
    outcome = check(GOOD.replace(*change))
    assert outcome.code == 1
    assert sentence in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kind: ConfigMap\napiVersion: v1\n", "job.yaml: holds no PretrainJob\n"),
        ("", "job.yaml: holds no PretrainJob\n"),
        ("- 1\n", "job.yaml:1: must be a section with keys of its own, not a list\n"),
        ("kind: PretrainJob\n", "job.yaml:1: spec: is missing; add it\n"),
    ],
)
def test_what_is_no_job_is_told(check: Callable[..., Any], text: str, sentence: str) -> None:
    outcome = check(text)
    assert (outcome.code, outcome.err) == (1, sentence)


def test_one_bad_file_of_two_fails_both_are_told(pretrain: Callable[..., Any]) -> None:
    Path("good.yaml").write_text(GOOD)
    outcome = pretrain("validate", "good.yaml", "none.yaml")
    assert outcome.code == 1
    assert "good.yaml: demo is valid" in outcome.out
    assert outcome.err == "none.yaml: No such file or directory\n"


def test_section_options_are_for_run_only(pretrain: Callable[..., Any]) -> None:
    outcome = pretrain("validate", "x.yaml", "--training.steps", "3")
    assert outcome.code == 2
    assert outcome.err == "--training.steps: only pretrain run takes options of this form\n"
