"""JSON merge patch (RFC 7386): the difference between what is stored and what should be."""

from collections.abc import Mapping
from typing import Any, cast

Json = Mapping[str, Any]


def merge_patch(before: Json, after: Json) -> dict[str, Any]:
    """Patch that turns ``before`` into ``after``; empty if they are equal."""
    patch: dict[str, Any] = {key: None for key in before if key not in after}
    for key, new in after.items():
        old = before.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = merge_patch(cast(Json, old), cast(Json, new))
            if inner:
                patch[key] = inner
        elif key not in before or old != new:
            patch[key] = new
    return patch


def apply_merge_patch(before: Json, patch: Json) -> dict[str, Any]:
    """``before`` with the patch applied, as the API server does it."""
    after = {key: value for key, value in before.items() if key not in patch}
    for key, new in patch.items():
        if isinstance(new, Mapping):
            old = before.get(key)
            base: Json = cast(Json, old) if isinstance(old, Mapping) else {}
            after[key] = apply_merge_patch(base, cast(Json, new))
        elif new is not None:
            after[key] = new
    return after
