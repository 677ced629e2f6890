"""Settings of the operator, read from environment variables that begin with PRETRAIN_OPERATOR_.

A variable that can't be read is an error that names it; an unknown one is too, because a typo would
otherwise go unnoticed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

PREFIX = "PRETRAIN_OPERATOR_"


class SettingsError(ValueError):
    """A setting can't be read; the message names the variable."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything an administrator may choose, with the defaults of the chart."""

    namespaces: tuple[str, ...] = ()
    """Namespaces to watch; none means the whole cluster."""
    trainer_image: str = "pretrain-trainer:latest"
    """Image of workers whose job names none."""
    metrics_port: int = 9090
    """Port of /metrics; 0 switches it off."""
    health_port: int = 8080
    """Port of /healthz; 0 switches it off."""
    log_format: str = "text"
    """text for people, json for machines."""
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
    reconcilers: int = 16
    """Jobs that are reconciled at the same time."""
    lease_namespace: str = ""
    """Namespace of the Lease that one operator at a time holds; empty: no other one may run."""
    lease_name: str = "pretrain-operator"
    """Name of that Lease; operators that serve the same jobs use the same."""
    lease_identity: str = ""
    """Who holds it, unique for each process; empty: the host's name and a random number."""
    worker_peers: tuple[dict[str, Any], ...] = ()
    """Network policy peers, as JSON, that may read workers' status and metrics."""


def load(environ: Mapping[str, str]) -> Settings:
    """Read settings. Raises SettingsError with one sentence."""
    known = {field.name for field in fields(Settings)}
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in known:
            raise SettingsError(f"{variable}: no such setting; use one of {_variables(known)}")
        try:
            values[name] = _PARSERS.get(name, str)(text)
        except ValueError as error:
            raise SettingsError(f"{variable}: {error}") from error
    return Settings(**values)


def _variables(known: set[str]) -> str:
    return ", ".join(sorted(PREFIX + name.upper() for name in known))


def _namespaces(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    return tuple(_namespace(name) for name in found)


def _namespace(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", text):
        raise ValueError(f"{text!r} is no name of a namespace")
    return text


def _namespace_or_none(text: str) -> str:
    return _namespace(text) if text else ""


def _name(text: str) -> str:
    if len(text) > 253 or not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", text):
        raise ValueError(f"{text!r} is no name of an object")
    return text


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise ValueError(f"{text!r} is no port; use 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1000:
        raise ValueError(f"{text!r} must be a number from 1 to 1000")
    return int(text)


def _format(text: str) -> str:
    if text not in ("text", "json"):
        raise ValueError(f"{text!r} must be text or json")
    return text


def _level(text: str) -> str:
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError(f"{text!r} must be DEBUG, INFO, WARNING or ERROR")
    return text.upper()


def _image(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    return text


def _peers(text: str) -> tuple[dict[str, Any], ...]:
    try:
        return _PEERS.validate_json(text or "[]")
    except ValidationError as error:
        raise ValueError("must be a JSON list of network policy peers") from error


_PEERS = TypeAdapter(tuple[dict[str, Any], ...])
_PARSERS: Mapping[str, Any] = {
    "namespaces": _namespaces,
    "trainer_image": _image,
    "metrics_port": _port,
    "health_port": _port,
    "log_format": _format,
    "log_level": _level,
    "reconcilers": _count,
    "lease_namespace": _namespace_or_none,
    "lease_name": _name,
    "worker_peers": _peers,
}
