"""What may change while a job exists, and when."""

import copy
from typing import Any

import pytest

BASE: dict[str, Any] = {
    "training": {"dataset": "c4", "steps": 100},
    "checkpoint": {"enable": True},
    "workers": {"replicas": 2, "image": "one", "podTemplate": {"env": [{"name": "A"}]}},
    "volumes": {"checkpoint": {"claimTemplate": {"storage": "1Gi"}}},
    "managedBy": "pretrain.dev/pretrain-operator",
}
NEVER = "create a new job"


def changed(path: str, value: Any, **more: Any) -> dict[str, Any]:
    spec = copy.deepcopy(BASE) | more
    *sections, key = path.split(".")
    target = spec
    for section in sections:
        target = target.setdefault(section, {})
    target[key] = value
    return spec


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("suspend", True),
        ("recovery", {"maxRestarts": 3}),
        ("activeDeadlineSeconds", 60),
        ("recovery", {"growSnoozeSeconds": 0}),
        ("schedulingTimeoutSeconds", 60),
        ("ttlSecondsAfterFinished", 0),
        ("volumes.checkpoint.retention", "Delete"),
    ],
)
def test_lifetime_and_recovery_change_at_any_time(stand_in: Any, path: str, value: Any) -> None:
    assert stand_in.update_errors(BASE, changed(path, value)) == []
    assert stand_in.update_errors(changed(path, value), BASE) == []


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("training.steps", 200, "training"),
        ("training.seqLen", 64, "training"),
        ("model", {"flavor": "8B"}, "model"),
        ("job", {"description": "other"}, "job"),
        ("optimizer", {"lr": 0.1}, "optimizer"),
        ("lrScheduler", {"warmupSteps": 1}, "lrScheduler"),
        ("parallelism", {"dataParallelReplicateDegree": 2}, "parallelism"),
        ("checkpoint.interval", 7, "checkpoint"),
        ("activationCheckpoint", {"mode": "full"}, "activationCheckpoint"),
        ("compile", {"enable": True}, "compile"),
        ("metrics", {"logFreq": 1}, "metrics"),
        ("comm", {"trainTimeoutSeconds": 1}, "comm"),
        ("volumes.checkpoint.claimTemplate", {"storage": "2Gi"}, "volumes.checkpoint"),
        ("volumes.checkpoint.subPath", "other", "volumes.checkpoint.subPath"),
        ("workers.processesPerWorker", 2, "workers.processesPerWorker"),
        ("workers.replicas", 4, "workers.replicas"),
        ("workers.minReplicas", 1, "workers.minReplicas"),
        ("workers.maxReplicas", 4, "workers.maxReplicas"),
        ("managedBy", "kueue.x-k8s.io/multikueue", "managedBy"),
    ],
)
def test_training_and_volume_never_change(stand_in: Any, path: str, value: Any, name: str) -> None:
    for suspend in (False, True):
        before, after = BASE | {"suspend": suspend}, changed(path, value, suspend=suspend)
        for errors in (
            stand_in.update_errors(before, after),
            stand_in.update_errors(after, before),
        ):
            (message,) = errors
            assert message.startswith(name)
            assert NEVER in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("workers.image", "two"),
        ("workers.resources", {"limits": {"memory": "1Gi"}}),
        ("workers.podTemplate", {"nodeSelector": {"zone": "a"}}),
    ],
)
def test_scheduling_changes_only_while_suspended(stand_in: Any, path: str, value: Any) -> None:
    (message,) = stand_in.update_errors(BASE, changed(path, value))
    assert message.startswith(f"{path} changes only while the job is suspended")
    # Suspending and changing at once would take the template from under running pods.
    assert stand_in.update_errors(BASE, changed(path, value, suspend=True)) == [message]
    suspended = BASE | {"suspend": True}
    assert stand_in.update_errors(suspended, changed(path, value, suspend=True)) == []
    # Queues resume a job and say where it runs in one update.
    assert stand_in.update_errors(suspended, changed(path, value)) == []


@pytest.mark.parametrize("suspend", [False, True])
def test_replicas_change_at_any_time_within_max_replicas(stand_in: Any, suspend: bool) -> None:
    workers = BASE["workers"] | {"minReplicas": 2, "maxReplicas": 8}
    before = BASE | {"suspend": suspend, "workers": workers | {"replicas": 4}}
    assert stand_in.errors(before) == []
    for size, refused in ((2, False), (8, False), (1, True), (16, True), (3, True)):
        after = before | {"workers": workers | {"replicas": size}}
        assert stand_in.update_errors(before, after) == []
        assert bool(stand_in.errors(after)) is refused, size


def test_bounds_stay_while_replicas_change(stand_in: Any) -> None:
    before = changed("workers.maxReplicas", 4)
    for bounds, name in (
        ({"maxReplicas": 8}, "maxReplicas"),
        ({}, "maxReplicas"),
        ({"maxReplicas": 4, "minReplicas": 1}, "minReplicas"),
    ):
        workers = BASE["workers"] | bounds
        (message,) = stand_in.update_errors(before, BASE | {"workers": workers})
        assert message == f"workers.{name} never changes; create a new job"


def test_nothing_changed_is_nothing_refused(stand_in: Any) -> None:
    assert stand_in.update_errors(BASE, BASE) == []
