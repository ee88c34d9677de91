"""A load balancer whose system calls fail (shim.c), on a cable with nothing but the test at its other ends.

``python -m tests.helpers.faulted FILE ...`` is ``crablb ...``, which at SIGRTMIN writes where its frames are into FILE.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from crablb import cli
from crablb.dataplane.queues import Queues
from crablb.kernel.interface import interface_info
from crablb.lab.demo import notify_socket
from tests.helpers.frames import syn
from tests.helpers.namespaces import Pair
from tests.helpers.processes import ROOT, logged, until
from tests.helpers.shim import Shim

__all__ = ["Faulted", "neighbours"]

VIP = "tcp://10.0.0.100:80"
#: By which interface each backend is reached.
BACKENDS = {"10.0.0.11": "veth0", "10.0.1.11": "veth2"}


def neighbours(pair: Pair) -> None:
    """Two cables with a backend at the other end of each, which are known without being asked."""
    pair.ip("link", "add", "veth2", "type", "veth", "peer", "name", "veth3")
    for name in ("veth2", "veth3"):
        pair.ip("link", "set", name, "up")
    for name, address in (("veth0", "10.0.0.2/24"), ("veth2", "10.0.1.2/24")):
        pair.ip("addr", "add", address, "dev", name)
    for n, (address, name) in enumerate(BACKENDS.items()):
        mac = f"02:00:00:00:01:{n:02}"
        pair.ip("neigh", "replace", address, "lladdr", mac, "dev", name, "nud", "permanent")


class Faulted:
    """``crablb serve`` on veth0 of this thread's network namespace, whose calls go by the rules of ``shim``."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair, self.folder = pair, folder
        self.shim = Shim.made(folder)
        self.log = folder / "serve.log"
        self._frames = folder / "frames"
        self._sent = 0
        self._ports = iter(random.Random(1).sample(range(1024, 65536), 60000))
        self._wires = [pair.wire("veth1"), pair.wire("veth3")]
        self._mac = interface_info("veth0").mac
        self.config = folder / "crablb.toml"
        self.configure()
        command = ["serve", "--iface", "veth0", "--config", str(self.config)]
        with notify_socket(folder) as (path, wait), open(self.log, "a") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.faulted", str(self._frames), *command],
                env={**os.environ, **self.shim.env, "NOTIFY_SOCKET": path},
                cwd=ROOT,
                stderr=stderr,
            )
            try:
                assert wait(self.process), self.log.read_text()
            except TimeoutError:
                raise AssertionError(self.log.read_text()) from None

    def configure(self, weight: int = 1) -> None:
        """Have the file say what is to be served, with this weight of the first backend."""
        backends = ", ".join(
            f'{{ address = "{address}", weight = {weight if n == 0 else 1} }}' for n, address in enumerate(BACKENDS)
        )
        self.config.write_text(f'[[service]]\naddress = "{VIP}"\ncheck = []\nbackends = [{backends}]\n')

    def reload(self, weight: int) -> None:
        self.configure(weight)
        self.process.send_signal(signal.SIGHUP)

    def syns(self, count: int) -> None:
        """That many clients' SYNs come."""
        for _ in range(count):
            self._wires[0].send(self._mac + syn(next(self._ports))[6:])
        self._sent += count

    def status(self) -> dict[str, Any]:
        out = io.StringIO()
        with redirect_stdout(out):
            cli.main(["status", "--iface", "veth0", "--json"])
        parsed: dict[str, Any] = json.loads(out.getvalue())
        return parsed

    def answered(self, *arguments: str) -> int:
        """The exit status of a command that asks the daemon."""
        with contextlib.redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            return cli.main(arguments)

    def frames(self) -> list[dict[str, int]]:
        """Where the frames of each queue are."""
        self._frames.unlink(missing_ok=True)
        os.kill(self.process.pid, signal.SIGRTMIN)
        until(lambda: self._frames.exists() or self.process.poll() is not None)
        found: list[dict[str, int]] = json.loads(self._frames.read_text())
        return found

    def accounted(self) -> bool:
        """Whether each SYN that came is in one counter, and no frame is on its way."""
        counts = self.status()
        total, xdp = counts["total"], counts["xdp"]
        lost = sum(total[name] for name in ("xsk_rx_dropped", "xsk_rx_full"))
        lost += xdp["drop_no_socket"]
        dropped = sum(n for name, n in total.items() if name.startswith("drop_"))
        whole = total["received"] + lost == self._sent and total["sent"] + dropped == total["received"]
        return whole and all(
            frames["free"] + frames["receiving"] == frames["all"] and not frames["held"] for frames in self.frames()
        )

    def served(self, count: int = 8) -> bool:
        """Whether SYNs that come now are sent on, all of them."""
        before = self.status()["total"]["sent"]
        self.syns(count)
        with contextlib.suppress(AssertionError):
            until(lambda: self.status()["total"]["sent"] >= before + count, 1)
            return True
        return False

    def logged(self, event: str = "") -> list[dict[str, Any]]:
        return logged(self.log, event)  # raises if it wrote what is none of its log

    def lines(self) -> list[str]:
        """What it wrote to its log, whatever that is."""
        return self.log.read_text().splitlines()

    def close(self) -> None:
        self.shim.end()
        self.process.terminate()
        assert self.process.wait(60) == 0, self.log.read_text()
        for wire in self._wires:
            wire.close()

    @classmethod
    @contextmanager
    def made(cls, folder: Path) -> Iterator[Faulted]:
        with Pair.made() as pair:
            neighbours(pair)
            made = cls(pair, folder)
            try:
                yield made
            finally:
                made.shim.end()
                made.process.kill()
                made.process.wait()
                for wire in made._wires:
                    wire.close()


def main(path: Path, arguments: list[str]) -> int:
    queues: list[Queues] = []
    begin = Queues.__init__

    def init(self: Queues, *args: Any) -> None:
        queues.append(self)
        begin(self, *args)

    Queues.__init__ = init  # type: ignore[method-assign]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})  # in all threads, which inherit it

    def tell() -> None:
        while True:
            signal.sigwait({signal.SIGRTMIN})
            found = [worker.xsk.frames() for worker in queues[-1]._workers if worker.xsk]
            path.with_suffix(".new").write_text(json.dumps(found))
            path.with_suffix(".new").rename(path)

    threading.Thread(target=tell, daemon=True).start()
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
