"""The command line as people call it: arguments in, exit code and text out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain_cli.__main__ import main

LLAMA3_8B = """\
[job]
dump_folder = "./outputs"
description = "Llama 3.1 8B training"

[model]
name = "llama3"
flavor = "8B"
hf_assets_path = "./assets/hf/Llama-3.1-8B"

[optimizer]
name = "AdamW"
lr = 3e-4

[lr_scheduler]
warmup_steps = 200

[training]
local_batch_size = 2
seq_len = 8192
max_norm = 1.0
steps = 1000
dataset = "c4"

[parallelism]
data_parallel_shard_degree = -1  # all ranks

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[checkpoint]
enable = true
folder = "checkpoint"
interval = 500
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def pretrain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """Calls the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> Outcome:
        try:
            code = main(list(argv))
        except SystemExit as ended:  # argparse leaves this way
            code = int(ended.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def llama3_8b(tmp_path: Path) -> Path:
    """A configuration file as torchtitan's documentation has it."""
    file = tmp_path / "llama3_8b.toml"
    file.write_text(LLAMA3_8B)
    return file
