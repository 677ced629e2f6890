"""``dry_run.py FILE RANK``: build what one rank of an example has, in its whole world, as JSON.

Two keys are for GPUs alone and are changed: float8 is emulated, and tensor parallelism waits for
its communication. Everything else is what the file says.
"""

import json
import sys
from pathlib import Path

import yaml

from pretrain_api.config import RunConfig
from pretrain_api.job import PretrainJob
from pretrain_trainer.bench.memory import compare


def on_a_cpu(config: RunConfig) -> RunConfig:
    """The configuration without what a CPU can't do."""
    float8 = config.quantize.linear.float8.model_copy(update={"emulate": True})
    linear = config.quantize.linear.model_copy(update={"float8": float8})
    apart = config.parallelism.model_copy(update={"enable_async_tensor_parallel": False})
    quantize = config.quantize.model_copy(update={"linear": linear})
    return config.model_copy(update={"quantize": quantize, "parallelism": apart})


if __name__ == "__main__":
    job = PretrainJob.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text()))
    config = on_a_cpu(job.run_config())
    print(json.dumps(compare(config, job.spec.world_size, int(sys.argv[2]), None)))
