"""The ASGI application: from requests to the operator's methods, and from what those return and raise to answers."""

from __future__ import annotations

import asyncio
import hmac
import inspect
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from crablb.api import types
from crablb.control.admin.calls import CALLS, Call, Query, Stream
from crablb.control.admin.openapi import describe
from crablb.control.metrics.app import Pages
from crablb.control.metrics.facts import Gatherer
from crablb.control.operator import ConflictError, NotFoundError, Operator, asking
from crablb.errors import ConfigError, CrablbError, starved, why

__all__ = ["make"]

log = structlog.get_logger()

#: Answers without an end at a time.
STREAMS = 16

_JSON = b"application/json"


class _Refused(Exception):
    """Answer this instead."""

    def __init__(self, status: int, problems: Sequence[str], headers: Mapping[bytes, bytes] | None = None) -> None:
        super().__init__(status, problems)
        self.status, self.problems, self.headers = status, list(problems), headers or {}


def make(operator: Operator, gatherer: Gatherer | None = None, *, token: str = "") -> Starlette:
    """``gatherer``: for the status page, which may change something here; None: there is none.  ``token``: what each
    request has to bear, but that for the page, which holds nothing by itself; empty: whoever may connect may ask."""
    shared = _Shared(operator, token)
    by_path: dict[str, dict[str, Call]] = {}
    for call in CALLS:
        by_path.setdefault(call.path, {})[call.method] = call
    # A {vip} holds slashes, so the longest paths are tried first.
    paths = sorted(by_path.items(), key=lambda item: (-item[0].count("/"), "{" in item[0]))
    routes = [Route(path.replace("{vip}", "{vip:path}"), _Path(shared, calls)) for path, calls in paths]
    description = _Description(shared)
    routes = [Route("/openapi.json", description), Route("/v1/openapi.json", description), *routes]
    if gatherer:
        pages = Pages(gatherer)
        routes = [Route("/", pages.page_of("/v1")), Route("/status.json", _Guarded(shared, pages.board)), *routes]
    made = Starlette(routes=routes)
    made.router.default, made.router.redirect_slashes = _Nothing(shared), False
    return made


class _Shared:
    """What all paths have in common."""

    def __init__(self, operator: Operator, token: str) -> None:
        self.operator = operator
        self._token = token.encode()
        self.streams = 0

    def authorise(self, scope: Scope) -> None:
        """Raises :class:`_Refused`."""
        if not self._token:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise _Refused(
                401, ["the token is missing, or wrong: Authorization: Bearer ..."], {b"www-authenticate": b"Bearer"}
            )


class _Endpoint:
    """An ASGI application that answers faults as JSON."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._shared.authorise(scope)
            await self._answer(scope, receive, send)
        except _Refused as refused:
            await _send(send, refused.status, types.Problems(problems=refused.problems), refused.headers)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class _Nothing(_Endpoint):
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise _Refused(404, [f"there is nothing at {scope['path']}; /openapi.json says what there is"])


class _Guarded(_Endpoint):
    """What is no call of the API, for those who may call it."""

    def __init__(self, shared: _Shared, show: Callable[[Request], Awaitable[Response]]) -> None:
        super().__init__(shared)
        self._show = show

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        _allowed(scope, ("GET",))
        await (await self._show(Request(scope)))(scope, receive, send)


class _Description(_Endpoint):
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        _allowed(scope, ("GET",))
        await _send(send, 200, describe())


class _Path(_Endpoint):
    """What can be asked at one path."""

    def __init__(self, shared: _Shared, calls: Mapping[str, Call]) -> None:
        super().__init__(shared)
        self._calls = calls

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._calls[_allowed(scope, self._calls)]
        parameters = dict(scope["path_params"]) | _parameters(call.query, QueryParams(scope["query_string"]))
        body = await _body(call, scope, receive)
        if scope["method"] == "HEAD" and isinstance(call.answer, Stream):
            return await _head(send, call.answer)
        asking.set(scope.get("state", {}).get("peer", ""))
        try:
            answer = call.do(self._shared.operator, parameters, body)
            if inspect.isawaitable(answer):
                answer = await answer
        except NotFoundError as error:
            raise _Refused(404, error.problems) from None
        except ConflictError as error:
            raise _Refused(409, error.problems) from None
        except ConfigError as error:
            raise _Refused(400, error.problems) from None
        except CrablbError as error:
            raise _Refused(503, str(error).splitlines()) from None
        except Exception as error:  # one request's fault is no other's
            log.error("a request failed", method=call.method, path=scope["path"], **why(error))
            if isinstance(error, OSError | MemoryError) or starved(error):
                raise _Refused(500, [f"the machine refuses something: {error or 'memory'}"]) from None
            raise _Refused(500, ["a fault of crablb's own; its log has more"]) from None
        if isinstance(call.answer, Stream):
            await self._stream(call.answer, answer, scope, receive, send)
        else:
            await _send(send, 200, answer)

    async def _stream(
        self, kind: Stream, chunks: AsyncGenerator[bytes, None], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send what comes until the other side goes."""
        shared = self._shared
        if shared.streams >= STREAMS:
            await chunks.aclose()
            raise _Refused(503, [f"{STREAMS} follow already; end one of them"])
        shared.streams += 1
        prolong = scope.get("state", {}).get("prolong", lambda: None)
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await _begin(send, kind)
            async for chunk in _until(gone, chunks):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                prolong()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            shared.streams -= 1
            gone.cancel()
            await chunks.aclose()


