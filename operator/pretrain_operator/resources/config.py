"""The ConfigMap with the configuration that every rank of the job reads.

It is written once and immutable: what is trained does not change while a job exists, not even when
a newer operator has other defaults. Global batch size and number of data streams are resolved here,
at the largest world size, so that no later world size can change what a step means.
"""

from typing import Any

from pretrain_api import names
from pretrain_api.config import RunConfig
from pretrain_api.job import PretrainJob
from pretrain_api.mesh import batch_plan
from pretrain_operator.resources.metadata import metadata


def config_name(job_name: str) -> str:
    """Name of the job's ConfigMap."""
    return f"{job_name}-config"


def frozen_config(job: PretrainJob) -> RunConfig:
    """The run's configuration with batch size and streams as numbers.

    Raises pretrain_api.mesh.MeshError if they don't come out even, which validation has excluded.
    """
    config = job.run_config()
    batch = batch_plan(config, job.spec.world_size)
    fixed = {"global_batch_size": batch.global_batch_size, "data_streams": batch.streams}
    return config.model_copy(update={"training": config.training.model_copy(update=fixed)})


def build_config(job: PretrainJob) -> dict[str, Any]:
    """ConfigMap with the RunConfig JSON."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(job.metadata, config_name(job.metadata.name)),
        "immutable": True,
        "data": {names.CONFIG_FILE: frozen_config(job).model_dump_json(indent=2)},
    }
