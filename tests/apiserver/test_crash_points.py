"""An operator that is killed after any of its writes changes nothing about the end.

Every write of every workflow is a crash point. `make test-crash-points` goes through them all; here
one workflow is, and of the others a few points spread over the whole.
"""

import os
from itertools import count

import pytest

from .conftest import remember
from .crashpoints import Findings, crash_points
from .lab import NewLab
from .workflows import WORKER_FAILS, WORKFLOWS, Workflow

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

ALL = os.environ.get("PRETRAIN_TEST_CRASH_POINTS") == "all"


def verify(findings: Findings) -> None:
    assert findings.deviations == {}
    assert findings.killed


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
async def test_every_crash_point(
    new_lab: NewLab, workflow: Workflow, request: pytest.FixtureRequest
) -> None:
    picked = None if ALL or workflow is WORKER_FAILS else (6, 13)
    findings = await crash_points(new_lab, workflow, picked)
    remember(request.config, findings)
    verify(findings)
    if picked is None:
        # Progress is written by time, so that runs differ by a few writes, those at the same time
        # too: the first that came to its end alive says how far all were covered.
        covered = next(number for number in count(1) if number not in findings.killed) - 1
        assert covered >= 0.8 * len(findings.writes)
