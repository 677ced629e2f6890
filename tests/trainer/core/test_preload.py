"""The fork server imports the trainer before ranks exist, so that import may touch no device."""

import os
import subprocess
import sys

GUARDED = """
import importlib
import os
import sys

import torch.cuda

from pretrain_agent import launcher
from pretrain_agent.settings import DEFAULT_ENTRY_POINT

def threads():
    return len(os.listdir("/proc/self/task"))  # of any language: a fork has none of them

of_torch = threads()  # a pool of its linear algebra, which forks know how to do without

def refusal(name):  # one for each, because torch keeps them in a table by identity
    def refuse(*args, **kwargs):
        raise AssertionError(f"importing called {name}")
    return refuse

for name in ("_lazy_init", "init", "current_device", "set_device", "get_device_name",
             "get_device_properties", "get_device_capability", "mem_get_info", "synchronize"):
    setattr(torch.cuda, name, refusal(name))
for name in ("_cuda_init", "_cuda_getDeviceCount", "_cuda_getDevice", "_cuda_setDevice"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, refusal(name))

# As on a machine with GPUs, whose management library counts them without touching any. Where it
# isn't installed torch asks CUDA, which finds nothing to touch.
torch.cuda._device_count_nvml = lambda: 1

for module in (*launcher.PRELOAD, *launcher.PRELOAD_FOR, DEFAULT_ENTRY_POINT.partition(":")[0]):
    importlib.import_module(module)
    assert threads() == of_torch, f"{module} started a thread"

for module in ("torch.distributed.fsdp", "torch.distributed.checkpoint",
               "pretrain_trainer.checkpoint.manager", "pretrain_trainer.data.loader",
               "torchao.float8"):
    assert module in sys.modules, module
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
print("clean")
"""


def test_what_the_fork_server_imports_touches_no_cuda_and_adds_no_thread() -> None:
    result = subprocess.run(
        [sys.executable, "-c", GUARDED],
        env=os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout.strip() == "clean", result.stderr
