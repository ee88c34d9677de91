"""The status page, in Chromium: what it shows, to whom, and what it does with what it must not trust."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import time
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from crablb.api import types
from crablb.control.admin import app as admin
from crablb.control.metrics.app import Pages
from crablb.control.metrics.facts import Facts
from crablb.control.metrics.page import MOST, board, document, headers
from tests.helpers import facts as made
from tests.helpers.browser import Browser, Page
from tests.helpers.operating import still
from tests.helpers.showing import Made, Shown, showing

VIP, OTHER = "tcp://10.0.0.100:80", "tcp://[fd00::100]:443"
HOLDER = "02:00:00:00:00:99"
ROWS = "document.querySelectorAll('tbody tr').length"


def some(**more: object) -> Facts:
    ill = made.check(healthy=False, ok=False, reason="refused", streak=12, history="+" * 48 + "-" * 12)
    backends = [
        made.backend(VIP, "10.0.0.11"),
        made.backend(
            VIP, "10.0.0.12", serving=False, healthy=False, reason="tcp: refused", weight_now=0, share=0.0, checks=[ill]
        ),
        made.backend(VIP, "10.0.0.13", state="drain", serving=False, reason="drain", cr=False, cr_reason="no echo"),
        made.backend(OTHER, "fd00::11", checks=[], healthy=None, connections=None),
    ]
    event = types.Event(
        number=1, at=made.AT, kind="backend-unhealthy", service=VIP, backend="10.0.0.12", interface="", reason="refused"
    )
    status = made.status(state="degraded", problems=["one backend is ill"], backends=4, backends_serving=2, services=2)
    facts = made.facts(
        [made.service(VIP), made.service(OTHER, in_use={"eth0": HOLDER})],
        backends,
        at=time.time(),
        status=status,
        events=[event],
    )
    return dataclasses.replace(facts, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def opened(browser: Browser, shown: Shown, rows: int = 4, width: int = 1280, **more: bool) -> Page:
    page = browser.open(shown.url + "/", width, **more)
    page.until(ROWS, lambda n: n == rows)
    return page


def cells(page: Page, address: str) -> list[str]:
    """What stands in a backend's row."""
    row = (
        f"[...document.querySelectorAll('tbody tr')].find(r => r.querySelector('.address').textContent === '{address}')"
    )
    found: list[str] = page.run(f"[...{row}.children].map(c => c.innerText.replace(/\\s+/g, ' ').trim())")
    return found


def test_what_it_shows(browser):
    with showing(some) as shown:
        page = opened(browser, shown)
        assert page.run("document.title") == "degraded: crablb eth0"
        assert page.run("document.querySelector('#problems li').textContent") == "one backend is ill"
        assert page.run("[...document.querySelectorAll('h2')].map(h => h.textContent)")[1:3] == [VIP, OTHER]
        well = cells(page, "10.0.0.11")
        assert well[:6] == ["10.0.0.11", "serving", "3 checks", "1", "33 %", "42"]
        ill = cells(page, "10.0.0.12")
        assert ill[1:4] == ["unhealthy tcp: refused", "tcp fails", "0 of 1"]
        assert cells(page, "10.0.0.13")[:2] == ["10.0.0.13 fallback only: no echo", "draining"]
        assert cells(page, "fd00::11")[2] == "not checked"
        notices = "[...document.querySelectorAll('.notice')].filter(n => !n.hidden).map(n => n.textContent)"
        assert page.run(notices) == [f"standby: in use at {HOLDER} on eth0"]
        assert page.run("document.querySelector('#events li').innerText.includes('10.0.0.12')")
        # Nothing but itself is asked for, nothing goes wrong, and nothing can be changed here.
        assert {url.split("?")[0] for url in page.requested} - {"data:,"} == {
            f"{shown.url}/",
            f"{shown.url}/status.json",
        }
        assert page.complaints == []
        assert page.run("document.querySelectorAll('tbody button').length") == 0


