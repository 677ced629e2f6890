"""What the demo prints: steps with seconds, and one line that is rewritten where a terminal can.

In a log a rewritten line would be thousands of lines, so there only news are printed.
"""

import shutil
import sys
import time
from typing import TextIO


class Console:
    """Writes to ``out``; rewrites the live line if that is a terminal."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._start = time.monotonic()
        self._live = ""

    def heading(self, text: str) -> None:
        """A new chapter."""
        bold, plain = ("\033[1m", "\033[0m") if self._terminal else ("", "")
        self._write(f"{self._stamp()} {bold}{text}{plain}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(f"{self._stamp()}   {text}")

    def live(self, text: str) -> None:
        """A line that is replaced by the next one; repetitions are left out."""
        if text == self._live:
            return
        if not self._terminal:
            self.say(text)
        else:
            room = shutil.get_terminal_size().columns - 1
            self._out.write("\r\033[K" + f"{self._stamp()}   {text}"[:room])
            self._out.flush()
        self._live = text

    def _write(self, line: str) -> None:
        if self._terminal and self._live:
            self._out.write("\n")
        self._live = ""
        self._out.write(line + "\n")
        self._out.flush()

    def _stamp(self) -> str:
        return f"{time.monotonic() - self._start:6.1f} s"
