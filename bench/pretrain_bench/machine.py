"""What the numbers were measured on, in one line."""

import os
import platform
import subprocess
from pathlib import Path

from pretrain_demo.target import repository


def describe() -> str:
    """Processor, memory, kernel and the commit of the tree."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = named[0] if named else platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores of {processor}, "
        f"{memory:.0f} GiB, Linux {platform.release()}, commit {commit()}"
    )


def commit() -> str:
    """Short name of the commit, with a plus if the tree has changes; or that there is none."""
    argv = ["git", "-C", str(repository()), "describe", "--always", "--dirty=+"]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