def test_who_does_not_see_it(browser):
    """A screen reader finds headings, tables with headers, and words for what is drawn."""
    with showing(some) as shown:
        page = opened(browser, shown)
        tree = page.tree()
        roles = [role for role, _ in tree]
        assert ("heading", VIP) in tree
        assert ("table", VIP) in tree
        assert {"main", "search", "alert", "status"} <= set(roles)
        assert {name for role, name in tree if role == "columnheader"} >= {"Backend", "State", "Checks", "Weight"}
        assert next(name for role, name in tree if role == "rowheader").startswith("10.0.0.11")
        strips = {name for role, name in tree if role in ("img", "image")}
        assert "last 60 checks: all well" in strips
        assert "last 60 checks: 12 failed, the last 12 in a row" in strips
        unnamed = [
            (r, n) for r, n in tree if r in ("button", "link", "searchbox", "checkbox", "img", "image") and not n
        ]
        assert unnamed == []
        # On a phone cells are blocks, and a table nevertheless.
        page.size(390, 844)
        assert [r for r, _ in page.tree()].count("row") == roles.count("row")


def test_changes_are_said(browser):
    facts = some()
    with showing(lambda: facts) as shown:
        page = opened(browser, shown)
        assert page.run("document.getElementById('said').textContent") == ""
        gone = [
            made.backend(VIP, "10.0.0.11", serving=False, healthy=False, reason="tcp: no answer in 1 s"),
            *facts.backends[1:],
        ]
        page.run("document.querySelector('details').open = true; document.getElementById('q').focus()")
        facts = some(backends=gone)
        said = page.until("document.getElementById('said').textContent")
        assert said == f"10.0.0.11 of {VIP}: unhealthy, tcp: no answer in 1 s"
        assert page.run("document.getElementById('said').getAttribute('aria-live')") == "polite"
        # What was open is, and where the focus was it is.
        assert page.run("document.querySelector('details').open && document.activeElement.id") == "q"


def test_long_names_stay_within_a_telephone(browser):
    vip, address = "tcp://[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:65535", "2001:db8:1111:2222:3333:4444:5555:6662"
    why = f"http: status 503 from https://{'a-very-long-name.' * 6}example.org/healthz/deep/check?with=query"
    ill = [made.check("http", healthy=False, ok=False, reason=why)] * 2
    backend = made.backend(vip, address, serving=False, healthy=False, reason=why, connections=1_234_567, checks=ill)

    def long() -> Facts:
        status = made.status(state="degraded", problems=[f"{vip}: 1 of 1 backend does not serve: {address}: {why}"])
        return made.facts([made.service(vip, policy="a.module.with_a_long_name:choose")], [backend], status=status)

    with showing(long) as shown:
        page = opened(browser, shown, rows=1, width=390)
        assert page.run("document.documentElement.scrollWidth") == 390
        assert cells(page, address)[2] == "http fails"


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(browser, dark):
    """Of all text at least 4.5 to 1 (WCAG 2.2, 1.4.3), by what is painted, also when nobody answers."""
    script = """(() => {
      const rgb = c => c.match(/[\\d.]+/g).map(Number);
      const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
      const light = c => { const [r, g, b] = rgb(c).map(linear); return .2126 * r + .7152 * g + .0722 * b; };
      const back = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (rgb(c).length < 4 || rgb(c)[3] > 0) return c; } return 'rgb(255, 255, 255)'; };
      const found = [];
      for (const e of document.querySelectorAll('body *')) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
        if (!e.getClientRects().length || ['SCRIPT', 'NOSCRIPT', 'STYLE'].includes(e.tagName)) continue;
        const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
        found.push([(a + .05) / (b + .05), e.textContent.slice(0, 30), getComputedStyle(e).color, back(e)]);
      }
      return found; })()"""
    with showing(some) as shown:
        page = opened(browser, shown, dark=dark)
        shown.close()
        page.until("!document.getElementById('lost').hidden")
        found = page.run(script)
        assert len(found) > 60
        assert [each for each in found if each[0] < 4.5] == []
        paper = page.run("getComputedStyle(document.documentElement).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", paper))) < 64) is dark


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("count", [3, 300])
def test_it_fits(browser, width, count):
    """Nothing is wider than the screen, however long addresses are."""
    facts = made.many(count, 3)
    long = "fd00:1234:5678:9abc:def0:1234:5678:9abc"
    facts.backends[0] = made.backend(
        facts.services[0].vip, long, reason="x" * 300, serving=False, backup=True, changed=True
    )
    with showing(lambda: facts) as shown:
        page = opened(browser, shown, count, width)
        page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.run("document.documentElement.scrollWidth") == width
        assert page.complaints == []


