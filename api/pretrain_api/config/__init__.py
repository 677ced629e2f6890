"""RunConfig: what a trainer process reads, in torchtitan's vocabulary.

The sections and keys are torchtitan 0.2's, so that a file written for it can be read here, plus
three of our own (training.epochs, training.non_finite, training.data_streams). The whole vocabulary
is understood from the first day; what isn't built yet is refused by :mod:`pretrain_api.support`.
"""

from typing import ClassVar, Literal

from pretrain_api.config.model import (
    ACROSS_SECTIONS,
    ActivationCheckpoint,
    Compile,
    Model,
    Quantize,
)
from pretrain_api.config.run import (
    Checkpoint,
    Comm,
    Experimental,
    FaultTolerance,
    Job,
    MemoryEstimation,
    Metrics,
    Profiling,
    Validation,
)
from pretrain_api.config.training import LRScheduler, Optimizer, Parallelism, Training
from pretrain_api.schema import Section
from pretrain_api.support import support_rules

__all__ = [
    "ActivationCheckpoint",
    "Checkpoint",
    "Comm",
    "Compile",
    "Experimental",
    "FaultTolerance",
    "Job",
    "LRScheduler",
    "MemoryEstimation",
    "Metrics",
    "Model",
    "Optimizer",
    "Parallelism",
    "Profiling",
    "Quantize",
    "RunConfig",
    "Section",
    "Sections",
    "Training",
    "Validation",
]


class Sections(Section):
    """Every section of a training run; shared by RunConfig and the spec of a PretrainJob."""

    job: Job = Job()
    """Name of the run and where it writes."""
    model: Model = Model()
    """Which model is trained."""
    training: Training
    """What is trained on, for how long, and in which precision."""
    parallelism: Parallelism = Parallelism()
    """How model and data are laid out over ranks."""
    optimizer: Optimizer = Optimizer()
    """How gradients change parameters."""
    lr_scheduler: LRScheduler = LRScheduler()
    """How the learning rate changes over the run."""
    checkpoint: Checkpoint = Checkpoint()
    """When state is saved, what is kept, and what a start loads."""
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    """Which activations are recomputed in the backward pass instead of kept."""
    compile: Compile = Compile()
    """What torch.compile compiles, and with which backend."""
    quantize: Quantize = Quantize()
    """Layers in number formats of low precision, which model.converters switches on."""
    metrics: Metrics = Metrics()
    """What is measured and how often it is reported."""
    profiling: Profiling = Profiling()
    """Traces of the PyTorch profiler and snapshots of device memory."""
    comm: Comm = Comm()
    """Time limits and records of collective communication."""
    validation: Validation = Validation()
    """How the loss on held-out data is measured."""
    memory_estimation: MemoryEstimation = MemoryEstimation()
    """Estimate of memory use without training."""
    fault_tolerance: FaultTolerance = FaultTolerance()
    """Replicas that leave and join while others train."""
    experimental: Experimental = Experimental()
    """Hooks for code of one's own."""

    rules: ClassVar = (*support_rules(), *ACROSS_SECTIONS)


class RunConfig(Sections):
    """The configuration file of a trainer process: all sections and a version."""

    schema_version: Literal[1] = 1
    """Version of this schema; a trainer refuses one it doesn't know."""
