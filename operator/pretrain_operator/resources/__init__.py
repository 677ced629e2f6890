"""Pure builders of the objects a job consists of: plain dictionaries, nothing read, nothing sent.

Names are deterministic, so that creating an object twice is refused instead of doubling it.
"""

from pretrain_operator.resources.config import build_config, config_name
from pretrain_operator.resources.networkpolicy import build_policy, policy_name
from pretrain_operator.resources.pods import avoiding, build_pod, grace_seconds, pod_name
from pretrain_operator.resources.volumes import build_claim, claim_name, own_claim_name

__all__ = [
    "avoiding",
    "build_claim",
    "build_config",
    "build_pod",
    "build_policy",
    "claim_name",
    "config_name",
    "grace_seconds",
    "own_claim_name",
    "pod_name",
    "policy_name",
]
