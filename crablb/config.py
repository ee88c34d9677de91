"""From text to :class:`crablb.model.Config`: TOML files and ``--service`` strings.

Every fault of a configuration is found and told at once, each with its place and the way to mend it.  Nothing but
:class:`crablb.errors.ConfigError` is raised.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from crablb.errors import ConfigError
from crablb.model import POLICIES as BUILTIN
from crablb.model import (
    Address,
    Announce,
    Backend,
    Bypass,
    Config,
    Fallback,
    Mode,
    Network,
    OnDead,
    OptionForm,
    Service,
    State,
    Vip,
    XdpMode,
    host_port,
)
from crablb.selection.reports import PORT, read_key
from crablb.values import resolve

__all__ = ["load_config", "parse_backend", "parse_endpoint", "parse_prefix", "parse_service", "parse_vip"]

MAX_BACKENDS = 65534  # backend ids are 16 bits, one of which says "none"
MAX_WEIGHT = 65535
T = TypeVar("T")
E = TypeVar("E", bound=Enum)


class _Problems:
    """Collects faults; ``at`` says where they are."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}" if where else what)

    def attempt(self, where: str, parse: Callable[..., T], *args: Any) -> T | None:
        """``parse(*args)``, or None after noting why not."""
        try:
            return parse(*args)
        except ConfigError as error:
            for problem in error.problems:
                self.add(where, problem)
            return None

    def finish(self) -> None:
        if self.found:
            raise ConfigError(self.found)


def _address(text: str, what: str) -> Address:
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        raise ConfigError(f"{text!r} is not an IP address ({what} is written 10.0.0.1 or [fd00::1])") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            raise ConfigError(f"{text} has a zone; give an address that is unique without one")
        if address.ipv4_mapped:
            raise ConfigError(f"{text} is an IPv4-mapped address; write {address.ipv4_mapped}")
    for name in ("unspecified", "loopback", "multicast", "link_local"):
        if getattr(address, f"is_{name}"):
            article = "an" if name == "unspecified" else "a"
            raise ConfigError(f"{text} is {article} {name.replace('_', '-')} address and cannot be {what}")
    if str(address) == "255.255.255.255":
        raise ConfigError(f"{text} is the broadcast address and cannot be {what}")
    return address


def parse_vip(text: str) -> Vip:
    """``tcp://10.0.0.100:80`` or ``tcp://[fd00::100]:80``.  Raises :class:`ConfigError`."""
    protocol, separator, rest = text.partition("://")
    if not separator:
        raise ConfigError(f"{text!r} has no protocol; write tcp://{text}")
    if protocol != "tcp":
        raise ConfigError(f"protocol {protocol!r} is not supported; connection redirection is made for tcp")
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*):([^:]*)", rest)
    if not match:
        hint = " (an IPv6 address stands in brackets: tcp://[fd00::100]:80)" if rest.count(":") > 1 else ""
        raise ConfigError(f"{text!r} is not tcp://ADDRESS:PORT{hint}")
    port = match[2]
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ConfigError(f"{port!r} is not a port (1 to 65535)")
    return Vip(_address(match[1], "a VIP"), int(port))


def parse_backend(text: str) -> Backend:
    """``10.0.0.11``, ``[fd00::11]``, or with a weight ``10.0.0.11*3``.  Raises :class:`ConfigError`."""
    bare, star, weight = text.partition("*")
    if re.fullmatch(r"[^:\[\]]+:\d+|\[.*\]:\d+", bare):
        raise ConfigError(
            f"{text!r} has a port; redirection and direct server return keep the VIP's port, so leave it out"
        )
    address = _address(bare, "a backend")
    if star and not re.fullmatch(r"[0-9]{1,9}", weight):
        raise ConfigError(f"{weight!r} is not a weight (0 to {MAX_WEIGHT})")
    return Backend(address, _weight(int(weight)) if star else 1)


def _weight(weight: object) -> int:
    if not isinstance(weight, int) or isinstance(weight, bool) or not 0 <= weight <= MAX_WEIGHT:
        raise ConfigError(f"{weight!r} is not a weight (0 to {MAX_WEIGHT})")
    return weight


