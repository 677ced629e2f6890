"""GPUs by name: what data sheets promise of each."""

import re
from dataclasses import dataclass
from types import MappingProxyType

# Dense bfloat16 products, 1e12 FLOP/s, by words in a device's name.
PEAK_TFLOPS = MappingProxyType({
    "A100": 312.0,
    "H100": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU and its place in a usual server.

    Attributes:
        memory_gib: of the device, as the driver reports it.
        peak_tflops: see :data:`PEAK_TFLOPS`.
        memory_gbs: bandwidth of its memory, 1e9 bytes/s.
        link_gbs: to the GPUs of its server, each direction, 1e9 bytes/s.
        network_gbs: to other servers, each direction, 1e9 bytes/s; servers differ, so this is a
            usual one: a port of 200 or 400 Gbit/s for each GPU, or 100 without fast links inside.
        per_node: GPUs in a server.
        product: pattern of the label nvidia.com/gpu.product or amd.com/gpu.product-name.
    """

    memory_gib: float
    peak_tflops: float
    memory_gbs: float
    link_gbs: float
    network_gbs: float
    product: str
    per_node: int = 8


GPUS = MappingProxyType({
    "a100-40": Gpu(39.5, PEAK_TFLOPS["A100"], 1555, 300, 25, r"A100.*40GB"),
    "a100-80": Gpu(79.3, PEAK_TFLOPS["A100"], 2039, 300, 25, r"A100.*80GB"),
    "h100-80": Gpu(79.6, PEAK_TFLOPS["H100"], 3350, 450, 50, r"H100.*80GB"),
    "h200": Gpu(140.4, PEAK_TFLOPS["H200"], 4800, 450, 50, r"H200"),
    "b200": Gpu(178.4, PEAK_TFLOPS["B200"], 7700, 900, 50, r"B200"),
    "l40s": Gpu(44.9, PEAK_TFLOPS["L40S"], 864, 32, 12.5, r"L40S"),
    "mi300x": Gpu(191.9, PEAK_TFLOPS["MI300X"], 5300, 448, 50, r"MI300X"),
})  # fmt: skip


def peak_flops(device: str) -> float | None:
    """Peak in FLOP/s of a device by the name that its driver tells, such as NVIDIA H100 PCIe.

    None for one that isn't known, and for a slice of one (MIG).
    """
    if "MIG" in device:
        return None
    found = [words for words in PEAK_TFLOPS if re.search(rf"\b{words}\b", device)]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


def gpu_of_product(product: str) -> str | None:
    """Name of the GPU in the table that a node's label tells, such as NVIDIA-H100-80GB-HBM3.

    None for a product that isn't known for sure, and for a slice of one (MIG).
    """
    if "MIG" in product:
        return None
    found = [name for name, gpu in GPUS.items() if re.search(rf"(?<![A-Z]){gpu.product}", product)]
    return found[0] if len(found) == 1 else None
