"""Kernel settings that a kubelet insists on, put back when the cluster goes down.

They are the machine's own and know no namespace, so every kubelet on a machine sets them.
"""

from __future__ import annotations

import json
from pathlib import Path

from pretrain_devcluster.layout import Layout

_ROOT = Path("/proc/sys")
KUBELET_SETTINGS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)


def remember(layout: Layout) -> None:
    """Saves the machine's values, unless an earlier `up` has already done so."""
    file = _file(layout)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        values = {name: (_ROOT / name).read_text().strip() for name in KUBELET_SETTINGS}
        file.write_text(json.dumps(values))


def restore(layout: Layout) -> None:
    """Puts the saved values back."""
    file = _file(layout)
    if file.exists():
        for name, value in json.loads(file.read_text()).items():
            (_ROOT / name).write_text(value)
        file.unlink()


def _file(layout: Layout) -> Path:
    return layout.config / "machine-sysctls.json"
