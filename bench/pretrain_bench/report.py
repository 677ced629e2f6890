"""Renders measurements: one table of medians and spread, one list of all repeats. Pure."""

import re
import statistics
from collections.abc import Mapping, Sequence

from pretrain_bench.stages import STAGES, Recovery

P95_FROM = 20  # repeats; of fewer, the 95th percentile is the maximum by another name
MARKERS = "<!-- {0}: begin -->\n{1}<!-- {0}: end -->\n"


def percentile_95(values: Sequence[float]) -> float | None:
    """The 95th percentile, None of fewer than 20 values."""
    if len(values) < P95_FROM:
        return None
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def seconds(value: float | None) -> str:
    """Seconds for people; a dash for what there is not."""
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, all others to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def summary(recoveries: Mapping[str, Sequence[Recovery]], aims: Mapping[str, float | None]) -> str:
    """A row for each fault: totals with their spread, then the median of each stage."""
    header = ["fault", "n", "median", "aim", "p95", "min", "max", *STAGES, "recompute"]
    return table(header, [_row(name, each, aims.get(name)) for name, each in recoveries.items()])


def _row(name: str, recoveries: Sequence[Recovery], aim: float | None) -> list[str]:
    totals = [recovery.total for recovery in recoveries]
    spread = [statistics.median(totals), aim, percentile_95(totals), min(totals), max(totals)]
    stages = [_median([recovery.stages.get(stage) for recovery in recoveries]) for stage in STAGES]
    recompute = _median([recovery.recompute for recovery in recoveries])
    cells = [seconds(value) for value in (*spread, *stages, recompute)]
    return [name, str(len(totals)), *cells]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def repeats(recoveries: Mapping[str, Sequence[Recovery]]) -> str:
    """Every total and the steps repeated after it, in the order they were measured."""
    rows = [
        [name, ", ".join(f"{each.total:.2f} ({each.repeated})" for each in list_)]
        for name, list_ in recoveries.items()
    ]
    return table(["fault", "seconds (steps repeated)"], rows)


def replace_between(document: str, name: str, text: str) -> str:
    """The document with ``text`` between the markers of ``name``.

    Raises ValueError if it has no such markers.
    """
    pattern = re.compile(rf"<!-- {name}: begin -->\n.*?<!-- {name}: end -->\n", re.DOTALL)
    result, count = pattern.subn(lambda _: MARKERS.format(name, text), document)
    if count != 1:
        raise ValueError(
            f"the document needs the markers of {name} once, and has them {count} times"
        )
    return result
