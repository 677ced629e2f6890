"""Cutting a model into parts of a pipeline that take about the same time.

A pipeline is as slow as its slowest part, so the largest part is made as small as it can be. That
leaves a choice, often between equal parts and a full one beside an empty one; so of all cuts with
the same largest part the most even is taken, because parts are memory as well.
"""

from collections.abc import Sequence
from itertools import accumulate


def balanced(costs: Sequence[int], parts: int) -> tuple[int, ...]:
    """How many neighbours go into each part, in order; no part is empty.

    The largest sum of costs in a part is minimal. Among such cuts the sum of the squares of the
    parts' costs is minimal too.

    Args:
        costs: of the pieces, none negative, in any unit.
        parts: at least 1 and at most as many as there are pieces.

    Raises:
        ValueError: there are fewer pieces than parts, or no parts.
    """
    if not 1 <= parts <= len(costs):
        raise ValueError(f"{len(costs)} pieces can't make {parts} parts")
    sums = list(accumulate(costs, initial=0))
    limit = _smallest_limit(costs, parts)
    # By the number of pieces in the first parts: the sum of squares and the sizes of these parts.
    # Only cuts within the limit are there.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for later in range(parts - 1, -1, -1):
        longer: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start, (squares, sizes) in best.items():
            for end in range(start + 1, len(costs) - later + 1):
                cost = sums[end] - sums[start]
                if cost > limit:
                    break
                found = (squares + cost**2, (*sizes, end - start))
                longer[end] = min(longer.get(end, found), found)
        best = longer
    return best[len(costs)][1]


def _smallest_limit(costs: Sequence[int], parts: int) -> int:
    """The smallest sum that no part has to exceed."""
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if _needed(costs, middle) <= parts:
            high = middle
        else:
            low = middle + 1
    return low


def _needed(costs: Sequence[int], limit: int) -> int:
    """Parts that are needed if each is filled up to the limit."""
    parts, filled = 1, 0
    for cost in costs:
        if filled + cost > limit:
            parts, filled = parts + 1, 0
        filled += cost
    return parts
