"""Control groups of the nodes, on cgroup v1 (also hybrid) and on v2.

Every node is one group below `/pretrain`, in every hierarchy that the machine mounts. The kubelet
makes the pods' groups below it and needs it to exist.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pretrain_devcluster.layout import CGROUP
from pretrain_devcluster.shell import DevclusterError, wait_until


def hierarchies(mounts: str) -> list[Path]:
    """Finds the roots of all cgroup hierarchies in the text of `/proc/mounts`."""
    fields = (line.split() for line in mounts.splitlines())
    return [Path(line[1]) for line in fields if line[2] in ("cgroup", "cgroup2")]


def machine_hierarchies() -> list[Path]:
    """Finds the roots on this machine."""
    return hierarchies(Path("/proc/mounts").read_text())


def ensure(cgroup: str, roots: Sequence[Path]) -> None:
    """Makes a group in every hierarchy, ready to have pods below it.

    Args:
        cgroup: absolute path below the roots, such as `/pretrain/node1`.
        roots: where the hierarchies are mounted; a single one is v2.

    Raises:
        DevclusterError: a v2 group can't be made ready.
    """
    for root in roots:
        folders = [root]
        for part in Path(cgroup).parts[1:]:
            folders.append(folders[-1] / part)
            folders[-1].mkdir(exist_ok=True)
            _inherit_cpuset(folders[-1])
        if len(roots) == 1:  # beside v1 hierarchies, v2 controls nothing
            for folder in folders:
                _delegate(folder)


def _inherit_cpuset(folder: Path) -> None:
    """A new v1 cpuset is empty, and no process may enter it until it names processors."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        file = folder / name
        if file.exists() and (folder.parent / name).exists() and not file.read_text().strip():
            file.write_text((folder.parent / name).read_text())


def _delegate(folder: Path) -> None:
    """In v2 a group's children have only the controllers that the group hands down."""
    controllers = (folder / "cgroup.controllers").read_text().split()
    try:
        (folder / "cgroup.subtree_control").write_text(" ".join(f"+{each}" for each in controllers))
    except OSError as error:
        raise DevclusterError(
            f"{folder} can't hand down controllers ({error.strerror}): where it holds processes of "
            "its own, as in some containers, run on the machine itself"
        ) from error


def left() -> list[Path]:
    """Lists the cluster's group in each hierarchy where it still exists."""
    return [root / CGROUP for root in machine_hierarchies() if (root / CGROUP).exists()]


def remove_all() -> None:
    """Removes the cluster's groups; their processes must be gone."""
    for top in left():
        wait_until(lambda top=top: _removed(top), f"the control group {top} is removed", 10)


def _removed(top: Path) -> bool:
    """Removes bottom up; the kernel may still be busy with processes that have just died."""
    for folder, _, _ in os.walk(top, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            return False
    return True
