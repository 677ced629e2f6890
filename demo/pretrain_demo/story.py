"""The demo itself: apply a job, kill a worker in the middle, watch it come back and finish."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from pretrain_api import names
from pretrain_demo.console import Console
from pretrain_demo.install import ensure_namespace
from pretrain_demo.job import Snapshot, status_path
from pretrain_demo.target import DemoError, Target, repository

NAMESPACE = "pretrain-demo"
EXAMPLE = "manifests/examples/02-two-workers.yaml"
JOB = "pair"
VICTIM = "1"  # index of the worker that is killed
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 1200.0  # for each chapter; the first one includes pulling gigabytes


@dataclass(frozen=True)
class Kill:
    """What was lost when a worker died."""

    pod: str
    step: int  # last reported before
    seconds: float  # until the job had passed that step again


def play(target: Target, console: Console) -> None:
    """Tell the whole story. Raises DemoError if the job doesn't end well."""
    clear_stage(target)
    console.heading(f"kubectl apply -f {EXAMPLE}")
    target.kubectl("apply", f"--namespace={NAMESPACE}", "-f", str(repository() / EXAMPLE))
    watch(target, console, worth_killing, "there was a checkpoint to come back to")
    kill = kill_worker(target, console)
    console.heading("On to the end")
    last = watch(target, console, lambda job: job.holds(names.COMPLETE), "the job was complete")
    console.heading("Done")
    for line in summary(last, kill):
        console.say(line)
    flags = " ".join(target.kubectl_flags)
    console.say(f"look around: kubectl {flags} -n {NAMESPACE} describe pretrainjob {JOB}")


def clear_stage(target: Target) -> None:
    """Remove what an earlier demo left: the job and the claim that it deliberately kept."""
    ensure_namespace(target, NAMESPACE)
    where = f"--namespace={NAMESPACE}"
    target.kubectl("delete", names.PLURAL, JOB, where, "--ignore-not-found", "--timeout=120s")
    pods = f"{names.LABEL_JOB}={JOB}"
    target.kubectl("delete", "pods", where, f"--selector={pods}", "--now", "--timeout=120s")
    claim = f"{JOB}-checkpoint"
    target.kubectl("delete", "pvc", claim, where, "--ignore-not-found", "--timeout=120s")


def worth_killing(job: Snapshot) -> bool:
    """Whether there is something to lose and something to come back to."""
    return bool(
        job.holds(names.RUNNING)
        and job.checkpoint
        and job.checkpoint.step * 2 < job.steps
        and job.step > job.checkpoint.step
    )


def kill_worker(target: Target, console: Console) -> Kill:
    """Kill a worker without warning and wait until the job has made up for it."""
    before = read(target)
    selector = f"{names.LABEL_JOB}={JOB},{names.LABEL_WORKER}={VICTIM}"
    where = (f"--namespace={NAMESPACE}", f"--selector={selector}")
    pod = target.kubectl("get", "pods", *where, "-o", "jsonpath={.items[0].metadata.name}").strip()
    console.heading(f"Killing worker {VICTIM} at step {before.step}: kubectl delete pod {pod}")
    begin = time.monotonic()
    target.kubectl("delete", "pod", pod, f"--namespace={NAMESPACE}", "--force", "--grace-period=0")
    after = watch(
        target,
        console,
        lambda job: job.generation > before.generation and job.step > before.step,
        "the job had made up for the lost worker",
    )
    seconds = time.monotonic() - begin
    console.say(f"resumed from the checkpoint of step {after.resumed_from}")
    return Kill(pod, before.step, seconds)


def watch(
    target: Target, console: Console, until: Callable[[Snapshot], bool], what: str
) -> Snapshot:
    """Show the job until a condition holds. Raises DemoError if it fails, or takes for ever."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    job = None
    while not until(job := read(target).after(job)):
        console.live(job.line())
        if job.holds(names.FAILED):
            raise DemoError(f"the job failed, {job.reason(names.FAILED)}")
        if time.monotonic() > deadline:
            raise DemoError(f"gave up after {PATIENCE_SECONDS:.0f} s waiting until {what}")
        time.sleep(POLL_SECONDS)
    console.live(job.line())
    return job


def read(target: Target) -> Snapshot:
    """The job as it is now."""
    job = Snapshot.parse(
        target.kubectl("get", names.PLURAL, JOB, f"--namespace={NAMESPACE}", "-o", "json")
    )
    leader = job.pod(0)
    if leader is None or not job.holds(names.RUNNING):
        return job
    return job.heard(target.kubectl("get", "--raw", status_path(NAMESPACE, leader), check=False))


def summary(job: Snapshot, kill: Kill) -> list[str]:
    """What there is to remember, one line each."""
    reasons = job.status.restarts.by_reason if job.status.restarts else {}
    why = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    lines = [
        f"steps         {job.step} of {job.steps}",
        f"loss          {show(job.first_loss)} at first, {show(job.loss)} at last",
        f"restarts      {job.restarts} ({why or 'no reason given'})",
        f"seconds lost  {kill.seconds:.1f}, from the kill until past step {kill.step} again",
    ]
    if saved := job.checkpoint:
        claim = f"claim {JOB}-checkpoint"
        size = f"{saved.bytes / 1e6:.1f} MB"
        lines.append(f"checkpoint    step {saved.step}, {size}, {saved.path} in {claim}")
    return lines


def show(loss: float | None) -> str:
    """A loss for people."""
    return "unknown" if loss is None else f"{loss:.3f}"
