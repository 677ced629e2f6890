"""A terminal, in which the commands of a page are typed as they are printed there."""

import re
import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CTRL_C_SECONDS = 10


@dataclass(frozen=True)
class Shell:
    """Bash in a folder, with the environment that the pages take for granted."""

    folder: Path
    environment: dict[str, str]

    def run(self, text: str, seconds: float = 900) -> str:
        """What a command or several lines of them print. AssertionError if one fails."""
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", text], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def watch(self, text: str, until: str, seconds: float = 300) -> None:
        """A command that never ends, until a line of it matches; then Ctrl-C."""
        with subprocess.Popen(
            ["bash", "-c", f"exec {text}"], cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            deadline = threading.Timer(seconds, process.kill)
            deadline.start()
            lines = list[str]()
            for line in process.stdout:
                lines.append(line)
                if re.search(until, line):
                    break
            process.send_signal(signal.SIGINT)
            # A shell without job control has its background processes ignore that.
            with suppress(subprocess.TimeoutExpired):
                process.wait(CTRL_C_SECONDS)
            process.kill()
            deadline.cancel()
        assert lines, f"{text} printed nothing"
        assert re.search(until, lines[-1]), "".join(lines)
