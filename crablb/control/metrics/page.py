"""The status page: one file without anything from elsewhere, and what it asks for every two seconds."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from functools import cache
from importlib.resources import files

import msgspec

from crablb.api import types
from crablb.control.metrics.facts import Facts

__all__ = ["Board", "board", "document", "headers", "packed"]

#: Backends told at once, at most; services without some that are told as well.
MOST = 500
#: Events told.
EVENTS = 20


class Board(types.Answer, frozen=True, kw_only=True):
    """What the page shows."""

    at: float
    status: types.Status
    services: list[types.Service]  # those of `backends`, those in trouble first
    backends: list[types.Backend]
    backends_found: int  # that were asked for, of which `backends` are the first
    events: list[types.Event]  # the newest last


@cache
def document(api: str = "") -> bytes:
    """The page.  ``api``: the path of the API beside it, if who sees the page may change something by it."""
    text = files(__package__).joinpath("page.html").read_text("utf-8")
    if api:
        text = text.replace("<body>", f'<body data-api="{api}">', 1)
    return text.encode()


@cache
def headers() -> dict[str, str]:
    """Of the page's answer: nothing but the page's own script and style runs, and nothing is fetched from elsewhere."""

    def allowed(tag: str) -> str:
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", document().decode(), re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


def _trouble(backend: types.Backend) -> bool:
    return not backend.serving or backend.healthy is False


def board(facts: Facts, wanted: str = "", *, ill: bool = False) -> Board:
    """``wanted``: a part of a service's or a backend's address; ``ill``: only backends in trouble."""
    by_service: dict[str, list[types.Backend]] = {}
    for backend in facts.backends:
        if wanted in backend.service or wanted in backend.address:
            by_service.setdefault(backend.service, []).append(backend)
    found = {
        vip: [b for b in backends if _trouble(b)] if ill else sorted(backends, key=lambda b: not _trouble(b))
        for vip, backends in by_service.items()
    }
    services = [service for service in facts.services if found.get(service.vip)]
    if sum(map(len, found.values())) > MOST:  # else they stay in their order
        services.sort(key=lambda service: -sum(map(_trouble, found[service.vip])))
    else:
        found = {vip: [b for b in backends if b in set_] for vip, backends in by_service.items() if (set_ := found[vip])}
    told: list[types.Backend] = []
    for count, service in enumerate(services):
        room = MOST - len(told)
        if room <= 0:
            services = services[:count]
            break
        told += found[service.vip][:room]
    return Board(
        at=facts.at,
        status=facts.status,
        services=services,
        backends=told,
        backends_found=sum(map(len, found.values())),
        events=facts.events[-EVENTS:],
    )


def packed(facts: Facts, wanted: str = "", *, ill: bool = False) -> bytes:
    """The board as JSON, by gzip."""
    return gzip.compress(msgspec.json.encode(board(facts, wanted, ill=ill)), 1)
