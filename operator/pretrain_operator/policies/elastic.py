"""How many workers train together."""

from pretrain_operator.observe import Observation


def target_size(seen: Observation) -> int:
    """Workers of the generation that follows a pause."""
    return len(seen.members)
