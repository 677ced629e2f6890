"""What is said about settings that don't come out even."""

from dataclasses import dataclass

Value = int | str | bool
MAX_OFFERS = 8


class MeshError(ValueError):
    """Degrees or batch sizes that don't come out even; ``key`` names the setting to change."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule that doesn't hold.

    Attributes:
        key: setting to blame, snake_case with its section.
        wrong: what is wrong, without what to do.
        values: values of ``key`` with which this rule would hold; others may not.
        near: number the offered values should be near to.
        otherwise: what to do where no value of ``key`` helps.
    """

    key: str
    wrong: str
    values: tuple[Value, ...] = ()
    near: int = 0
    otherwise: str = ""


def offer(values: tuple[Value, ...], near: int) -> str:
    """A sentence's end that names values to use; numbers are those nearest, in order."""
    if -1 in values or len(values) == 1:
        return "use " + " or ".join(map(_written, values))
    numbers = tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))
    if len(numbers) == len(values):
        return f"use one of {nearest(numbers, near)}"
    return f"use one of {', '.join(map(_written, values))}"


def nearest(numbers: tuple[int, ...], near: int) -> str:
    """At most eight of the numbers, those nearest, in order and with commas."""
    chosen = sorted(sorted(numbers, key=lambda n: abs(n - near))[:MAX_OFFERS])
    return ", ".join(map(str, chosen))


def _written(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
