"""A job from `kubectl apply` to its end, round by round, on the in-memory cluster."""

import json

import pytest

from pretrain_api import names
from pretrain_api.status import JobPhase
from pretrain_api.wire import CheckpointReport, ExitCode, Failure, Phase, Progress, Result
from pretrain_operator.cluster import Kind
from pretrain_operator.testing import JOB, Bench, condition, message

CHECKPOINT = CheckpointReport(step=40, time=1.0, path="checkpoint/step-40", bytes=7)
FORTY = Progress(step=42, steps=100, tokens=4200, loss=3.5, step_seconds=2.0, checkpoint=CHECKPOINT)
DONE = Progress(step=100, steps=100, tokens=10_000, loss=2.0, first_loss=9.0)


def assigned(bench: Bench, name: str) -> dict[str, object]:
    annotations = bench.cluster.pod(name)["metadata"]["annotations"]
    return json.loads(annotations[names.ANNOTATION_ASSIGNMENT])


async def test_children_are_made_and_members_told_once_all_have_an_address(bench: Bench) -> None:
    await bench.submit()
    await bench.settle()
    assert [p["metadata"]["name"] for p in bench.cluster.pods()] == ["llama-0-1", "llama-1-1"]
    assert [len(bench.cluster.all(k)) for k in (Kind.CONFIG_MAP, Kind.CLAIM)] == [1, 1]
    assert bench.status.phase is JobPhase.PENDING
    bench.cluster.start("llama-0-1", "10.0.0.1")
    await bench.settle()
    assert (
        names.ANNOTATION_ASSIGNMENT not in bench.cluster.pod("llama-0-1")["metadata"]["annotations"]
    )
    bench.cluster.start("llama-1-1", "10.0.0.2")
    await bench.settle()
    zero, one = assigned(bench, "llama-0-1"), assigned(bench, "llama-1-1")
    assert (zero["rank"], one["rank"], one["size"], one["generation"]) == (0, 1, 2, 1)
    assert zero["leader"] == one["leader"] == f"10.0.0.1:{names.MEETING_PORT}"
    assert zero["nonce"] == one["nonce"] == bench.status.assignment.nonce
    assert len(zero["nonce"]) >= 16


async def test_running_waits_for_the_first_step(bench: Bench) -> None:
    await bench.submit()
    await bench.settle()
    for name in bench.member_pods():
        bench.cluster.schedule(name)
        bench.cluster.set_status(name, podIP="10.0.0.9", phase="Running")
    await bench.settle()
    bench.report(Progress(), Phase.FIRST_STEP)
    for name in bench.member_pods():
        bench.cluster.start(name)
    await bench.settle()
    assert bench.condition(names.RUNNING) == ("False", "WorldStarting")
    assert bench.status.phase is JobPhase.STARTING
    bench.report(FORTY)
    await bench.settle()
    assert bench.status.phase is JobPhase.RUNNING


