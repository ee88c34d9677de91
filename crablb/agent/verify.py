"""Whether backends hear this client, before a redirect of theirs is taken up: see bpf/client_proof.h."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from crablb import lasting
from crablb._native import ffi
from crablb.kernel import bpf
from crablb.kernel.checksum import checksum
from crablb.model import unmapped

log = structlog.get_logger()

#: Seconds for which programs may rely on this process, and between its renewals.
LEASE, RENEWAL = 2.0, 0.5
EXIST = 2  # BPF_EXIST
ACK = 0x10
WINDOW = 0xFFFF
HOPS = 64


def probe(ask: bytes) -> tuple[str, str, bytes]:
    """The packet that a struct crab_client_ask asks for, with its IP header: source, destination, bytes."""
    asked = ffi.from_buffer("struct crab_client_ask *", ask)
    source, target = unmapped(bytes(asked.ports.local)), unmapped(bytes(asked.remote))
    ports = ask[16:20]  # as on the wire, like the numbers behind the other address
    tcp = ports + ask[36:44] + struct.pack("!BBHHH", 5 << 4, ACK, WINDOW, 0, 0)
    pseudo = source.packed + target.packed + struct.pack("!II", len(tcp), socket.IPPROTO_TCP)
    tcp = tcp[:16] + checksum(pseudo + tcp) + tcp[18:]
    if source.version == 4:  # the kernel fills in its checksum
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, HOPS, socket.IPPROTO_TCP, 0)
    else:
        ip = struct.pack("!IHBB", 6 << 28, len(tcp), socket.IPPROTO_TCP, HOPS)
    return str(source), str(target), ip + source.packed + target.packed + tcp


def send(ask: bytes) -> None:
    """Send it as the connection's own would go: with its address, by the host's routes.  Raises OSError."""
    source, target, packet = probe(ask)
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.setblocking(False)
        raw.bind((source, 0))
        raw.sendto(packet, (target, 0))


class Verifier:
    """A thread that asks backends, as the programs of the agent pinned in ``folder`` want it.  A context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._since = 0
        self._said = ""
        self._may = True

    def forget(self) -> None:
        """Routes have changed: what was proven before may not hold any more."""
        self._since = time.monotonic_ns()

    def __enter__(self) -> Self:
        self._stop, self._stopped = os.pipe()
        self._ends = bpf.Map.from_pin(self._folder / "client_verifier")
        self._asks = bpf.Map.from_pin(self._folder / "client_asks")
        self._held = bpf.Map.from_pin(self._folder / "client_held")
        try:
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW).close()
            self._renew()
        except PermissionError:
            log.warning("backends are not verified, as that needs CAP_NET_RAW; give it, or say --no-verify")
            self._may = False
        self._thread = threading.Thread(
            target=lasting.keep_in_thread, args=("verify", self._run, self._stop), name="crablb-verify", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._stopped)
        self._thread.join()
        os.close(self._stop)
        self._write(0)
        for held in (self._ends, self._asks, self._held):
            held.close()

    def _write(self, until: int) -> None:
        value = ffi.new("struct crab_client_verifier *", {"until_ns": until, "since_ns": self._since})
        self._ends.update(0, bytes(ffi.buffer(value)))

    def _renew(self) -> None:
        self._write(time.monotonic_ns() + int(LEASE * 1e9))

    def _run(self) -> None:
        """Until the end.  Where it fails and the lease ends, the programs go on without, as with --no-verify."""
        poll = select.poll()
        with bpf.Ring(self._asks, self._answer) as ring:
            poll.register(ring, select.POLLIN)
            poll.register(self._stop, select.POLLHUP)
            while self._stop not in dict(lasting.wait(poll, RENEWAL)):
                ring.consume()
                if self._may:
                    self._renew()

    def _answer(self, ask: bytes) -> None:
        try:
            ports = ask[: ffi.sizeof("struct crab_client_ports")]
            if value := self._held.lookup(ports):
                held = ffi.from_buffer("struct crab_client_held *", changed := bytearray(value))
                held.asked_ns = time.monotonic_ns()
                with suppress(bpf.BpfError):  # it has gone
                    self._held.update(ports, bytes(changed), EXIST)
            send(ask)
        except PermissionError as error:  # by a firewall of this host, which the connection's own packets may pass
            log.warning(
                "backends are not verified any more, as this host's firewall drops what is sent", reason=str(error)
            )
            self._may = False
            self._write(0)
        except OSError as error:  # no route
            if str(error) != self._said:
                _, target, _ = probe(ask)
                log.warning(
                    "a backend cannot be asked, its redirect is not taken up", backend=target, reason=str(error)
                )
            self._said = str(error)
