"""Every workflow in front of a real API server when nothing disturbs it."""

import pytest

from .crashpoints import end_of
from .lab import NewLab
from .workflows import GONE, WORKFLOWS, Workflow

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
async def test_a_workflow_comes_to_its_end(new_lab: NewLab, workflow: Workflow) -> None:
    async with new_lab(workflow.script) as lab:
        lab.operator.start()
        await workflow.run(lab)
        state = (await end_of(lab, workflow)).state
        assert lab.operator.starts == 1
    assert state["complaints"] == []
    assert len(state["pods ever"]) == workflow.pods
    if workflow.ends is GONE:
        assert not any(state["children"].values())
        return
    status = state["status"]
    assert status["restarts"]["byReason"] == workflow.restarts
    assert tuple(attempt["reason"] for attempt in status["attempts"]) == workflow.attempts
    assert sorted(state["children"]["networkpolicies"]) == ["job-workers"]
    assert sorted(state["children"]["persistentvolumeclaims"]) == ["job-checkpoint"]