def parse_prefix(text: str) -> Network:
    """``10.0.0.0/8`` or ``fd00::/8``.  Raises :class:`ConfigError`."""
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        loose = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ConfigError(f"{text!r} is not a prefix (10.0.0.0/8 or fd00::/8)") from None
    raise ConfigError(f"{text} has bits set behind the prefix; write {loose}")


def parse_service(text: str) -> Service:
    """``tcp://10.0.0.100:80=10.0.0.11,10.0.0.12*3``.  Raises :class:`ConfigError` with every fault."""
    vip_text, equals, backends_text = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is not VIP=BACKEND,BACKEND,... (tcp://10.0.0.100:80=10.0.0.11,10.0.0.12)")
    problems = _Problems()
    vip = problems.attempt("VIP", parse_vip, vip_text.strip())
    backends = [
        problems.attempt(f"backend {i}", parse_backend, part.strip())
        for i, part in enumerate(backends_text.split(","), 1)
    ]
    problems.finish()
    assert vip is not None
    return Service(vip, tuple(b for b in backends if b is not None))


def _enum(kind: type[E], value: object) -> E:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(member.value for member in kind)
        raise ConfigError(f"{value!r} is not one of {names}") from None


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _seed(value: object) -> bytes:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-fA-F]{32}", value):
        return bytes.fromhex(value)
    raise ConfigError("must be 32 hexadecimal digits (make one: openssl rand -hex 16)")


