"""From what a person writes, in a file or as an argument, to values: one function for each kind of them.

A function takes what stands in a file (a string, a number, a list), checks it, and returns the value of
:mod:`crablb.model`; such a value itself it takes as well, so the library's callers are checked by the same functions.
They raise :class:`crablb.errors.ConfigError` and nothing else.
"""

from __future__ import annotations

import difflib
import importlib
import ipaddress
import os
import re
import select
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from crablb.errors import ConfigError
from crablb.model import POLICIES, Address, Backend, Check, CheckKind, Network, Vip, host_port

__all__ = [
    "PORT",
    "guarded",
    "parse_backend",
    "parse_endpoint",
    "parse_policy",
    "parse_prefix",
    "parse_short_vip",
    "parse_vip",
    "read_backend_key",
    "read_master_key",
    "read_seed",
    "resolve",
    "without_imports",
]

PORT = 7171  # of reports
ADMIN_PORT = 7172
METRICS_PORT = 9117
AGENT_METRICS_PORT = 9118
MAX_WEIGHT = 65535
MAX_MACS = 14  # CRAB_MAX_MACS of bpf/maps.h, less an interface's own and its master's

E = TypeVar("E", bound=Enum)


def shown(value: object) -> str:
    """A value as it is quoted to a person; Python has no words for a whole number of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number, or what holds one, of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


# ---- plain ones ----


def string(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ConfigError(f"{shown(value)} is not a string")


def boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{shown(value)} is not true or false")


def listed(value: object) -> list[object]:
    if isinstance(value, list | tuple):
        return list(value)
    raise ConfigError(f"{shown(value)} is not a list")


def whole(low: int, high: int, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise ConfigError(f"{shown(value)} is not a whole number from {low} to {high}")


def seconds(value: object) -> float:
    return seconds_from(0, 86400, value)


def seconds_from(low: float, high: float, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        return float(value)
    raise ConfigError(f"{shown(value)} is not a number of seconds from {low:g} to {high:g}")


def member(kind: type[E], value: object) -> E:
    try:
        return kind(value)
    except ValueError:
        names = tuple(m.value for m in kind)
        hint = near(value, names, "") if isinstance(value, str) else ""
        raise ConfigError(f"{shown(value)} is not one of {', '.join(names)}" + (f"; {hint}" if hint else "")) from None


def near(wrong: str, known: tuple[str, ...], otherwise: str) -> str:
    """``did you mean ...?``, or ``otherwise``."""
    close = difflib.get_close_matches(wrong, known, 1)
    return f"did you mean {close[0]}?" if close else otherwise


def counted(count: int, what: str) -> str:
    """``1 flow``, ``2,000 flows``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


# ---- addresses ----


#: Kinds of addresses that no server has for others.
NEVER = ("unspecified", "loopback", "multicast", "link_local")


def _address(text: str, what: str, never: tuple[str, ...] = NEVER) -> Address:
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        raise ConfigError(f"{shown(text)} is not an IP address ({what} is written 10.0.0.1 or [fd00::1])") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            raise ConfigError(f"{text} has a zone; give an address that is unique without one")
        if address.ipv4_mapped:
            raise ConfigError(f"{text} is an IPv4-mapped address; write {address.ipv4_mapped}")
    for name in never:
        if getattr(address, f"is_{name}"):
            article = "an" if name == "unspecified" else "a"
            raise ConfigError(f"{text} is {article} {name.replace('_', '-')} address and cannot be {what}")
    if str(address) == "255.255.255.255":
        raise ConfigError(f"{text} is the broadcast address and cannot be {what}")
    return address