async def test_a_leader_that_can_not_be_asked_does_not_hide_that_all_is_well(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    assert bench.condition(names.RUNNING) == ("False", "WorldStarting")
    bench.cluster.advance(60)
    await bench.settle()
    assert bench.condition(names.RUNNING) == ("True", "LeaderSilent")


async def test_the_leaders_word_completes_the_job_even_if_nobody_watched(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    bench.cluster.finish("llama-0-1", 0, message(Result.COMPLETE, DONE))
    await bench.settle()
    assert bench.condition(names.COMPLETE) == ("True", "Completed")
    status = bench.status
    assert (status.phase, status.progress.summary) == (JobPhase.COMPLETE, "100/100")
    assert (status.workers.active, status.replicas) == (0, 0)  # though the other has yet to end
    assert status.progress.first_loss == 9.0
    assert status.workers.summary == "2/2"
    assert status.completion_time is not None
    assert "deletionTimestamp" not in bench.cluster.pod("llama-1-1")["metadata"]
    bench.cluster.advance(31)
    await bench.settle()
    assert "deletionTimestamp" in bench.cluster.pod("llama-1-1")["metadata"]
    assert "llama-0-1" in [p["metadata"]["name"] for p in bench.cluster.pods()]


async def test_exit_zero_without_the_marker_is_a_failure(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    bench.cluster.finish("llama-0-1", 0)
    await bench.settle()
    assert bench.condition(names.COMPLETE) is None
    assert bench.status.attempts[-1].reason == "NoCompletionMarker"


async def test_a_deleted_pod_is_replaced_for_free_and_the_others_stay(bench: Bench) -> None:
    await bench.submit()
    await bench.train(FORTY)
    keep = bench.cluster.pod("llama-0-1")["metadata"]["uid"]
    bench.cluster.remove(Kind.POD, "llama-1-1")
    await bench.settle()
    assert bench.member_pods() == ["llama-0-1", "llama-1-2"]
    bench.cluster.start("llama-1-2")
    await bench.settle()
    # The one that leaves is still saving together with the others: nobody is told yet.
    assert assigned(bench, "llama-0-1")["generation"] == 1
    bench.cluster.finish("llama-1-1", ExitCode.PREEMPTED)
    await bench.settle()
    assert assigned(bench, "llama-0-1")["generation"] == 2
    assert assigned(bench, "llama-1-2")["generation"] == 2
    assert bench.cluster.pod("llama-0-1")["metadata"]["uid"] == keep
    status = bench.status
    assert (status.restarts.total, status.restarts.charged) == (1, 0)
    assert status.restarts.by_reason == {"PodDeleted": 1}
    attempt = status.attempts[0]
    assert (attempt.step, attempt.checkpoint_step, attempt.lost_seconds) == (42, 40, 4.0)
    assert bench.status.phase is JobPhase.RESTARTING
    bench.report(FORTY)
    await bench.settle()
    assert bench.condition(names.RESTARTING) == ("False", "Training")


async def test_a_pod_that_never_leaves_is_written_off(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    bench.cluster.remove(Kind.POD, "llama-1-1")
    await bench.settle()
    bench.cluster.start("llama-1-2")
    wake = await bench.settle()
    grace = bench.cluster.pod("llama-1-1")["metadata"]["deletionGracePeriodSeconds"]
    assert wake == grace + 10
    bench.cluster.advance(wake)
    await bench.settle()
    assert assigned(bench, "llama-0-1")["generation"] == 2


async def test_a_lost_node_is_not_waited_for(bench: Bench) -> None:
    node = {"metadata": {"name": "bad"}, "status": {"conditions": [condition("Ready", "Unknown")]}}
    await bench.cluster.create(Kind.NODE, "", node)
    await bench.submit()
    await bench.settle()
    bench.cluster.start("llama-0-1")
    bench.cluster.start("llama-1-1", node="bad")
    await bench.settle()
    bench.cluster.remove(Kind.POD, "llama-1-1")
    await bench.settle()
    bench.cluster.start("llama-1-2")
    await bench.settle()
    assert assigned(bench, "llama-1-2")["generation"] == 2
    assert bench.status.restarts.by_reason == {"NodeLost": 1}


async def test_a_crash_is_charged_waits_and_keeps_the_evidence(bench: Bench) -> None:
    await bench.submit(recovery={"maxRestarts": 3, "backoffSeconds": 8})
    await bench.train(FORTY)
    await bench.crash()
    tail = "line of a log\n" * 200 + "boom"
    last_words = Failure(rank=3, exit_code=139, signal="SIGSEGV", message=tail)
    said = message(Result.FAILED, generation=2, rank=1, failure=last_words)
    bench.cluster.finish("llama-1-2", 1, said)
    assert await bench.settle() == 8
    assert "llama-1-3" not in str(bench.cluster.pods())
    assert bench.status.phase is JobPhase.RESTARTING
    assert "in 8 s" in next(c.message for c in bench.status.conditions if c.type == "Restarting")
    bench.cluster.advance(8)
    await bench.train()
    attempt = bench.status.attempts[-1]
    assert (attempt.rank, attempt.signal, attempt.exit_code) == (3, "SIGSEGV", 139)
    assert attempt.charged
    assert attempt.message.startswith("worker 1 (llama-1-2) exited with 1: ")
    assert attempt.message.endswith("line of a log\nboom")
    assert bench.cluster.pod("llama-1-2")["status"]["phase"] == "Failed"
    assert bench.metrics.restarts.labels("RankFailed")._value.get() == 1


async def test_evidence_is_kept_though_the_watch_still_shows_a_running_pod(bench: Bench) -> None:
    """A new operator's first list may be older than what the last one wrote down."""
    await bench.submit()
    await bench.train(FORTY)
    running = bench.cluster.pods()
    await bench.crash()
    await bench.settle()
    assert bench.member_pods() == ["llama-0-1", "llama-1-2"]
    bench.stale = running
    await bench.round()
    assert bench.cluster.pod("llama-1-1")["status"]["phase"] == "Failed"


async def test_one_failure_seen_worker_by_worker_is_charged_once(bench: Bench) -> None:
    await bench.submit(recovery={"backoffSeconds": 5}, workers={"replicas": 3})
    await bench.train()
    # The meeting gives all agents the same verdict, and their pods end one after another.
    verdict = Failure(rank=1, exit_code=1, message="boom")
    for index, name in enumerate(["llama-1-1", "llama-0-1", "llama-2-1"]):
        bench.cluster.finish(name, 1, message(Result.FAILED, rank=index, failure=verdict))
        await bench.settle()
    status = bench.status
    assert (status.restarts.charged, status.restarts.total) == (1, 1)
    assert [attempt.generation for attempt in status.attempts] == [1]
    assert bench.member_pods() == ["llama-0-2", "llama-1-2", "llama-2-2"]
    await bench.train()
    assert assigned(bench, "llama-0-2")["generation"] == 2


async def test_a_new_checkpoint_forgives(bench: Bench) -> None:
    await bench.submit(recovery={"maxRestarts": 1, "backoffSeconds": 0})
    await bench.train()
    for step in (10, 20, 30):
        report = CHECKPOINT.model_copy(update={"step": step})
        bench.report(Progress(step=step, steps=100, checkpoint=report))
        bench.cluster.advance(11)
        await bench.settle()
        await bench.crash()
    assert bench.condition(names.FAILED) is None
    await bench.crash()
    assert bench.condition(names.FAILED) == ("True", "BackoffLimitExceeded")


async def test_a_new_generation_is_told_which_checkpoint_must_be_there(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    assert bench.told("llama-0-1").saved_step is None
    for step in (10, 20):
        report = CHECKPOINT.model_copy(update={"step": step})
        bench.report(Progress(step=step, steps=100, checkpoint=report))
        bench.cluster.advance(11)
        await bench.settle()
    assert bench.told("llama-0-1").saved_step is None  # nobody is told anew within a generation
    await bench.crash()
    assert {bench.told(name).saved_step for name in bench.member_pods()} == {20}


@pytest.mark.parametrize(
    ("code", "reason"),
    [(ExitCode.CONFIG, "InvalidConfiguration"), (ExitCode.DO_NOT_RETRY, "DoNotRetry")],
)
async def test_final_exit_codes_are_never_retried(
    bench: Bench, code: ExitCode, reason: str
) -> None:
    await bench.submit()
    await bench.train()
    said = Failure(reason="Config", message="training.dataset_path: /nowhere doesn't exist")
    bench.cluster.finish("llama-0-1", 1)  # an echo that ended first
    bench.cluster.advance(1)
    bench.cluster.finish("llama-1-1", code, message(Result.CONFIG, rank=1, failure=said))
    await bench.settle()
    assert bench.condition(names.FAILED) == ("True", reason)
    failed = next(c for c in bench.status.conditions if c.type == names.FAILED)
    assert "/nowhere doesn't exist" in failed.message
    assert bench.status.restarts.total == 0


async def test_suspend_saves_and_resume_goes_on_in_a_new_generation(bench: Bench) -> None:
    await bench.submit()
    await bench.train(FORTY)
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
    await bench.settle()
    assert [assigned(bench, name)["orders"] for name in bench.member_pods()] == ["drain", "drain"]
    assert bench.condition(names.SUSPENDED) == ("True", "Suspended")
    assert bench.status.phase is JobPhase.SUSPENDED
    assert bench.status.start_time is None
    await bench.obey(FORTY)
    assert bench.cluster.pods() == []
    assert bench.condition(names.SUSPENDED) == ("True", "Suspended")
    assert len(bench.cluster.all(Kind.CONFIG_MAP)) == 1
    assert bench.status.restarts.total == 0
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": False}})
    await bench.train()
    assert bench.member_pods() == ["llama-0-2", "llama-1-2"]
    assert bench.condition(names.SUSPENDED) == ("False", "Resumed")
    assert bench.status.start_time is not None
    assert bench.events().count("Suspended") == 1
    assert "Resumed" in bench.events()


async def test_a_job_born_suspended_gets_nothing_until_resumed(bench: Bench) -> None:
    await bench.submit(suspend=True)
    await bench.settle()
    assert bench.cluster.pods() == []
    assert bench.condition(names.SUSPENDED) == ("True", "Suspended")
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": False}})
    await bench.train()
    assert len(bench.cluster.pods()) == 2


async def test_deleting_the_job_takes_everything_but_a_retained_claim(bench: Bench) -> None:
    await bench.submit()
    await bench.train(FORTY)
    bench.cluster.vanish(Kind.JOB, JOB)
    assert bench.cluster.pods() == []
    assert bench.cluster.all(Kind.CONFIG_MAP) == bench.cluster.all(Kind.NETWORK_POLICY) == []
    assert len(bench.cluster.all(Kind.CLAIM)) == 1
    assert await bench.round() is None
    assert "llama" not in str(list(bench.metrics.registry.collect()))


async def test_deadline(bench: Bench) -> None:
    await bench.submit(activeDeadlineSeconds=60)
    await bench.train()
    bench.cluster.advance(59)
    wake = await bench.settle()
    assert wake is not None
    assert wake <= 1
    bench.cluster.advance(1)
    await bench.settle()
    assert bench.condition(names.FAILED) == ("True", "DeadlineExceeded")
    assert all("deletionTimestamp" in p["metadata"] for p in bench.cluster.pods())


async def test_an_image_that_can_not_be_pulled_is_a_condition_and_costs_nothing(
    bench: Bench,
) -> None:
    await bench.submit()
    await bench.settle()
    bench.cluster.schedule("llama-0-1")
    for reason in ("ErrImagePull", "ImagePullBackOff", "ErrImagePull"):  # as the kubelet does
        waiting = {"reason": reason, "message": "no such image"}
        status = {"name": names.CONTAINER, "state": {"waiting": waiting}}
        bench.cluster.set_status("llama-0-1", containerStatuses=[status])
        await bench.settle()
    assert bench.condition(names.RUNNING) == ("False", "ImagePullBackOff")
    assert bench.events().count("ImagePullBackOff") == 1
    assert bench.status.attempts == ()


async def test_ttl_deletes_a_finished_job(bench: Bench) -> None:
    await bench.submit(ttlSecondsAfterFinished=100)
    await bench.train()
    for index, name in enumerate(bench.member_pods()):
        bench.cluster.finish(name, 0, message(Result.COMPLETE, DONE, rank=index))
    assert await bench.settle() == 100
    bench.cluster.advance(100)
    await bench.settle()
    assert bench.cluster.all(Kind.JOB) == []


async def test_a_finished_job_is_never_touched(bench: Bench) -> None:
    await bench.submit()
    await bench.train()
    for index, name in enumerate(bench.member_pods()):
        bench.cluster.finish(name, 0, message(Result.COMPLETE, DONE, rank=index))
    await bench.settle()
    before, writes = bench.status, len(bench.cluster.writes)
    for name in bench.member_pods():
        bench.cluster.vanish(Kind.POD, name)
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": True}})
    bench.cluster.advance(10_000)
    await bench.settle()
    assert bench.status == before
    assert len(bench.cluster.writes) == writes + 1  # the edit


async def test_jobs_of_another_controller_are_left_alone(bench: Bench) -> None:
    await bench.submit(managedBy="kueue.x-k8s.io/multikueue")
    writes = len(bench.cluster.writes)
    await bench.settle()
    assert len(bench.cluster.writes) == writes


async def test_an_invalid_spec_is_refused_once_and_heals(bench: Bench) -> None:
    await bench.submit(training={"dataset": "text", "steps": "many"}, workers={"replicas": 2})
    await bench.settle()
    await bench.settle()
    assert bench.condition(names.FAILED) == ("True", "Invalid")
    failed = next(c for c in bench.status.conditions if c.type == names.FAILED)
    assert "spec.training.steps" in failed.message
    assert bench.cluster.pods() == []
    assert bench.events() == ["Invalid"]
    assert bench.status.phase is JobPhase.FAILED
    training = {"dataset": "text", "datasetPath": "/data", "steps": 100}
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"training": training}})
    await bench.train()
    assert bench.condition(names.FAILED) == ("False", "Valid")
    assert len(bench.cluster.pods()) == 2


async def test_restarts_in_place_are_counted_once_though_the_leader_was_silent(
    bench: Bench,
) -> None:
    await bench.submit()
    await bench.train()

    def count(restarts: int) -> None:
        bench.report(FORTY)
        said = bench.workers.reports["llama-0-1"]
        again = said.model_copy(update={"restarts_in_place": restarts})
        bench.workers.reports["llama-0-1"] = again

    count(3)
    await bench.settle()
    assert bench.status.restarts.in_place == 3
    bench.cluster.vanish(Kind.POD, "llama-1-1")
    bench.workers.reports.clear()  # it is busy while the others meet
    bench.cluster.advance(11)
    await bench.train()
    count(4)
    bench.cluster.advance(11)
    await bench.settle()
    assert bench.status.restarts.in_place == 4
    bench.cluster.vanish(Kind.POD, "llama-0-1")
    bench.workers.reports.clear()
    await bench.train()
    bench.report(FORTY)
    bench.cluster.advance(11)
    await bench.settle()
    assert bench.status.restarts.in_place == 4


async def test_restarts_in_place_make_news_with_their_reason(bench: Bench) -> None:
    await bench.submit()
    await bench.train(FORTY)

    async def restarted(times: int, failure: Failure) -> dict[str, str]:
        bench.report(FORTY)
        said = bench.workers.reports["llama-0-1"]
        news = {"restarts_in_place": times, "last_failure": failure}
        bench.workers.reports["llama-0-1"] = said.model_copy(update=news)
        bench.cluster.advance(11)
        await bench.settle()
        events = [e for e in bench.cluster.all(Kind.EVENT) if e["reason"] == "RestartedInPlace"]
        newest = max(events, key=lambda event: int(event["metadata"]["resourceVersion"]))
        return {"count": str(len(events)), "type": newest["type"], "note": newest["note"]}

    killed = Failure(rank=3, signal="SIGKILL", message="killed by SIGKILL")
    assert await restarted(1, killed) == {
        "count": "1",
        "type": "Normal",
        "note": "ranks were started again in their pods; rank 3: RankFailed: killed by SIGKILL",
    }
    assert (await restarted(1, killed))["count"] == "1"
    hung = await restarted(3, Failure(rank=0, reason="Hung", message="no step for 61 s"))
    assert (hung["type"], hung["count"]) == ("Warning", "2")
    assert "2 times; rank 0: Hung" in hung["note"]


@pytest.mark.parametrize("result", [Result.COMPLETE, Result.FAILED])
async def test_what_the_leader_leaves_behind_counts_its_last_restarts_in_place(
    bench: Bench, result: Result
) -> None:
    await bench.submit()
    await bench.train(FORTY)
    said = message(result, DONE).model_copy(update={"restarts_in_place": 2})
    bench.cluster.finish("llama-0-1", 0 if result is Result.COMPLETE else 1, said)
    await bench.train()
    assert bench.status.restarts.in_place == 2
    if result is Result.FAILED:
        bench.workers.reports.clear()
        bench.report(FORTY)
        bench.cluster.advance(11)
        await bench.settle()
        assert bench.status.restarts.in_place == 2


async def test_hang_deadlines_that_the_user_set_reach_the_members_and_may_change(
    bench: Bench,
) -> None:
    await bench.submit()
    await bench.train(FORTY)
    assert "hang" not in assigned(bench, "llama-1-1")
    for hang, told in (
        ({"stepSeconds": 20, "loadSeconds": 1800}, {"step": 20.0}),
        ({"stepSeconds": 30, "firstStepSeconds": 60}, {"firstStep": 60.0, "step": 30.0}),
        (None, None),
    ):
        bench.cluster.edit(Kind.JOB, JOB, {"spec": {"recovery": {"hang": None}}})
        bench.cluster.edit(Kind.JOB, JOB, {"spec": {"recovery": {"hang": hang}}})
        await bench.settle()
        for name in bench.member_pods():
            assert assigned(bench, name).get("hang") == told
    assert bench.status.assignment.generation == 1


async def test_members_keep_their_hang_deadlines_while_the_spec_is_invalid(bench: Bench) -> None:
    await bench.submit(recovery={"hang": {"saveSeconds": 7200}})
    await bench.train(FORTY)
    bench.cluster.edit(Kind.JOB, JOB, {"spec": {"suspend": True, "training": {"steps": "many"}}})
    await bench.settle()
    word = assigned(bench, "llama-1-1")
    assert (word["orders"], word["hang"]) == ("drain", {"save": 7200.0})


async def test_the_grace_period_of_new_pods_follows_the_time_saves_take(bench: Bench) -> None:
    await bench.submit()
    slow = CHECKPOINT.model_copy(update={"seconds": 100.0})
    await bench.train(FORTY.model_copy(update={"checkpoint": slow}))
    assert bench.status.checkpoint.seconds == 100.0
    bench.cluster.vanish(Kind.POD, "llama-1-1")
    await bench.settle()
    spec = bench.cluster.pod("llama-1-2")["spec"]
    env = {item["name"]: item.get("value") for item in spec["containers"][0]["env"]}
    assert spec["terminationGracePeriodSeconds"] == 2 * 100 + 2 * 2 + 30
    assert env[names.ENV_GRACE_SECONDS] == "234"


async def test_a_job_too_large_for_the_gpus_it_names_is_warned_and_runs(bench: Bench) -> None:
    huge = {
        "model": {"flavor": "405B"},
        "workers": {
            "replicas": 2,
            "processesPerWorker": 8,
            "podTemplate": {"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}},
        },
    }
    await bench.submit(**huge)
    await bench.settle()
    assert bench.events().count("MayRunOutOfMemory") == 1
    (event,) = [e for e in bench.cluster.all(Kind.EVENT) if e["reason"] == "MayRunOutOfMemory"]
    assert event["type"] == "Warning"
    assert "GiB are needed on each h100-80" in event["note"]
    assert len(bench.cluster.pods()) == 2


async def test_gpus_that_no_process_uses_are_warned_of(bench: Bench) -> None:
    await bench.submit(workers={"resources": {"limits": {"nvidia.com/gpu": 8}}})
    await bench.settle()
    (event,) = [e for e in bench.cluster.all(Kind.EVENT) if e["reason"] == "GpusIdle"]
    assert event["type"] == "Warning"
    assert event["note"] == (
        "each worker has 8 GPUs by resources.limits for processesPerWorker 1, one GPU each, so 7 "
        "of them do nothing"
    )
