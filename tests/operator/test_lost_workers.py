"""Workers that don't answer: when they are given up, and what becomes of their pods."""

from dataclasses import replace

import pytest

from pretrain_api import names
from pretrain_api.status import JobPhase
from pretrain_api.wire import CheckpointReport, ExitCode, Phase, Progress, Result, WorkerStatus
from pretrain_operator.cluster import Kind
from pretrain_operator.observe import Observation, parse_job, parse_pod
from pretrain_operator.policies.silence import lost
from pretrain_operator.testing import JOB, Bench, condition, message

KEPT = CheckpointReport(step=40, time=1.0, path="checkpoint/step-40", bytes=7, seconds=20.0)
SAVED = Progress(step=42, steps=100, step_seconds=1.0, checkpoint=KEPT)
LEADER, OTHER, THIRD = "llama-0-1", "llama-1-1", "llama-2-1"


def says(
    rank: int, *, age: float | None = 0.1, generation: int = 1, **fields: object
) -> WorkerStatus:
    said = {"phase": Phase.STEP, "progress": SAVED} | fields
    return WorkerStatus(generation=generation, rank=rank, beat_age_seconds=age, **said)


def fail_node(bench: Bench, node: str, ready: str = "Unknown") -> None:
    bench.cluster.objects[Kind.NODE, "", node]["status"]["conditions"] = [condition("Ready", ready)]


async def train(bench: Bench, size: int = 2) -> None:
    """All workers train, each on a node of its own, and everybody answers."""
    await bench.submit(workers={"replicas": size})
    await bench.settle()
    for index, name in enumerate(bench.member_pods()):
        bench.cluster.start(name, node=f"node-{index}")
    await bench.settle()
    answer(bench)
    await bench.settle()
    assert bench.status.phase is JobPhase.RUNNING


def answer(bench: Bench, **fields: object) -> None:
    """Every member reports from the present generation."""
    generation = bench.status.assignment.generation
    for index, name in enumerate(bench.member_pods()):
        bench.workers.reports[name] = says(index, generation=generation, **fields)


async def observe(bench: Bench) -> Observation:
    """Two workers train; what the tests change is what they say."""
    await train(bench)
    job = parse_job(bench.cluster.objects[Kind.JOB, "default", JOB])
    pods = tuple(pod for body in bench.cluster.pods() if (pod := parse_pod(body)))
    return Observation(
        meta=job.meta, job=job.job, problems=(), status=job.status, now=bench.cluster.now,
        nonce="fresh", image="trainer", pods=pods,
    )  # fmt: skip


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("silent", "reports", "expected"),
    [
        ({OTHER: 10.0}, {LEADER: says(0, age=5.0)}, {OTHER: "Unreachable"}),
        ({OTHER: 9.9}, {LEADER: says(0, age=5.0)}, {}),  # not long enough
        ({OTHER: 99.0}, {LEADER: says(0, age=4.9)}, {}),  # training goes on
        ({OTHER: 99.0}, {LEADER: says(0, age=None)}, {}),
        ({OTHER: 10.0}, {LEADER: says(0, waiting_for=(1,))}, {OTHER: "Unreachable"}),
        ({OTHER: 99.0}, {LEADER: says(0, waiting_for=(2,))}, {}),
        ({OTHER: 99.0}, {LEADER: says(0, age=99.0, generation=0)}, {}),  # of another world
        ({OTHER: 99.0}, {LEADER: says(0, age=99.0, phase=Phase.DONE)}, {}),
        ({OTHER: 10.0}, {LEADER: says(0, age=None, paused=True)}, {OTHER: "Unreachable"}),
        ({OTHER: 99.0}, {}, {}),  # nobody else answers: the fault may be ours
        ({OTHER: 99.0, LEADER: 99.0}, {}, {}),
        ({LEADER: 10.0}, {OTHER: says(1, age=5.0)}, {LEADER: "Unreachable"}),
        ({LEADER: 10.0}, {OTHER: says(1, age=None, phase=Phase.WAITING)}, {LEADER: "Unreachable"}),
        ({OTHER: 99.0}, {LEADER: says(0, age=None, phase=Phase.WAITING)}, {}),
        # A step or a save of this length is nothing unusual here.
        ({OTHER: 99.0}, {LEADER: says(0, age=30.0, phase=Phase.SAVE)}, {}),
        ({OTHER: 99.0}, {LEADER: says(0, age=40.0, phase=Phase.SAVE)}, {OTHER: "Unreachable"}),
        (
            {OTHER: 99.0},
            {LEADER: says(0, age=29.0, progress=SAVED.model_copy(update={"step_seconds": 10.0}))},
            {},
        ),
    ],
)
async def test_a_silent_worker_is_lost_only_if_its_world_stands_still(
    bench: Bench,
    silent: dict[str, float],
    reports: dict[str, WorkerStatus],
    expected: dict[str, str],
) -> None:
    seen = await observe(bench)
    assert lost(replace(seen, silent=silent, reports=reports)) == expected


