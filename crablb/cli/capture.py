"""``crablb capture``: packets of a running load balancer into a file, each with what became of it."""

from __future__ import annotations

import argparse
import math
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass

from crablb import trust
from crablb.api import types
from crablb.api.client import ApiError
from crablb.cli import asking, streams
from crablb.control import pcapng
from crablb.errors import ConfigError, CrablbError
from crablb.filters import parse_filter


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    default = types.Capture()
    parser = commands.add_parser(
        "capture",
        help="packets that come in and go out, each with the decision and its reason, into a pcapng file",
        description="Packets that come in and go out, each with the decision and its reason as its comment, into a"
        " pcapng file for Wireshark and tshark. It ends at the first of its limits, or by Ctrl-C.",
    )
    parser.add_argument(
        "filter", nargs="*", metavar="FILTER",
        help="client A[/n], vip V[:port], backend B, port P; several with 'and' between (none: what the load"
        " balancer takes)",
    )  # fmt: skip
    parser.add_argument("-w", "--write", metavar="FILE", required=True, help="the file; -: standard output")
    parser.add_argument("--seconds", type=number, default=default.seconds, metavar="N", help="end after so long")
    parser.add_argument("--packets", type=int, default=default.packets, metavar="N", help="or so many that came in")
    parser.add_argument("--bytes", type=int, default=default.bytes, metavar="N", help="or so many bytes of the file")
    parser.add_argument(
        "--snaplen", type=int, default=default.snaplen, metavar="N", help="keep so many bytes of each frame"
    )
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def number(text: str) -> float:
    """An argument.  Raises :class:`ValueError`."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


@dataclass(slots=True)
class Summary:
    file: str
    packets: int = 0  # that came in
    missing: int = 0
    bytes: int = 0
    ended: str = "interrupted"


def run(args: argparse.Namespace) -> int:
    wanted = " ".join(args.filter)
    if args.filter and not wanted.strip():
        raise ConfigError("the filter is empty; leave it out for all that the load balancer takes")
    parse_filter(wanted)
    asked = types.Capture(
        filter=wanted, seconds=args.seconds, packets=args.packets, bytes=args.bytes, snaplen=args.snaplen
    )
    with asking.client(args) as client:
        pieces = asking.stream(client, "/v1/capture", asked, "the capture")
        first = next(pieces, b"")  # what is refused leaves no file
        with _File(args.write) as file:
            return _capture(file, first, pieces, as_json=args.json)


def _capture(file: _File, first: bytes, pieces: Iterator[bytes], *, as_json: bool) -> int:
    summary, blocks = Summary(file.name), pcapng.Blocks()
    problem = ""

    def take(piece: bytes) -> None:
        for kind, block in blocks.feed(piece):
            file.write(block)
            summary.bytes += len(block)
            if kind == pcapng.PACKET:
                flags = int.from_bytes(pcapng.options(block)[pcapng.FLAGS], sys.byteorder)
                summary.packets += flags == pcapng.INBOUND
            elif kind == pcapng.STATISTICS:
                said = pcapng.options(block)
                summary.missing = int.from_bytes(said[pcapng.DROPPED], sys.byteorder) or summary.missing
                if comment := said.get(pcapng.COMMENT):
                    summary.ended = comment.decode()

    streams.complain(f"capturing into {file.name}; Ctrl-C ends it")
    try:
        take(first)
        for piece in pieces:
            take(piece)
    except KeyboardInterrupt:
        pass
    except asking.TakenOver as error:
        problem = str(error)
    except (ApiError, ValueError) as error:
        problem = f"the load balancer has gone, or does not answer as it should: {error}"
    except _WriteError as error:
        problem = str(error)
    if problem:
        raise CrablbError(f"{file.name}: {problem}; {_count(summary.packets)} in it, and it is whole")
    _tell(summary, as_json and not file.is_output)
    return 0


def _count(packets: int) -> str:
    return "1 packet is" if packets == 1 else f"{packets:,} packets are"


def _tell(summary: Summary, as_json: bool) -> None:
    if as_json:
        asking.print_json(asdict(summary))
        return
    missing = f", {summary.missing:,} missing" if summary.missing and "missing" not in summary.ended else ""
    streams.complain(f"{_count(summary.packets)} in {summary.file}, {summary.bytes:,} bytes{missing}: {summary.ended}")


class _WriteError(Exception):
    """What was written until then are whole blocks."""


class _File:
    """What is written to, block by block; whatever happens, what is in it are whole blocks."""

    def __init__(self, name: str) -> None:
        """Raises :class:`ConfigError` if it cannot be."""
        self.is_output = name == "-"
        self.name = "standard output" if self.is_output else name
        if self.is_output and os.isatty(1):
            raise ConfigError(
                "-w -: standard output is a terminal; write to a file, or into a pipe: | tshark -r - (apt-get install"
                " tshark)"
            )
        try:
            self._fd = os.dup(1) if self.is_output else os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            found = os.fstat(self._fd)
            self._regular = stat.S_ISREG(found.st_mode)
            if self._regular and not self.is_output:
                if why := trust.others(found):  # somebody may wait for what is captured, or have a link lead here
                    os.close(self._fd)
                    raise ConfigError(f"-w {name}: {why}; write to a new file")
                os.truncate(self._fd, 0)
        except OSError as error:
            raise ConfigError(f"-w {name}: {error.strerror}") from None
        self._whole = 0

    def write(self, block: bytes) -> None:
        """Raises :class:`_WriteError`."""
        rest = memoryview(block)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except BrokenPipeError:
            raise streams.UnreadError from None
        except OSError as error:
            self._undo()
            raise _WriteError(error.strerror) from None
        except BaseException:  # a signal, in the middle of a block
            self._undo()
            raise
        self._whole += len(block)

    def _undo(self) -> None:
        if self._regular and not self.is_output:
            with suppress(OSError):
                os.truncate(self._fd, self._whole)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
