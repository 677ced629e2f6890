"""Tables say what was measured, and no percentile of a handful of values."""

import pytest

from pretrain_bench.report import (
    percentile_95,
    repeats,
    replace_between,
    seconds,
    summary,
)
from pretrain_bench.stages import Recovery


def recovery(total: float, repeated: int = 2, **stages: float) -> Recovery:
    return Recovery("rank killed", total, stages, repeated, repeated * 0.25, 1, 40)


def test_p95_comes_with_twenty_values() -> None:
    assert percentile_95(range(19)) is None
    assert percentile_95(range(101)) == 95


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0.00"), (9.994, "9.99"), (31.26, "31.3")]
)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_a_row_has_spread_and_medians() -> None:
    every = [recovery(1.0, detect=0.2), recovery(3.0, detect=0.6), recovery(1.5, meet=0.1)]
    header, _, row = summary({"rank killed": every}, {"rank killed": 2.0}).splitlines()
    cells = dict(zip(header.split("|")[1:-1], row.split("|")[1:-1], strict=True))
    shown = {key.strip(): value.strip() for key, value in cells.items()}
    assert shown["fault"] == "rank killed"
    assert [shown[key] for key in ("n", "median", "aim", "p95", "min", "max")] == [
        "3", "1.50", "2.00", "-", "1.00", "3.00",
    ]  # fmt: skip
    assert [shown[key] for key in ("detect", "meet", "load", "recompute")] == [
        "0.40", "0.10", "-", "0.50",
    ]  # fmt: skip


def test_every_repeat_is_told() -> None:
    text = repeats({"rank killed": [recovery(1.0, 3), recovery(2.5, 0)]})
    assert "| rank killed | 1.00 (3), 2.50 (0) |" in text


def test_only_what_is_between_the_markers_is_replaced() -> None:
    page = "before\n<!-- soak: begin -->\nold\n<!-- soak: end -->\nafter\n"
    new = replace_between(page, "soak", "new \\1\n")
    assert new == "before\n<!-- soak: begin -->\nnew \\1\n<!-- soak: end -->\nafter\n"
    with pytest.raises(ValueError, match="markers of recovery"):
        replace_between(page, "recovery", "new")