async def test_a_silent_worker_on_a_lost_node_is_lost_without_another_word(bench: Bench) -> None:
    seen = replace(await observe(bench), lost_nodes=frozenset({"node-1"}))
    assert lost(replace(seen, silent={OTHER: 10.0})) == {OTHER: "NodeLost"}
    assert lost(replace(seen, silent={OTHER: 9.0})) == {}
    assert lost(seen) == {}  # its kubelet has trouble, the worker has none


async def test_nobody_is_lost_before_the_world_was_told_of_itself(bench: Bench) -> None:
    seen = await observe(bench)
    untold = seen.status.assignment.model_copy(update={"leader": None})
    seen = replace(seen, status=seen.status.model_copy(update={"assignment": untold}))
    assert lost(replace(seen, silent={OTHER: 99.0}, reports={LEADER: says(0, age=99.0)})) == {}


# --- what follows ---------------------------------------------------------------------------------


async def lose(bench: Bench, name: str) -> None:
    """A node loses its power: its worker is silent, the others wait in a collective."""
    del bench.workers.reports[name]
    bench.workers.silent[name] = 12.0
    for other, said in bench.workers.reports.items():
        bench.workers.reports[other] = said.model_copy(update={"beat_age_seconds": 12.0})
    await bench.settle()


def force_deleted(bench: Bench, name: str) -> bool:
    return name not in [pod["metadata"]["name"] for pod in bench.cluster.pods()]


def leaving(bench: Bench, name: str) -> bool:
    return "deletionTimestamp" in bench.cluster.pod(name)["metadata"]


@pytest.mark.parametrize("index", [0, 1], ids=["leader", "other"])
async def test_a_lost_worker_is_replaced_at_once_and_its_pod_goes_when_the_next_world_trains(
    bench: Bench, index: int
) -> None:
    await train(bench)
    name = bench.member_pods()[index]
    uid = bench.cluster.pod(name)["metadata"]["uid"]
    await lose(bench, name)
    assert bench.member_pods()[index] == f"llama-{index}-2"
    assert bench.status.assignment.written_off == (uid,)
    status = bench.status
    assert (status.restarts.by_reason, status.restarts.charged) == ({"Unreachable": 1}, 0)
    attempt = status.attempts[-1]
    assert (attempt.pod, attempt.node) == (name, f"node-{index}")
    assert "has not answered for 12 s and its world stands still" in attempt.message
    wishes = bench.cluster.pod(f"llama-{index}-2")["spec"]["affinity"]["nodeAffinity"]
    assert f"'NotIn', 'values': ['node-{index}']" in str(wishes)  # it still counts as ready
    bench.cluster.start(f"llama-{index}-2", node="node-9")
    await bench.settle()
    assert bench.told(f"llama-{index}-2").generation == 2  # nobody waited for the grace period
    assert leaving(bench, name)
    fail_node(bench, f"node-{index}")
    answer(bench, phase=Phase.LOAD)
    await bench.settle()
    assert not force_deleted(bench, name)  # the root isn't known to be fenced yet
    answer(bench)
    bench.cluster.advance(1)
    await bench.settle()
    assert force_deleted(bench, name)
    assert bench.status.assignment.generation == 2


async def test_a_worker_that_only_the_operator_can_not_reach_is_killed_by_its_kubelet(
    bench: Bench,
) -> None:
    await train(bench)
    await lose(bench, OTHER)
    bench.cluster.start("llama-1-2", node="node-9")
    await bench.settle()
    answer(bench)
    await bench.settle()
    assert not force_deleted(bench, OTHER)  # its node is well and stops it in time
    bench.cluster.advance(120 + 9)
    await bench.settle()
    assert not force_deleted(bench, OTHER)
    bench.cluster.advance(1)
    await bench.settle()
    assert force_deleted(bench, OTHER)