async def _begin(send: Send, kind: Stream) -> None:
    headers = [(b"content-type", kind.media.encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _head(send: Send, kind: Stream) -> None:
    """Of a stream, without a follower's place."""
    await _begin(send, kind)
    await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until(gone: asyncio.Future[None], chunks: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """What comes before the other side has gone."""
    while True:
        coming: asyncio.Future[Any] = asyncio.ensure_future(anext(chunks, None))
        both: set[asyncio.Future[Any]] = {coming, gone}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not coming.done():
                coming.cancel()
                with suppress(asyncio.CancelledError):
                    await coming
        chunk: bytes | None = None if coming.cancelled() else coming.result()
        if chunk is None or gone.done():
            return
        yield chunk


def _allowed(scope: Scope, methods: Sequence[str] | Mapping[str, Any]) -> str:
    """The method that is asked for, if it is one of these.  Raises :class:`_Refused`."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    if method in methods:
        return str(method)
    there = ", ".join(sorted({*methods, *(["HEAD"] if "GET" in methods else [])}))
    raise _Refused(405, [f"{scope['method']} is not for {scope['path']}; there is {there}"], {b"allow": there.encode()})


def _parameters(known: Mapping[str, Query], given: QueryParams) -> dict[str, Any]:
    """Raises :class:`_Refused`."""
    problems = [f"there is no parameter {name!r} here" for name in given if name not in known]
    found = {}
    for name, query in known.items():
        values = given.getlist(name)
        found[name] = query.default
        if len(values) > 1:
            problems.append(f"{name}: is given {len(values)} times")
        elif values == [""]:  # of a variable that was not set, perhaps: that is not all
            problems.append(f"{name}: is empty; leave it out, or say which")
        elif values:
            try:
                found[name] = msgspec.convert(values[0], query.type, strict=False)
            except msgspec.ValidationError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise _Refused(400, problems)
    return found


async def _body(call: Call, scope: Scope, receive: Receive) -> Any:
    """Raises :class:`_Refused`."""
    received = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Refused(400, ["the request ended within its body"])
        received += message.get("body", b"")
        more = message.get("more_body", False)
        if len(received) > call.limit:
            raise _Refused(413, [f"the body is longer than {call.limit:,} bytes"], {b"connection": b"close"})
    if call.body is None:
        return None
    try:
        if call.body is str:
            return received.decode()
        return msgspec.json.decode(received or b"{}", type=call.body)
    except msgspec.ValidationError as error:
        raise _Refused(400, [_placed(str(error))]) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Refused(400, [f"the body is not what it should be: {error}"]) from None


def _placed(message: str) -> str:
    """msgspec's ``... - at `$.weight``` with the place in front, as everywhere."""
    what, _, where = message.partition(" - at ")
    place = re.sub(r"^`\$\.?|`$", "", where)
    return f"{place}: {what}" if place else what


async def _send(send: Send, status: int, answer: Any, headers: Mapping[bytes, bytes] | None = None) -> None:
    body = msgspec.json.encode(answer)
    fields = [(b"content-type", _JSON), (b"content-length", b"%d" % len(body)), *(headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