def parse_vip(value: object) -> Vip:
    """``tcp://10.0.0.100:80`` or ``tcp://[fd00::100]:80``.  Raises :class:`ConfigError`."""
    text = str(value) if isinstance(value, Vip) else string(value)
    protocol, separator, rest = text.partition("://")
    if not separator:
        with suppress(ValueError):  # the port is missing as well
            text = host_port(ipaddress.ip_address(text), 80)
        raise ConfigError(f"{shown(value)} has no protocol; write tcp://{text or '10.0.0.100:80'}")
    if protocol != "tcp":
        raise ConfigError(f"protocol {protocol!r} is not supported; connection redirection is made for tcp")
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*):([^:]*)", rest)
    if not match:
        if re.fullmatch(r"[^:\[\]]+|\[[^\]]*\]", rest):
            raise ConfigError(f"{shown(text)} has no port; write tcp://{rest}:80, or whatever port clients connect to")
        hint = " (an IPv6 address stands in brackets: tcp://[fd00::100]:80)" if rest.count(":") > 1 else ""
        raise ConfigError(f"{shown(text)} is not tcp://ADDRESS:PORT{hint}")
    port = match[2]
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ConfigError(f"{port!r} is not a port (1 to 65535)")
    return Vip(_address(match[1], "a VIP"), int(port))


def parse_short_vip(text: str) -> Vip:
    """A VIP as people ask for one: also ``10.0.0.100:80`` and ``tcp:10.0.0.100:80``.  Raises :class:`ConfigError`."""
    return parse_vip(text if "://" in text else f"tcp://{text.removeprefix('tcp:')}")


def parse_backend(value: object) -> Backend:
    """``10.0.0.11``, ``[fd00::11]``, or with a weight ``10.0.0.11*3``.  Raises :class:`ConfigError`."""
    text = string(value)
    bare, star, weight = text.partition("*")
    if re.fullmatch(r"[^:\[\]]+:\d+|\[.*\]:\d+", bare):
        raise ConfigError(
            f"{shown(text)} has a port; redirection and direct server return keep the VIP's port, so leave it out"
        )
    address = _address(bare, "a backend")
    if star and not re.fullmatch(r"[0-9]{1,9}", weight):
        raise ConfigError(f"{weight!r} is not a weight (0 to {MAX_WEIGHT})")
    return Backend(address, parse_weight(int(weight)) if star else 1)


def parse_address(value: object) -> Address:
    """A backend's address.  Raises :class:`ConfigError`."""
    return value if isinstance(value, Address) else parse_backend(value).address


def parse_client(text: str) -> Address:
    """An address that a client's packets may come from.  Raises :class:`ConfigError`."""
    return _address(text, "a client", NEVER[:3])


def parse_macs(value: object) -> tuple[str, ...]:
    """A list of MAC addresses.  Raises :class:`ConfigError`."""
    macs = tuple(dict.fromkeys(_mac(each) for each in listed(value)))
    if len(macs) > MAX_MACS:
        raise ConfigError(f"{len(macs)} MAC addresses; the limit is {MAX_MACS}")
    return macs


def _mac(value: object) -> str:
    text = string(value).lower()
    if not re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", text):
        raise ConfigError(f"{shown(value)} is not a MAC address (00:00:5e:00:01:07)")
    if text in ("00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff"):
        raise ConfigError(f"{text} is nobody's MAC address")
    return text


