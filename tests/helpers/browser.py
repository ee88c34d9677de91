"""A headless Chromium, spoken to by the DevTools protocol over a pair of pipes (``--remote-debugging-pipe``)."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

#: Seconds against a hang.
PATIENCE = 30


class Browser:
    """Ends with its context; nothing of it is kept."""

    def __enter__(self) -> Self:
        program = shutil.which("chromium")
        assert program, "chromium is missing; the Makefile's TEST_PACKAGES has it"
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # Above the descriptors 3 and 4, which its pipes are to be.
        ends = [*os.pipe(), *os.pipe()]
        there, self._to, self._from, back = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
        for end in ends:
            os.close(end)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-extensions", "--hide-scrollbars", "--lang=en-US"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"]
        redirect = f'exec "$@" 3<&{there} 4>&{back} {there}<&- {back}>&-'
        self._child = subprocess.Popen(
            ["bash", "-c", redirect, "bash", program, *options],
            pass_fds=(there, back),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self._buffer, self._number, self._pages = b"", 0, {}
        return self

    _pages: dict[str, Page]

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._send("Browser.close")
        os.close(self._to)
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        os.close(self._from)
        self._profile.cleanup()

    def open(self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False) -> Page:
        """A new page, which has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.size(width, height)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[theme])
        page.call("Page.navigate", url=url)
        return page

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        number, end = self._send(method, session, **parameters), time.monotonic() + PATIENCE
        while True:
            said = self._receive(end)
            if said.get("id") == number:
                assert "error" not in said, (method, said["error"])
                result: dict[str, Any] = said["result"]
                return result
            if page := self._pages.get(said.get("sessionId", "")):
                page.happened(said["method"], said["params"])

    def _send(self, method: str, session: str = "", **parameters: Any) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        return self._number

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready = select.select([self._from], [], [], max(0, end - time.monotonic()))[0]
            assert ready, "the browser does not answer"
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has gone"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed


class Page:
    """What it complained of is in ``complaints``, what it asked for in ``requested``."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.complaints: list[str] = []
        self.requested: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def happened(self, method: str, what: dict[str, Any]) -> None:
        match method:
            case "Runtime.consoleAPICalled" if what["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(what["args"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(what["exceptionDetails"]))
            case "Log.entryAdded" if what["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.requested.append(what["request"]["url"])

    def size(self, width: int, height: int) -> None:
        phone = {"mobile": width < 700, "deviceScaleFactor": 2 if width < 700 else 1}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **phone)

    def run(self, script: str) -> Any:
        """What an expression is, as JSON has it; a promise is waited for."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, script: str, found: Callable[[Any], object] = bool) -> Any:
        """Run it again and again, until what it is pleases."""
        end = time.monotonic() + PATIENCE
        while not found(value := self.run(script)):
            assert time.monotonic() < end, f"{script} is {value!r}; {self.complaints}"
            time.sleep(0.02)
        return value

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        shot = self.call(
            "Page.captureScreenshot", captureBeyondViewport=whole, **({"clip": self._all()} if whole else {})
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def _all(self) -> dict[str, Any]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 5000), "scale": 1}

    def tree(self) -> list[tuple[str, str]]:
        """What a screen reader finds: roles and names, in order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
        ]
