"""The base of everything users write: configuration sections and the spec of a PretrainJob.

Sections are written by people in three notations: camelCase in YAML, snake_case in TOML and on the
command line. One model reads them all: the field is snake_case, its alias camelCase, both are
accepted. Everything is strict, because "8" for 8 or "yes" for true is a mistake the Kubernetes API
server refuses as well, and the two must agree. An unknown key is an error, never ignored.

What a type can't say is a :class:`Rule`, written twice in one place: as CEL for the API server and
as a Python predicate for everybody else. A test gives both the same inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import InitErrorDetails, PydanticCustomError

MAX_LIST = 256  # items; bounds the cost of the rules the API server evaluates
MAX_TEXT = 1024  # characters of a path, name or description
MAX_INT = 2**31 - 1

Positive = Annotated[int, Field(ge=1, le=MAX_INT)]
NonNegative = Annotated[int, Field(ge=0, le=MAX_INT)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
# Tuples keep a frozen model hashable; not strict, because JSON, TOML and YAML all bring lists.
Names = Annotated[tuple[Text, ...], Field(strict=False, max_length=MAX_LIST)]


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition over several fields of one section.

    ``cel`` and ``holds`` say the same of ``self``; ``message`` is what is wrong when they don't
    hold. ``explain`` may give a better sentence than the static one, such as one with the legal
    values. ``field`` is the snake_case field to blame, if it is one.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]
    field: str | None = None
    explain: Callable[[Any], str] | None = None

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
        alias_generator=to_camel,
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
                type=PydanticCustomError("rule", "{sentence}", {"sentence": rule.sentence(self)}),
                loc=(_alias(type(self), rule.field),) if rule.field else (),
                input=getattr(self, rule.field) if rule.field else None,
            )
            for rule in self.rules
            if not rule.holds(self)
        ]
        if broken:
            raise ValidationError.from_exception_data(type(self).__name__, broken)
        return self


def _alias(model: type[BaseModel], field: str) -> str:
    return model.model_fields[field].alias or field