async def test_a_lost_worker_that_comes_back_is_not_adopted_and_not_counted(bench: Bench) -> None:
    await train(bench)
    await lose(bench, OTHER)
    bench.cluster.start("llama-1-2", node="node-9")
    await bench.settle()
    bench.workers.silent.clear()
    answer(bench)
    bench.workers.reports[OTHER] = says(1)
    bench.cluster.advance(11)
    await bench.settle()
    assert bench.member_pods() == [LEADER, "llama-1-2"]
    bench.cluster.finish(OTHER, ExitCode.PREEMPTED, message(Result.PREEMPTED, rank=1))
    await bench.settle()
    assert bench.status.assignment.generation == 2
    assert bench.status.restarts.total == 1


async def test_what_was_written_off_is_forgotten_with_its_pod(bench: Bench) -> None:
    await train(bench)
    await lose(bench, OTHER)
    bench.workers.silent.clear()
    bench.cluster.start("llama-1-2", node="node-9")
    await bench.settle()
    first = bench.status.assignment.written_off
    bench.cluster.vanish(Kind.POD, "llama-1-2")
    await bench.settle()
    assert bench.status.assignment.written_off == first  # its pod is still there
    bench.cluster.vanish(Kind.POD, OTHER)
    bench.cluster.vanish(Kind.POD, "llama-1-3")
    await bench.settle()
    bench.cluster.start("llama-1-3", node="node-9")
    await bench.settle()
    bench.cluster.vanish(Kind.POD, "llama-1-3")
    await bench.settle()
    assert bench.status.assignment.written_off == ()


async def test_a_lost_pod_is_not_waited_for_though_its_node_came_back(bench: Bench) -> None:
    await train(bench)
    fail_node(bench, "node-1")
    bench.cluster.remove(Kind.POD, OTHER)  # the node controller's doing
    await bench.settle()
    assert bench.status.restarts.by_reason == {"NodeLost": 1}
    fail_node(bench, "node-1", ready="True")
    bench.cluster.start("llama-1-2", node="node-9")
    await bench.settle()
    assert bench.told("llama-1-2").generation == 2


async def test_one_that_was_sent_away_on_a_lost_node_is_written_off_before_the_others_meet(
    bench: Bench,
) -> None:
    await bench.submit(workers={"replicas": 2, "maxReplicas": 2})
    await bench.settle()
    bench.cluster.schedule(LEADER)
    bench.cluster.start(OTHER, node="node-1")
    fail_node(bench, "node-1")
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"workers": {"replicas": 1}}})
    await bench.settle()
    uid = bench.cluster.pod(OTHER)["metadata"]["uid"]
    assert bench.status.assignment.written_off == ()
    bench.cluster.start(LEADER)
    await bench.settle()
    assert bench.told(LEADER).size == 1
    assert bench.status.assignment.written_off == (uid,)


async def test_the_only_worker_is_lost_with_its_node_alone(bench: Bench) -> None:
    await train(bench, size=1)
    bench.workers.reports.clear()
    bench.workers.silent[LEADER] = 60.0
    assert await bench.settle() == 1  # soon again: something is wrong
    assert bench.status.assignment.generation == 1
    del bench.cluster.objects[Kind.NODE, "", "node-0"]
    await bench.settle()
    assert bench.status.restarts.by_reason == {"NodeLost": 1}
    assert bench.member_pods() == ["llama-0-2"]


async def test_losses_that_come_thick_and_fast_wait(bench: Bench) -> None:
    await train(bench)
    waits = []
    for _ in range(3):
        await lose(bench, bench.member_pods()[1])
        waits.append(await bench.settle())
        bench.cluster.advance(waits[-1] or 0)
        bench.workers.silent.clear()
        await bench.train()
        answer(bench)
        await bench.settle()
    # Without a wait the old pod's last second is what is looked at next.
    assert [wait == 5 for wait in waits] == [False, False, True]


