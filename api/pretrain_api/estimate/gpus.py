"""GPUs by name: what data sheets promise of each."""

import re
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU and its place in a usual server.

    Attributes:
        memory_gib: of the device, as the driver reports it.
        peak_tflops: dense bfloat16 products, 1e12 FLOP/s.
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
    "a100-40": Gpu(39.5, 312, 1555, 300, 25, r"A100.*40GB"),
    "a100-80": Gpu(79.3, 312, 2039, 300, 25, r"A100.*80GB"),
    "h100-80": Gpu(79.6, 989, 3350, 450, 50, r"H100.*80GB"),
    "h200": Gpu(140.4, 989, 4800, 450, 50, r"H200"),
    "b200": Gpu(178.4, 2250, 7700, 900, 50, r"B200"),
    "l40s": Gpu(44.9, 362, 864, 32, 12.5, r"L40S"),
    "mi300x": Gpu(191.9, 1307, 5300, 448, 50, r"MI300X"),
})  # fmt: skip


def gpu_of_product(product: str) -> str | None:
    """Name of the GPU in the table that a node's label tells, such as NVIDIA-H100-80GB-HBM3.

    None for a product that isn't known for sure, and for a slice of one (MIG).
    """
    if "MIG" in product:
        return None
    found = [name for name, gpu in GPUS.items() if re.search(rf"(?<![A-Z]){gpu.product}", product)]
    return found[0] if len(found) == 1 else None
