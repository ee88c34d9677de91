"""Metrics and the status page by HTTP, to be read by whoever may connect."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable
from functools import partial

import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from crablb.control.metrics import exposition, page
from crablb.control.metrics.facts import Facts, Gatherer
from crablb.errors import why
from crablb.seldom import Seldom

__all__ = ["Pages", "make"]

log = structlog.get_logger()

#: Different questions about one look at the load balancer, at most: for each a thread works out the answer.
QUESTIONS = 16

Handler = Callable[[Request], Awaitable[Response]]


class Pages:
    """What there is to be seen.  Each is made once for all who ask within a second, by a thread."""

    def __init__(self, gatherer: Gatherer) -> None:
        self._gatherer = gatherer
        self._facts: Facts | None = None
        self._made: dict[object, asyncio.Future[bytes]] = {}  # of these facts, by what was asked for
        self._seldom = Seldom(burst=3)

    def page_of(self, api: str = "") -> Handler:
        """The status page.  ``api``: see :func:`.page.document`."""

        async def show(_: Request) -> Response:
            return Response(page.document(api), media_type="text/html", headers=page.headers())

        return show

    async def board(self, request: Request) -> Response:
        """What the page asks for, JSON.  ``q``, ``ill``: see :func:`.page.board`."""
        wanted, ill = request.query_params.get("q", "")[:100], request.query_params.get("ill", "") == "1"
        return await self._answer(request, ("board", wanted, ill), partial(_board, wanted, ill), "application/json")

    async def metrics(self, request: Request) -> Response:
        return await self._answer(request, "metrics", exposition.render, exposition.CONTENT_TYPE)

    async def _answer(self, request: Request, key: object, make: Callable[[Facts], bytes], kind: str) -> Response:
        """As it is, or packed."""
        packed = "gzip" in request.headers.get("accept-encoding", "")
        headers = {"cache-control": "no-store", "vary": "accept-encoding", "x-content-type-options": "nosniff"}
        try:
            body = await self._once((key, packed), (lambda facts: gzip.compress(make(facts), 1)) if packed else make)
        except Exception as error:  # one look's fault is no other's
            if times := self._seldom.due("failed"):
                log.error("what is asked for cannot be shown", what=request.url.path, times=times, **why(error))
            return PlainTextResponse("a fault of crablb's own; its log has more\n", 500)
        if body is None:
            return PlainTextResponse("too many different questions at once; ask again\n", 503)
        return Response(body, headers=headers | ({"content-encoding": "gzip"} if packed else {}), media_type=kind)

    async def _once(self, key: object, make: Callable[[Facts], bytes]) -> bytes | None:
        """None: too much is asked at once."""
        facts = await self._gatherer.facts()
        if self._facts is not facts:
            self._facts, self._made = facts, {}
        if key not in self._made:
            if len(self._made) >= QUESTIONS:
                return None
            self._made[key] = asyncio.ensure_future(asyncio.to_thread(make, facts))
        return await asyncio.shield(self._made[key])


def _board(wanted: str, ill: bool, facts: Facts) -> bytes:
    return page.encoded(facts, wanted, ill=ill)


def make(gatherer: Gatherer) -> Starlette:
    """The application that is served at ``metrics_listen``."""
    pages = Pages(gatherer)
    return Starlette(
        routes=[
            Route("/", pages.page_of()),
            Route("/metrics", pages.metrics),
            Route("/status.json", pages.board),
        ]
    )
