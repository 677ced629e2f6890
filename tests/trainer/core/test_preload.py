"""The fork server imports the trainer before ranks exist, so that import may touch no device."""

import os
import subprocess
import sys

GUARDED = """
import torch.cuda

def refuse(*args, **kwargs):
    raise AssertionError("importing the trainer touched CUDA")

for name in ("_lazy_init", "init", "current_device", "set_device", "get_device_name",
             "get_device_properties", "get_device_capability", "mem_get_info", "synchronize"):
    setattr(torch.cuda, name, refuse)
for name in ("_cuda_init", "_cuda_getDeviceCount", "_cuda_getDevice", "_cuda_setDevice"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, refuse)

import pretrain_trainer.train
import sys
import threading

for module in ("torch.distributed.fsdp", "torch.distributed.checkpoint",
               "pretrain_trainer.checkpoint.manager", "pretrain_trainer.data.loader"):
    assert module in sys.modules, module
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
assert threading.active_count() == 1, threading.enumerate()
print("clean")
"""


def test_importing_the_trainer_touches_no_cuda_and_starts_no_thread() -> None:
    result = subprocess.run(
        [sys.executable, "-c", GUARDED],
        env=os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout.strip() == "clean", result.stderr