EVIL = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>'\"&amp;"


def test_what_servers_say_is_text(browser):
    """A server's answer, a policy's name, whatever: it is shown, not run."""
    facts = some()
    evil = made.backend(VIP, "10.0.0.12", serving=False, reason=EVIL, cr=False, cr_reason=EVIL,
                        checks=[made.check("http", reason=EVIL, ok=False, history='"><b>' + "-" * 9)])  # fmt: skip
    facts.backends[1] = evil
    facts.status.problems[:] = [EVIL]
    facts.services[0] = made.service(VIP, policy=EVIL)
    event = types.Event(number=1, at=made.AT, kind=EVIL, service=EVIL, backend=EVIL, interface=EVIL, reason=EVIL)
    with showing(lambda: dataclasses.replace(facts, events=[event])) as shown:
        page = opened(browser, shown)
        page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.run("document.querySelectorAll('img, main script, main b:not(li > b)').length") == 0
        assert page.run("document.body.innerText").count(EVIL) >= 5
        assert "broken" not in page.run("document.title")
        assert page.complaints == []


def test_the_policy_is_kept():
    """The page's script and style by their hashes, nothing else; and it has no handler or style of another kind."""
    policy = headers()["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    text = document().decode()
    assert not re.search(r"\son\w+=|\sstyle=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    assert document("/v1") != document()
    with showing(some) as shown:
        _, got, _ = shown.get("/")
        assert got["content-security-policy"] == policy
        assert got["content-type"] == "text/html; charset=utf-8"


def test_nobody_answers(browser):
    with showing(some) as shown:
        page = opened(browser, shown)
        port = shown.port
        shown.close()
        lost = page.until("document.getElementById('lost').textContent")
        assert re.fullmatch(
            r"The load balancer has not answered since \d\d:\d\d:\d\d: what is shown is from then \(.*\)."
            r" It is asked again and again.",
            lost,
        )
        assert page.run("document.getElementById('state').textContent") == "no answer"
        assert page.run(ROWS) == 4
        again = Shown(Starlette(routes=[Route("/status.json", Pages(Made(some)).board)]), port)  # type: ignore[arg-type]
        try:
            page.until("document.getElementById('lost').hidden")
            assert page.run("document.getElementById('state').textContent") == "degraded"
        finally:
            again.close()


def test_what_is_looked_for(browser):
    with showing(some) as shown:
        page = opened(browser, shown)
        page.run("document.getElementById('q').value = 'fd00::1'; document.getElementById('q').oninput()")
        page.until(ROWS, lambda n: n == 1)
        page.run("document.getElementById('q').value = ''; document.getElementById('ill').click()")
        page.until(ROWS, lambda n: n == 2)
        assert page.run("document.getElementById('shown').textContent") == "2 backends"


# ---- where something can be changed ----


class Api:
    """The API of a load balancer, as far as the page asks it, behind a token."""

    def __init__(self, token: str = "") -> None:
        self.facts, self.token, self.asked = some(), token, []
        pages = Pages(Made(lambda: self.facts))  # type: ignore[arg-type]

        async def status(request: Request) -> Response:
            if token and request.headers.get("authorization") != f"Bearer {token}":
                return JSONResponse({"problems": ["no token"]}, 401)
            return await pages.board(request)

        async def change(request: Request) -> Response:
            self.asked.append((request.url.path, await request.json(), request.headers.get("authorization", "")))
            if "10.0.0.11" in request.url.path:
                return JSONResponse({"problems": [f"not that one {EVIL}"]}, 409)
            return JSONResponse({"changes": ["10.0.0.13: drain -> up"]})

        routes = [
            Route("/", pages.page_of("/v1")),
            Route("/status.json", status),
            Route("/v1/services/{rest:path}", change, methods=["PATCH"]),
        ]
        self.application = Starlette(routes=routes)


def test_drain_and_ready(browser):
    api = Api()
    shown = Shown(api.application)
    try:
        page = opened(browser, shown)
        buttons = page.run("[...document.querySelectorAll('tbody button')].map(b => b.getAttribute('aria-label'))")
        assert buttons == [
            f"Drain 10.0.0.11 of {VIP}", f"Drain 10.0.0.12 of {VIP}", f"Ready 10.0.0.13 of {VIP}",
            f"Drain fd00::11 of {OTHER}",
        ]  # fmt: skip
        page.run("document.querySelectorAll('tbody button')[2].click()")
        assert page.until("document.getElementById('said').textContent") == "10.0.0.13: drain -> up"
        assert api.asked == [(f"/v1/services/{VIP}/backends/10.0.0.13", {"state": "ready"}, "")]
        page.run("document.querySelectorAll('tbody button')[0].click()")
        assert page.until("document.getElementById('refused').textContent") == f"not that one {EVIL}"
        assert api.asked[1][1] == {"state": "drain"}
    finally:
        shown.close()


def test_a_token(browser):
    api = Api("secret")
    shown = Shown(api.application)
    try:
        page = browser.open(shown.url + "/")
        page.until("document.getElementById('unlock')?.hidden === false")
        assert page.run(ROWS) == 0
        page.run("document.getElementById('token').value = 'secret'; document.querySelector('#unlock button').click()")
        page.until(ROWS, lambda n: n == 4)
        assert page.run("document.getElementById('unlock').hidden")
        page.run("document.querySelectorAll('tbody button')[2].click()")
        page.until("document.getElementById('said').textContent")
        assert api.asked[0][2] == "Bearer secret"
    finally:
        shown.close()


def test_by_the_api_itself():
    """The page holds nothing, so whoever may connect gets it; what it shows is for those who have the token."""
    operator, _ = still()
    gatherer = Made(some)
    for token, expected in (("", 200), ("0123456789abcdef", 401)):
        shown = Shown(admin.make(operator, gatherer, token=token))  # type: ignore[arg-type]
        try:
            status, got, body = shown.get("/")
            assert (status, body) == (200, document("/v1"))
            assert got["content-security-policy"] == headers()["content-security-policy"]
            assert shown.get("/status.json")[0] == expected
            assert shown.get("/status.json", authorization="Bearer 0123456789abcdef")[0] == 200
            assert shown.get("/status.json", "POST", authorization="Bearer 0123456789abcdef")[0] == 405
            assert shown.get("/", "POST")[0] == 405
            assert shown.get("/metrics", authorization="Bearer 0123456789abcdef")[0] == 404
        finally:
            shown.close()


def test_no_page_without_what_it_shows():
    shown = Shown(admin.make(still()[0]))
    try:
        assert shown.get("/")[0] == 404
    finally:
        shown.close()


# ---- what it is told ----


def test_trouble_comes_first_where_not_all_can_be_told():
    facts = made.many(10_000)
    told = board(facts)
    ill = [b for b in facts.backends if not b.serving]
    assert len(told.backends) == MOST
    assert told.backends_found == 10_000
    assert {service.vip for service in told.services} == {b.service for b in told.backends}
    assert sum(not b.serving for b in told.backends) >= min(len(ill), MOST // 10)
    first = told.services[0].vip
    assert next(b.serving for b in told.backends if b.service == first) is False
    only = board(facts, ill=True)
    assert only.backends_found == len(ill)
    one = facts.services[500].vip
    assert {b.service for b in board(facts, one).backends} == {one}


def test_in_order_where_all_can_be_told():
    facts = some()
    told = board(facts)
    assert told.backends == facts.backends
    assert told.services == facts.services


def test_it_is_small():
    facts = made.many(500)
    with showing(lambda: facts) as shown:
        _, got, body = shown.get("/status.json", accept_encoding="gzip")
        assert got["content-encoding"] == "gzip"
        assert len(body) < 64 << 10
        assert len(json.loads(gzip.decompress(body))["backends"]) == 500