def _number(low: int, high: int, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise ConfigError(f"{value!r} is not a whole number from {low} to {high}")


def _table_size(value: object) -> int:
    size = _number(7, 5_000_011, value)
    if not _prime(size):
        raise ConfigError(f"{size} is not prime, as a Maglev table must be (65537 and 655373 are usual)")
    return size


def _string(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ConfigError(f"{value!r} is not a string")


def _unknown_keys(problems: _Problems, where: str, table: dict[str, Any], known: Iterable[str]) -> None:
    for key in table.keys() - set(known):
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
        problems.add(where, f"unknown key {key!r}; {hint}")


def _backend_entry(entry: object) -> Backend:
    if isinstance(entry, str):
        return parse_backend(entry)
    if not isinstance(entry, dict):
        raise ConfigError(f"{entry!r} is neither an address nor a table {{address=..., weight=..., cr=..., state=...}}")
    problems = _Problems()
    _unknown_keys(problems, "", entry, ("address", "weight", "cr", "state"))
    backend = problems.attempt("address", lambda: parse_backend(_string(entry.get("address", ""))))
    weight = problems.attempt("weight", _weight, entry.get("weight", 1))
    if not isinstance(entry.get("cr", True), bool):
        problems.add("cr", f"{entry['cr']!r} is not true or false")
    state = problems.attempt("state", _enum, State, entry.get("state", "up"))
    problems.finish()
    assert backend is not None and weight is not None and state is not None
    return Backend(backend.address, weight if "weight" in entry else backend.weight, entry.get("cr", True), state)


def parse_policy(value: object) -> str:
    """The name of a policy, or ``module:function``.  Raises :class:`ConfigError`."""
    if value in BUILTIN:
        return str(value)
    if isinstance(value, str) and re.fullmatch(r"[\w.]+:[\w.]+", value):
        resolve(value)
        return value
    near = difflib.get_close_matches(str(value), BUILTIN, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(BUILTIN)}, or module:function"
    raise ConfigError(f"{value!r} is no policy; {hint}")


def _source_prefix(value: object) -> tuple[int, int]:
    lengths = _list(value)
    if len(lengths) != 2:
        raise ConfigError(f"{value!r} is not a pair of prefix lengths, for IPv4 and IPv6: [24, 56]")
    return _number(1, 32, lengths[0]), _number(1, 128, lengths[1])


def _seconds(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 86400:
        return float(value)
    raise ConfigError(f"{value!r} is not a number of seconds from 0 to 86400")


def _list(value: object) -> list[object]:
    if isinstance(value, list):
        return value
    raise ConfigError(f"{value!r} is not a list")


def _service_entry(entry: object) -> Service:
    if not isinstance(entry, dict):
        raise ConfigError("must be a table, written [[service]]")
    problems = _Problems()
    known = ("address", "mode", "redirect_clients", "fallback", "on_dead", "policy", "source_prefix", "slow_start")
    _unknown_keys(problems, "", entry, (*known, "backends"))
    vip = problems.attempt("address", lambda: parse_vip(_string(entry.get("address", ""))))
    mode = problems.attempt("mode", _enum, Mode, entry.get("mode", "negotiated"))
    fallback = problems.attempt("fallback", _enum, Fallback, entry.get("fallback", "auto"))
    on_dead = problems.attempt("on_dead", _enum, OnDead, entry.get("on_dead", "reassign"))
    policy = problems.attempt("policy", parse_policy, entry.get("policy", "maglev"))
    prefix = problems.attempt("source_prefix", _source_prefix, entry.get("source_prefix", [32, 128]))
    if "source_prefix" in entry and policy not in (None, "source-hash"):
        problems.add("source_prefix", f"is of use with policy = 'source-hash' only, not with {policy!r}")
    slow_start = problems.attempt("slow_start", _seconds, entry.get("slow_start", 0))
    backends = [
        problems.attempt(f"backends[{i}]", _backend_entry, b)
        for i, b in enumerate(problems.attempt("backends", _list, entry.get("backends", [])) or [])
    ]
    prefixes = [
        problems.attempt(f"redirect_clients[{i}]", lambda p: parse_prefix(_string(p)), p)
        for i, p in enumerate(problems.attempt("redirect_clients", _list, entry.get("redirect_clients", [])) or [])
    ]
    if "redirect_clients" in entry and not prefixes:
        problems.add("redirect_clients", "is empty; leave it out to mean all, or set mode = 'never' for none")
    problems.finish()
    assert vip is not None and mode is not None and fallback is not None and on_dead is not None
    assert policy is not None and prefix is not None and slow_start is not None
    return Service(
        vip,
        tuple(b for b in backends if b is not None),
        mode,
        tuple(p for p in prefixes if p is not None),
        fallback,
        on_dead,
        policy,
        prefix,
        slow_start,
    )


def check_services(services: Sequence[tuple[str, Service]], table_size: int) -> list[str]:
    """What is wrong with services taken together; each comes with the place it was read from."""
    problems = _Problems()
    seen: dict[Vip, str] = {}
    vips = {service.vip.address: where for where, service in services}
    addresses: set[Address] = set()
    for where, service in services:
        vip = service.vip
        if vip in seen:
            problems.add(where, f"{vip} is served already by {seen[vip]}; put all its backends there")
        seen.setdefault(vip, where)
        if not service.backends:
            problems.add(where, f"{vip} has no backends; name at least one")
        own: set[Address] = set()
        for backend in service.backends:
            if backend.address in own:
                problems.add(where, f"backend {backend.address} is named twice; use a weight instead")
            own.add(backend.address)
            if backend.address.version != vip.address.version and service.fallback is not Fallback.DSR_IPIP:
                problems.add(
                    where,
                    f"backend {backend.address} is IPv{backend.address.version} and {host_port(vip.address, vip.port)}"
                    f" is IPv{vip.address.version}; only a tunnel leads from one to the other: fallback = 'dsr-ipip'",
                )
            if backend.address in vips:
                problems.add(
                    where,
                    f"backend {backend.address} is also a VIP ({vips[backend.address]}); give it an own address",
                )
        if service.backends and not any(b.weight for b in service.backends):
            problems.add(where, f"every backend of {vip} has weight 0; give one a weight")
        for prefix in service.redirect_clients:
            if prefix.version != vip.address.version:
                problems.add(where, f"redirect_clients: {prefix} can hold no client of {vip}")
        if len(service.backends) > table_size:
            problems.add(
                where,
                f"{len(service.backends)} backends do not fit a table of {table_size} slots;"
                f" set table_size to a prime above {100 * len(service.backends)}",
            )
        addresses |= own
    if len(addresses) > MAX_BACKENDS:
        problems.add("services", f"{len(addresses)} backends in all; the limit is {MAX_BACKENDS}")
    return problems.found


def config_from_args(
    interfaces: Sequence[str],
    services: Sequence[str],
    *,
    fallback: Fallback = Fallback.AUTO,
    policy: str = "maglev",
    **settings: Any,
) -> Config:
    """A configuration from ``--service`` strings.  Raises :class:`ConfigError` with every fault."""
    problems = _Problems()
    problems.attempt("--policy", parse_policy, policy)
    names = problems.attempt("--iface", _distinct, interfaces)
    parsed = [(f"--service {text}", problems.attempt(f"--service {text}", parse_service, text)) for text in services]
    good = [
        (where, replace(service, fallback=fallback, policy=policy)) for where, service in parsed if service is not None
    ]
    problems.found += check_services(
        good, settings.get("table_size", Config.__dataclass_fields__["table_size"].default)
    )
    problems.finish()
    assert names is not None
    return Config(names, tuple(service for _, service in good), **settings)


def _interfaces(value: object) -> tuple[str, ...]:
    names = [_string(name) for name in value] if isinstance(value, list) else [_string(value)]
    if not names:
        raise ConfigError("names no interface")
    return _distinct(names)


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names of interfaces, each once.  Raises :class:`ConfigError`."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is named twice")
    return tuple(names)


def parse_endpoint(value: object) -> tuple[Address, int]:
    """``10.0.0.2``, ``10.0.0.2:7171``, ``[fd00::2]:7171``.  Raises :class:`ConfigError`."""
    text = _string(value)
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::([0-9]{1,5}))?", text)
    if not match or not 0 < int(match[2] or PORT) < 65536:
        raise ConfigError(f"{text!r} is not ADDRESS or ADDRESS:PORT (an IPv6 address stands in brackets)")
    bare = match[1].strip("[]")
    if bare in ("0.0.0.0", "::"):
        return ipaddress.ip_address(bare), int(match[2] or PORT)
    return _address(bare, "an endpoint of reports"), int(match[2] or PORT)


SETTINGS: dict[str, Callable[[object], Any]] = {
    "interface": _interfaces,
    "option": lambda v: _enum(OptionForm, v),
    "seed": _seed,
    "xdp_mode": lambda v: _enum(XdpMode, v),
    "queues": lambda v: _number(1, 64, v),
    "busy_poll": lambda v: _number(0, 1_000_000, v),
    "table_size": _table_size,
    "flows": lambda v: _number(64, 1 << 26, v),
    "announce": lambda v: _enum(Announce, v),
    "report_listen": parse_endpoint,
    "report_key_file": lambda v: read_key(_string(v)),
    "ack_bypass": lambda v: _enum(Bypass, v),
}


def load_config(path: Path | str, interfaces: Sequence[str] = ()) -> Config:
    """Read a TOML file; ``interfaces``, if any, override the file's.  Raises :class:`ConfigError` with every fault."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None

    # A policy of one's own may lie beside the file.
    if (folder := str(Path(path).resolve().parent)) not in sys.path:
        sys.path.append(folder)
    problems = _Problems()
    _unknown_keys(problems, str(path), table, (*SETTINGS, "service"))
    settings: dict[str, Any] = {}
    for key, parse in SETTINGS.items():
        if key in table:
            settings[key] = problems.attempt(f"{path}: {key}", parse, table[key])
    if interfaces:
        settings["interface"] = problems.attempt("--iface", _distinct, interfaces)
    elif "interface" not in table:
        problems.add(str(path), "interface is missing; add interface = 'eth0', or pass --iface")
    if "report_key_file" in settings:
        settings["report_key"] = settings.pop("report_key_file")
    if ("report_listen" in table) != ("report_key_file" in table):
        problems.add(str(path), "report_listen and report_key_file belong together (make a key: crablb key new)")
    lines = [n for n, line in enumerate(text.splitlines(), 1) if re.match(r"\s*\[\[\s*service\s*\]\]", line)]
    services = []
    for i, entry in enumerate(problems.attempt(f"{path}: service", _list, table.get("service", [])) or []):
        line = f" (line {lines[i]})" if i < len(lines) else ""
        where = f"{path}: service {i + 1}{line}"
        service = problems.attempt(where, _service_entry, entry)
        if service:
            services.append((where, service))
    if "service" not in table:
        problems.add(str(path), "no [[service]]; add one with address and backends")
    problems.found += check_services(services, settings.get("table_size") or 65537)
    problems.finish()
    return Config(settings.pop("interface"), tuple(service for _, service in services), **settings)
