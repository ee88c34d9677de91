"""What checks had found out, as plain values that outlive a daemon."""

from __future__ import annotations

from typing import Any

import msgspec

from crablb.errors import ConfigError
from crablb.selection.standing import Pair
from crablb.values import parse_address, parse_vip

__all__ = ["Kept", "KeptCheck", "read"]


class KeptCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Of one check.  Times: seconds since 1970; 0: never."""

    type: str
    check: str  # which it was: another text is another check
    up: bool
    known: bool
    ok: bool | None
    streak: int
    percent: int
    drained: bool
    reason: str
    failure: str
    history: str
    seconds: float
    at: float
    since: float


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """Of a backend of a service."""

    service: str
    backend: str
    since: float
    checks: list[KeptCheck]


def read(entries: Any) -> dict[Pair, Kept]:
    """Raises :class:`ConfigError` if they are not what :class:`Kept` says, as a list."""
    try:
        kept = msgspec.convert(entries, list[Kept])
        return {(parse_vip(entry.service), parse_address(entry.backend)): entry for entry in kept}
    except (msgspec.ValidationError, ConfigError) as error:
        raise ConfigError(f"these are no results of checks: {error}") from None
