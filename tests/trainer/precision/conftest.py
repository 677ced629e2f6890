"""The fixtures of whole runs, from the tests of the trainer's core."""

from ..core.conftest import documents, run, run_config, run_until_killed, saved

__all__ = ["documents", "run", "run_config", "run_until_killed", "saved"]
