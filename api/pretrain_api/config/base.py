"""The base of every configuration section.

Sections are written by people in three notations: camelCase in YAML, snake_case in TOML and on the
command line. One model reads them all: the field is snake_case, its alias camelCase, both are
accepted. Everything is strict, because "8" for 8 or "yes" for true is a mistake the Kubernetes API
server refuses as well, and the two must agree. An unknown key is an error, never ignored.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

MAX_LIST = 256  # items; bounds the cost of the rules the API server evaluates
MAX_TEXT = 1024  # characters of a path, name or description
MAX_INT = 2**31 - 1

Positive = Annotated[int, Field(ge=1, le=MAX_INT)]
NonNegative = Annotated[int, Field(ge=0, le=MAX_INT)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
# Tuples keep a frozen model hashable; not strict, because JSON, TOML and YAML all bring lists.
Names = Annotated[tuple[Text, ...], Field(strict=False, max_length=MAX_LIST)]


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
