"""The status page: one file without anything from elsewhere, and what it asks for every two seconds."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

import msgspec

from crablb.api import types
from crablb.control.metrics.facts import Facts

__all__ = ["Board", "board", "document", "encoded", "headers"]

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
    found: dict[str, list[types.Backend]] = {}
    for backend in facts.backends:
        if (wanted in backend.service or wanted in backend.address) and (_trouble(backend) or not ill):
            found.setdefault(backend.service, []).append(backend)
    count = sum(map(len, found.values()))
    services = [service for service in facts.services if service.vip in found]
    if count > MOST:  # else all stay in their order
        services.sort(key=lambda service: -sum(map(_trouble, found[service.vip])))
        for backends in found.values():
            backends.sort(key=lambda backend: not _trouble(backend))
    told: list[types.Backend] = []
    shown = []
    for service in services:
        if len(told) < MOST:
            shown.append(service)
            told += found[service.vip][: MOST - len(told)]
    return Board(
        at=facts.at,
        status=facts.status,
        services=shown,
        backends=told,
        backends_found=count,
        events=facts.events[-EVENTS:],
    )


def encoded(facts: Facts, wanted: str = "", *, ill: bool = False) -> bytes:
    """The board as JSON."""
    return msgspec.json.encode(board(facts, wanted, ill=ill))