def parse_weight(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_WEIGHT:
        raise ConfigError(f"{shown(value)} is not a weight (0 to {MAX_WEIGHT})")
    return value


def _unmapped(prefix: Network) -> Network:
    first = prefix.network_address
    if isinstance(first, ipaddress.IPv6Address) and first.ipv4_mapped and prefix.prefixlen >= 96:
        plain = f"{first.ipv4_mapped}/{prefix.prefixlen - 96}"
        raise ConfigError(f"{prefix} is a prefix of IPv4-mapped addresses; write {plain}")
    return prefix


def parse_prefix(value: object) -> Network:
    """``10.0.0.0/8`` or ``fd00::/8``.  Raises :class:`ConfigError`."""
    try:
        return _unmapped(value if isinstance(value, Network) else ipaddress.ip_network(string(value)))
    except ValueError:
        pass
    text = string(value)
    try:
        loose = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ConfigError(f"{shown(text)} is not a prefix (10.0.0.0/8 or fd00::/8)") from None
    raise ConfigError(f"{text} has bits set behind the prefix; write {loose}")


def parse_source_prefix(value: object) -> tuple[int, int]:
    lengths = listed(value)
    if len(lengths) != 2:
        raise ConfigError(f"{shown(value)} is not a pair of prefix lengths, for IPv4 and IPv6: [24, 56]")
    return whole(1, 32, lengths[0]), whole(1, 128, lengths[1])


def parse_check(value: object) -> Check:
    """The name of a check.  Raises :class:`ConfigError`."""
    return value if isinstance(value, Check) else Check(member(CheckKind, value))


def parse_status(value: object) -> tuple[tuple[int, int], ...]:
    """A list of statuses and ranges of them, ``"200-399"``.  Raises :class:`ConfigError`."""
    return tuple(map(_status, listed(value)))


def _status(value: object) -> tuple[int, int]:
    if isinstance(value, tuple) and len(value) == 2:
        low, high = value
    elif isinstance(value, str) and (match := re.fullmatch(r"([0-9]{3})(?:-([0-9]{3}))?", value)):
        low, high = int(match[1]), int(match[2] or match[1])
    else:
        low = high = value
    if not (isinstance(low, int) and isinstance(high, int) and 100 <= low <= high <= 599):
        raise ConfigError(f"{shown(value)} is no HTTP status, nor a range of them like '200-399'")
    return low, high


def parse_method(value: object) -> str:
    text = string(value)
    if not re.fullmatch(r"[A-Z]{1,20}", text):
        raise ConfigError(f"{shown(text)} is no HTTP method (GET)")
    return text


def parse_path(value: object) -> str:
    text = string(value)
    if not re.fullmatch(r"/[\x21-\x7e]*", text):
        raise ConfigError(
            f"{shown(text)} is not the path of a URL: it begins with /, and other than ASCII is written %C3%A9"
        )
    return text


def parse_header(value: object) -> str:
    """A name, of at most 255 ASCII characters without blanks.  Raises :class:`ConfigError`."""
    text = string(value)
    if not re.fullmatch(r"[\x21-\x7e]{0,255}", text):
        raise ConfigError(f"{shown(text)} is no name of a host")
    return text


def parse_sni(value: object) -> str:
    """A name as TLS has it (RFC 6066, 3: no port, no trailing dot), or an address, for whom a certificate is to be.

    Raises :class:`ConfigError`.
    """
    text = parse_header(value)
    with suppress(ValueError):
        return str(ipaddress.ip_address(text))
    if ":" in text or text.endswith("."):
        wrong, name = "a port" if ":" in text else "a trailing dot", text.partition(":")[0].rstrip(".")
        raise ConfigError(f"{shown(text)} has {wrong}, which no certificate has; write {name}")
    return text


def parse_command(value: object) -> tuple[str, ...]:
    """A program's path and its arguments.  Raises :class:`ConfigError`."""
    command = tuple(map(string, listed(value)))
    if not command or not command[0].startswith("/"):
        raise ConfigError(f"{shown(value)} does not begin with the path of a program (['/usr/local/bin/check'])")
    return command


def parse_endpoint(value: object, port: int = PORT) -> tuple[Address, int]:
    """``10.0.0.2``, ``10.0.0.2:7171``, ``[fd00::2]:7171``; ``port`` if it names none.  Raises :class:`ConfigError`."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Address):
        return parse_endpoint(host_port(*value))
    text = string(value)
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::([0-9]{1,5}))?", text)
    if not match or not 0 < int(match[2] or port) < 65536:
        raise ConfigError(f"{shown(text)} is not ADDRESS or ADDRESS:PORT (an IPv6 address stands in brackets)")
    bare = match[1].strip("[]")
    if bare in ("0.0.0.0", "::"):
        return ipaddress.ip_address(bare), int(match[2] or port)
    if bare in ("127.0.0.1", "::1"):
        return ipaddress.ip_address(bare), int(match[2] or port)
    if bare.startswith("127."):
        raise ConfigError(f"{bare} is a loopback address; of these an endpoint has 127.0.0.1 or ::1")
    return _address(bare, "an endpoint"), int(match[2] or port)


# ---- the rest ----


def parse_interface(value: object) -> str:
    """The name of an interface; whether there is one, the kernel says later.  Raises :class:`ConfigError`."""
    name = string(value)
    if not re.fullmatch(r"[^\s/\x00-\x1f\x7f\ud800-\udfff]+", name):  # the last: bytes that are no UTF-8
        raise ConfigError(f"{shown(name)} is not the name of an interface (see ip link)")
    return name


def parse_interfaces(value: object) -> tuple[str, ...]:
    """Names of interfaces, each once, or one of them.  Raises :class:`ConfigError`."""
    names = [parse_interface(name) for name in (listed(value) if isinstance(value, list | tuple) else [value])]
    if not names:
        raise ConfigError("names no interface")
    if "lo" in names:
        raise ConfigError("no client's packets come in by lo; name the interface that leads to them (ip route)")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is named twice")
    return tuple(names)


def parse_table_size(value: object) -> int:
    size = whole(7, 5_000_011, value)
    if not all(size % d for d in range(2, int(size**0.5) + 1)):
        raise ConfigError(f"{size} is not prime, as a table's size must be (65537 and 655373 are usual)")
    return size


def parse_policy(value: object) -> str | Callable[..., Any]:
    """The name of a policy, ``module:function``, or a function.  Raises :class:`ConfigError`."""
    if callable(value):
        return value
    name = string(value)
    if name in POLICIES:
        return name
    if re.fullmatch(r"[\w.]+:[\w.]+", name):
        known, because = _importable.get()
        if known is not None and name not in known:
            raise ConfigError(f"{shown(name)}: {because}")
        resolve(name)
        return name
    hint = near(name, POLICIES, f"there are {', '.join(POLICIES)}, or module:function")
    raise ConfigError(f"{shown(name)} is no policy; {hint}")


_importable: ContextVar[tuple[Collection[object] | None, str]] = ContextVar("importable", default=(None, ""))
OWN_FILE = "a policy in Python comes from the load balancer's own file alone"


@contextmanager
def without_imports(but: Collection[object] = (), because: str = OWN_FILE) -> Iterator[None]:
    """What is parsed comes from somebody who need not be allowed to run programs here: no module is imported for it.

    ``but``: policies that run already; ``because``: what is said of others.
    """
    token = _importable.set((but, because))
    try:
        yield
    finally:
        _importable.reset(token)


def resolve(name: str) -> Callable[..., Any]:
    """The function of ``module:function``.  Raises :class:`ConfigError`."""
    module, _, function = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part, None)
    except ConfigError:  # who could have written it: see crablb.trust
        raise
    except BaseException as error:  # whatever a module does while it is imported, and asked
        raise ConfigError(f"module {module!r} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise ConfigError(f"module {module!r} has no function {function!r}")
    return found  # type: ignore[no-any-return]


# ---- secrets, and the files that hold them ----


#: Bytes of the largest file that is read, and seconds that a pipe may be silent (somebody may have to give a password).
LARGEST, SILENT = 64 << 20, 30.0


def read_bytes(path: Path | str, silent: float | None = None) -> bytes:
    """A file's bytes; of a pipe what is written until all who write have closed it.

    Raises :class:`OSError`, and :class:`TimeoutError` if a pipe is ``silent`` for so many seconds (:data:`SILENT`);
    :class:`ValueError` if
    there is no end to it (/dev/zero), or the name cannot be one.
    """
    data, silent = bytearray(), SILENT if silent is None else silent
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        while True:
            # A pipe that nobody writes to yet is not at its end: it is not ready.
            if not poll.poll(silent * 1000):
                raise TimeoutError(f"nothing was written to it for {silent:g} s")
            part = file.read(1 << 20)
            if part is None:  # another reader was faster
                continue
            if not part:
                return bytes(data)
            data += part
            if len(data) > LARGEST:
                raise ValueError(f"it has more than {LARGEST >> 20} MiB; is it the file that is meant?")


def read_text(path: Path | str) -> str:
    """A file's text.  Raises :class:`ConfigError`."""
    if not str(path):
        raise ConfigError("'' names no file")
    try:
        return read_bytes(path).decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except ValueError as error:  # a NUL in the name, or no end
        raise ConfigError(f"{str(path)!r}: cannot be read: {error}") from None


def guarded(path: Path | str) -> None:
    """Raises :class:`ConfigError` if others can write it, or every user can read it where it lies."""
    found = os.stat(path).st_mode
    if not stat.S_ISREG(found):  # a pipe of whoever runs this
        return
    reached = all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(path).resolve().parents)
    if found & 0o022 or (found & 0o004 and reached):
        mode = stat.S_IMODE(found)
        raise ConfigError(
            f"{path}: holds a secret, and others can read or write it (mode {mode:04o}); chmod 600 {path}"
        )


