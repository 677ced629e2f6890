"""The base of everything users write: configuration sections and the spec of a PretrainJob.

Sections are written by people in three notations: camelCase in YAML, snake_case in TOML and on the
command line. One model reads them all: the field is snake_case, its alias camelCase, both are
accepted. Everything is strict, because "8" for 8 or "yes" for true is a mistake the Kubernetes API
server refuses as well, and the two must agree. An unknown key is an error, never ignored.

What a type can't say is a :class:`Rule`, written twice in one place: as CEL for the API server and
as a Python predicate for everybody else. A test gives both the same inputs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, LiteralString, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import InitErrorDetails, PydanticCustomError

MAX_LIST = 256  # items; bounds the cost of the rules the API server evaluates
MAX_TEXT = 1024  # characters of a path, name or description
MAX_INT = 2**31 - 1

Positive = Annotated[int, Field(ge=1, le=MAX_INT)]
NonNegative = Annotated[int, Field(ge=0, le=MAX_INT)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
# No control characters: a path or a name ends up in logs and messages.
PathText = Annotated[str, Field(max_length=MAX_TEXT, pattern=r"^[^\x00-\x1f\x7f]*$")]
# Paths that are not what they seem, and paths that leave the folder they are joined to.
_DOTS = r"(^|/)[.][.]?(/|$)|//"
CLIMBS = re.compile(_DOTS)
LEAVES = re.compile("^/|" + _DOTS)
# Tuples keep a frozen model hashable; not strict, because JSON, TOML and YAML all bring lists.
Names = Annotated[tuple[Text, ...], Field(strict=False, max_length=MAX_LIST)]


def alias(name: str) -> str:
    """The camelCase spelling of a field; the initialism is Kubernetes' own."""
    return "downwardAPI" if name == "downward_api" else to_camel(name)


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition over several fields of one section.

    ``cel`` and ``holds`` say the same of ``self``; ``message`` is what is wrong when they don't
    hold. ``explain`` may give a better sentence than the static one, such as one with the legal
    values. ``path`` is the key to blame, if it is one: snake_case, dotted. With ``alone`` the CEL
    is about the value there and nothing else, and is asked only where there is one.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]
    path: str = ""
    explain: Callable[[Any], str] | None = None
    kind: LiteralString = "rule"  # type of the error; "unsupported" is about one value alone
    alone: bool = False

    def sentence(self, section: Any) -> str:
        """What is wrong with this section."""
        return self.explain(section) if self.explain else self.message


@dataclass(frozen=True, slots=True)
class Transition:
    """A condition over an update, which only the API server sees: CEL over self and oldSelf."""

    cel: str
    message: str


class Section(BaseModel):
    """Frozen, strict, closed; accepts snake_case and camelCase, writes either."""

    model_config = ConfigDict(
        alias_generator=alias,
        populate_by_name=True,
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()
    transitions: ClassVar[tuple[Transition, ...]] = ()

    @model_validator(mode="after")
    def _keeps_rules(self) -> Self:
        broken = [
            InitErrorDetails(
                # The sentence goes in as context: its own braces are no placeholders.
                type=PydanticCustomError(
                    rule.kind, "{sentence}", {"sentence": rule.sentence(self)}
                ),
                loc=tuple(aliases(rule.path)),
                input=value_at(self, rule.path) if rule.path else None,
            )
            for rule in self.rules
            if not rule.holds(self)
        ]
        if broken:
            raise ValidationError.from_exception_data(type(self).__name__, broken)
        return self


def value_at(section: Any, path: str) -> Any:
    """The value of a dotted snake_case path below a section; None where a section is missing."""
    for name in path.split("."):
        section = getattr(section, name, None)
    return section


def aliases(path: str) -> list[str]:
    """The camelCase spelling of a dotted path, in parts."""
    return [alias(name) for name in path.split(".")] if path else []


def optional(path: str) -> tuple[str, str]:
    """CEL for a path whose parts may all be missing: whether it is there, and its value."""
    parts = ["self", *aliases(path)]
    steps = [".".join(parts[: end + 1]) for end in range(1, len(parts))]
    return "(" + " && ".join(f"has({step})" for step in steps) + ")", steps[-1]


def or_else(path: str, default: str) -> str:
    """CEL for the value at a path, or the default where it is missing."""
    present, value = optional(path)
    return f"({present} ? {value} : {default})"


def cel_mismatch(pattern: re.Pattern[str], value: str) -> str:
    """CEL that is true if the value of the CEL expression has no match of the pattern."""
    return f"!{value}.matches(r'{pattern.pattern}')"
