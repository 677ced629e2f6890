"""Whether the checkpoint volume can be used, and what to do if not.

Only the cluster knows; so a problem is no error of the spec but a condition that goes away when the
claim is there or is mended.
"""

from dataclasses import dataclass

from pretrain_api.job import CheckpointVolume, PretrainJob
from pretrain_operator.observe import Claim, Observation, Surroundings
from pretrain_operator.resources import claim_name, config_name, policy_name


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why no pods are created for now."""

    reason: str
    message: str


def obstacle(seen: Observation, job: PretrainJob, around: Surroundings) -> Obstacle | None:
    """What keeps workers from being created, if anything."""
    return _taken_names(seen, around) or _claim_obstacle(seen, job, around.claim)


def _taken_names(seen: Observation, around: Surroundings) -> Obstacle | None:
    names_in_use = {
        f"ConfigMap {config_name(seen.name)}": around.config_is_ours,
        f"NetworkPolicy {policy_name(seen.name)}": around.policy_is_ours,
    }
    for what, is_ours in names_in_use.items():
        if is_ours is False:
            message = f"{what} exists but doesn't belong to this job; delete it or rename the job"
            return Obstacle("NameTaken", message)
    return None


def _claim_obstacle(seen: Observation, job: PretrainJob, claim: Claim | None) -> Obstacle | None:
    volume = job.spec.volumes.checkpoint
    if volume is None:
        return None
    name = claim_name(job)
    if claim is None:
        if volume.claim_template is not None:
            return None  # it is about to be created
        message = f"claim {name} (volumes.checkpoint.claimName) doesn't exist; create it"
        return Obstacle("ClaimMissing", message)
    if claim.leaving:
        return Obstacle("ClaimDeleted", f"claim {name} is being deleted; wait or name another")
    if claim.phase == "Lost":
        return Obstacle("ClaimLost", f"claim {name} has lost its volume; name another")
    return _foreign(seen, volume, claim) or _not_shared(job, claim)


def _foreign(seen: Observation, volume: CheckpointVolume, claim: Claim) -> Obstacle | None:
    if volume.claim_template is None or claim.job_uid == seen.uid:
        return None
    message = (
        f"claim {claim.name} was left by an earlier job of this name or by somebody else; delete "
        f"it, or name it with volumes.checkpoint.claimName in a job with a checkpoint.folder of "
        f"its own, which may start from what is there by checkpoint.initialLoadPath"
    )
    return Obstacle("ClaimTaken", message)


def _not_shared(job: PretrainJob, claim: Claim) -> Obstacle | None:
    workers = job.spec.workers.max_size
    modes = ", ".join(claim.access_modes) or "none"
    if workers > 1 and "ReadWriteMany" not in claim.access_modes:
        message = (
            f"claim {claim.name} has access modes {modes}, but {workers} workers write to it; use "
            f"a claim with ReadWriteMany or one worker"
        )
        return Obstacle("ClaimNotShared", message)
    if not any(mode.startswith("ReadWrite") for mode in claim.access_modes):
        message = f"claim {claim.name} has access modes {modes} and can't be written to"
        return Obstacle("ClaimReadOnly", message)
    return None