def _read_digits(path: Path | str, count: int, remedy: str) -> bytes:
    try:
        text = read_text(path).strip()
    except ConfigError as error:
        raise ConfigError(f"{error}; {remedy}") from None
    guarded(path)
    if not re.fullmatch(rf"[0-9a-fA-F]{{{count}}}", text):
        raise ConfigError(f"{path}: does not hold {count} hexadecimal digits; {remedy}")
    return bytes.fromhex(text)


#: What keys of each kind begin with, so that none is taken for another; of those of versions before nothing is known.
MASTER_KEY, BACKEND_KEY = b"crabmast", b"crabback"


def read_master_key(path: Path | str) -> bytes:
    """A master key of 32 bytes from a file of 64 hexadecimal digits.  Raises :class:`ConfigError`."""
    key = _read_digits(path, 64, "make a key: crablb key new")
    if key.startswith(BACKEND_KEY):
        raise ConfigError(f"{path}: is a backend's key; here belongs the master key (crablb key new)")
    return key


def read_backend_key(path: Path | str) -> bytes:
    """The same of a backend's."""
    key = _read_digits(path, 64, "make a key: crablb key backend ADDRESS --master FILE, where the master key is")
    if key.startswith(MASTER_KEY):
        raise ConfigError(
            f"{path}: is the master key, which speaks for every backend; here belongs this backend's own: crablb key"
            " backend ADDRESS --master FILE, on a load balancer"
        )
    return key


def parse_key(value: object) -> bytes:
    """A master key, or the path of its file.  Raises :class:`ConfigError`."""
    if isinstance(value, bytes):
        if len(value) != 32:
            raise ConfigError(f"a key has 32 bytes, not {len(value)}")
        return value
    return read_master_key(value if isinstance(value, Path) else string(value))


def read_seed(path: Path | str) -> bytes:
    """A seed of 16 bytes from a file of 32 hexadecimal digits.  Raises :class:`ConfigError`."""
    return _read_digits(path, 32, "make a seed: openssl rand -hex 16")


def parse_seed(value: object) -> bytes:
    """A seed, or its 32 hexadecimal digits.  Raises :class:`ConfigError`."""
    if isinstance(value, bytes):
        if len(value) != 16:
            raise ConfigError(f"a seed has 16 bytes, not {len(value)}")
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9a-fA-F]{32}", value):
        return bytes.fromhex(value)
    raise ConfigError("must be 32 hexadecimal digits (make one: openssl rand -hex 16)")