async def test_a_lost_worker_does_not_hold_up_a_suspension(bench: Bench) -> None:
    await train(bench, size=3)
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
    await lose(bench, OTHER)
    fail_node(bench, "node-1")
    for name in (LEADER, THIRD):
        bench.cluster.finish(name, ExitCode.PREEMPTED, message(Result.PREEMPTED, SAVED))
    await bench.settle()
    assert bench.member_pods() == []
    assert bench.status.phase is JobPhase.SUSPENDED
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": False}})
    bench.workers.silent.clear()
    fail_node(bench, "node-1", ready="True")
    await bench.train()
    assert bench.told("llama-1-2").generation == 2  # what is left of the lost one isn't waited for
    assert bench.status.restarts.total == 0


async def test_a_lost_pod_of_a_complete_job_goes(bench: Bench) -> None:
    await train(bench)
    await lose(bench, OTHER)
    bench.cluster.start("llama-1-2", node="node-9")
    await bench.settle()
    fail_node(bench, "node-1")
    done = message(Result.COMPLETE, SAVED.model_copy(update={"step": 100}), generation=2)
    bench.cluster.finish(LEADER, 0, done)
    await bench.settle()
    assert bench.condition(names.COMPLETE) == ("True", "Completed")
    assert force_deleted(bench, OTHER)


async def test_the_leader_is_asked_every_second_while_its_world_stands_still(bench: Bench) -> None:
    await train(bench)
    assert await bench.settle() == 2
    answer(bench, age=5.1)
    assert await bench.settle() == 1
    answer(bench)
    bench.workers.silent[LEADER] = 0.0
    assert await bench.settle() == 1


async def test_the_leader_is_not_left_to_wait_for_a_worker_that_trained_to_the_end(
    bench: Bench,
) -> None:
    """A rank of the leader failed after the last step: it needs all to start another round."""
    await train(bench)
    answer(bench, step=100)
    bench.cluster.finish(OTHER, 0, message(Result.COMPLETE, rank=1))
    await bench.settle()
    assert bench.status.assignment.generation == 1  # the leader is about to finish, too
    answer(bench, phase=Phase.WAITING, waiting_for=(1,), waiting_seconds=0.1)
    await bench.settle()
    assert bench.member_pods() == [LEADER, "llama-1-2"]
    assert bench.status.restarts.by_reason == {"FinishedAlone": 1}
    assert bench.status.restarts.charged == 0
    await bench.train()
    assert bench.told(LEADER).generation == 2
    done = message(Result.COMPLETE, SAVED.model_copy(update={"step": 100}), generation=2)
    bench.cluster.finish(LEADER, 0, done)
    await bench.settle()
    assert bench.condition(names.COMPLETE) == ("True", "Completed")


async def test_a_new_generation_does_not_wait_for_a_worker_that_trained_to_the_end(
    bench: Bench,
) -> None:
    """The leader was killed at the very end, and the other one was about to leave."""
    await train(bench)
    bench.workers.reports.clear()
    bench.cluster.finish(LEADER, 137, reason="OOMKilled")
    await bench.settle()
    assert bench.member_pods() == ["llama-0-2", OTHER]
    bench.cluster.finish(OTHER, 0, message(Result.COMPLETE, rank=1))
    await bench.train()
    bench.cluster.advance(60)
    await bench.train()
    assert bench.member_pods() == ["llama-0-2", "llama-1-3"]
    assert bench.told("llama-0-2").generation == 3
    assert bench.status.restarts.by_reason == {"OOMKilled": 1, "FinishedAlone": 1}
    assert bench.status.restarts.charged == 1


async def test_a_lost_worker_stays_until_the_scheduler_has_judged_its_replacement(
    bench: Bench,
) -> None:
    """While it counts, pods are spread away from its node, which may well be dead."""
    await train(bench)
    await lose(bench, OTHER)
    assert bench.member_pods() == [LEADER, "llama-1-2"]
    assert not leaving(bench, OTHER)
    bench.cluster.schedule("llama-1-2", node="node-9")
    await bench.settle()
    assert leaving(bench, OTHER)


async def test_a_lost_worker_does_not_keep_its_replacement_from_the_only_node(
    bench: Bench,
) -> None:
    await train(bench)
    await lose(bench, OTHER)
    bench.cluster.refuse("llama-1-2", "0/1 nodes are available: insufficient nvidia.com/gpu")
    await bench.settle()
    assert leaving(bench, OTHER)
