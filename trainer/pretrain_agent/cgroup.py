"""How often the kernel killed a process of this container for lack of memory.

Kubernetes tells only of kills that end the container. A killed rank under a surviving first process
is visible in the cgroup's own counters alone, in one place for cgroup v1 and another for v2.
"""

from pathlib import Path


def oom_kills(root: Path = Path("/")) -> int:
    """Number of out-of-memory kills in our memory cgroup so far; 0 when no counter is readable.

    ``root`` is the file system's root, for tests.
    """
    for path in _counters(root):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def _counters(root: Path) -> list[Path]:
    """Files that may hold the counter, the most specific first.

    Inside a container the cgroup's own directory is usually mounted at the top, whatever path
    ``/proc/self/cgroup`` names, so that is tried as well.
    """
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    files: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files.append(mount / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(mount / "memory" / path.lstrip("/") / "memory.oom_control")
    return [*files, mount / "memory.events", mount / "memory/memory.oom_control"]
