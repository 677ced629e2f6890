"""One control plane per session, a lab per run, and a table of crash points in the end."""

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain_devcluster.controlplane import ControlPlane, control_plane

from .api import Api
from .crashpoints import Findings
from .lab import NewLab, install, lab
from .operators import ForkServer

FINDINGS = pytest.StashKey[list[Findings]]()


@pytest.fixture(scope="session")
def plane(repository: Path) -> Iterator[ControlPlane]:
    """A control plane with the definition of PretrainJobs and the operator's rights."""

    async def prepare(found: ControlPlane) -> None:
        async with Api(found) as api:
            await install(api, repository)

    with control_plane() as found:
        asyncio.run(prepare(found))
        yield found


@pytest.fixture(scope="session")
def servers() -> Iterator[ForkServer]:
    """What starts operators."""
    with ForkServer() as found:
        yield found


@pytest.fixture
def new_lab(plane: ControlPlane, servers: ForkServer, repository: Path, tmp_path: Path) -> NewLab:
    """Makes labs: ``async with new_lab(script) as lab``."""
    made: Any = partial(lab, plane, servers, repository, tmp_path)
    return made


def remember(config: pytest.Config, findings: Findings) -> None:
    """Have a line of its own in the table at the end."""
    config.stash.setdefault(FINDINGS, []).append(findings)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(FINDINGS, [])
    if not rows:
        return
    terminalreporter.section("crash points of the operator")
    terminalreporter.write_line(
        f"{'workflow':<24}{'writes':>8}{'crashes':>9}{'deviations':>12}{'seconds':>9}"
    )
    for row in rows:
        terminalreporter.write_line(
            f"{row.workflow:<24}{len(row.writes):>8}{len(row.killed):>9}"
            f"{len(row.deviations):>12}{row.seconds:>9.0f}"
        )
