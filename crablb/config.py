"""From text to :class:`crablb.model.Config`: TOML files and arguments, by the table of :mod:`crablb.options`.

Every fault of a configuration is found and told at once, each with its place and the way to mend it.  Nothing but
:class:`crablb.errors.ConfigError` is raised.
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from crablb import trust
from crablb.errors import ConfigError, Problems
from crablb.model import Address, Backend, Check, CheckKind, Config, Fallback, Service, Switch, Vip, host_port
from crablb.options import OPTIONS, Option, Scope, of
from crablb.values import (
    listed,
    near,
    parse_address,
    parse_backend,
    parse_endpoint,
    parse_interfaces,
    parse_policy,
    parse_prefix,
    parse_vip,
    read_text,
    shown,
    without_imports,
)

__all__ = [
    "check_services",
    "checked",
    "config_from_args",
    "config_from_table",
    "load_config",
    "parse_backend",
    "parse_config",
    "parse_endpoint",
    "parse_policy",
    "parse_prefix",
    "parse_service",
    "parse_vip",
    "read_backend",
    "read_option",
    "read_service",
]

MAX_BACKENDS = 65535  # backend ids are 16 bits, one of which says "none"
M = TypeVar("M", bound=Config | Service | Backend | Check)


def _option(name: str) -> Option:
    """Of the load balancer or a service."""
    return next(option for option in OPTIONS if option.name == name and option.scope in (Config, Service))


DEFAULT_TABLE_SIZE: int = _option("table_size").default  # type: ignore[assignment]


def _value(
    problems: Problems,
    option: Option,
    value: object,
    where: str,
    parse: Callable[[object], Any],
    element: Callable[[int], str],
) -> Any:
    """A field; None, or an element of it None, after noting why not.  ``element``: the place of one of a list."""
    if not option.kind.each:
        return problems.attempt(where, parse, value)
    elements = problems.attempt(where, listed, value) or ()
    return tuple(problems.attempt(element(i), parse, v) for i, v in enumerate(elements))


# ---- files ----


def _read(
    problems: Problems, scope: Scope, table: Mapping[str, object], service: Callable[[int], str] = str
) -> dict[str, Any]:
    """The fields that a table gives.  ``service``: the place of the i-th service."""
    options = of(scope)
    known = tuple(option.name for option in options)
    for key in table:
        if key not in known:
            hint = near(key, known, f"known are {', '.join(sorted(known))}")
            problems.add("", f"unknown key {shown(key)}; {hint}")
    found: dict[str, Any] = {}
    for option in options:
        if option.name in table:
            found[option.field] = _held(problems, option, table[option.name], service)
        elif option.missing:
            problems.add("", option.missing)
    return found


def _held(problems: Problems, option: Option, value: object, service: Callable[[int], str] = str) -> Any:
    """The field of what a file holds."""
    parse = _NESTED[option.kind.nested] if option.kind.nested else option.kind.parse
    element = service if option.kind.nested is Service else partial("{}[{}]".format, option.name)
    return _value(problems, option, value, option.name, parse, element)


def read_option(option: Option, value: object) -> Any:
    """The field of what a file holds for an option: :func:`crablb.options.held`, back.

    None: what it is where a file says nothing.  Raises :class:`ConfigError` with every fault.
    """
    if value is None:
        return option.default
    problems = Problems()
    found = _held(problems, option, value)
    problems.finish()
    return found


def read_backend(entry: object) -> Backend:
    """An element of ``backends`` of a file.  Raises :class:`ConfigError` with every fault."""
    if isinstance(entry, str):
        return parse_backend(entry)
    if not isinstance(entry, dict):
        keys = ", ".join(f"{option.name}=..." for option in of(Backend))
        raise ConfigError(f"{shown(entry)} is neither an address nor a table {{{keys}}}")
    problems = Problems()
    found = _read(problems, Backend, entry)
    problems.finish()
    return replace(parse_backend(entry["address"]), **found)  # a weight may be a part of it


def read_service(entry: object) -> Service:
    """A ``[[service]]`` of a file.  Raises :class:`ConfigError` with every fault."""
    if not isinstance(entry, dict):
        raise ConfigError("must be a table, written [[service]]")
    problems = Problems()
    found = {"backends": ()} | _read(problems, Service, entry)
    if entry.get("redirect_clients") == []:
        problems.add("redirect_clients", "is empty; leave it out to mean all, or set mode = 'never' for none")
    _check_source_prefix(problems, found, "source_prefix", "policy = ")
    _check_quorum(problems, found, "quorum_hysteresis", "quorum")
    problems.finish()
    return Service(**found)


def _check(entry: object) -> Check:
    if isinstance(entry, str):
        entry = {"type": entry}
    if not isinstance(entry, dict):
        raise ConfigError(f"{shown(entry)} is neither the type of a check nor a table")
    problems = Problems()
    found = _read(problems, Check, entry)
    problems.finish()
    check = Check(**found)
    problems.found += check_check(check, found)
    problems.finish()
    return check


_NESTED: dict[Scope, Callable[[object], Any]] = {Service: read_service, Backend: read_backend, Check: _check}


def _check_source_prefix(problems: Problems, fields: Mapping[str, Any], where: str, how: str) -> None:
    policy = fields.get("policy", "maglev")
    if "source_prefix" in fields and policy not in (None, "source-hash"):
        problems.add(where, f"is of use with {how}'source-hash' only, not with {policy!r}")


def _check_together(problems: Problems, fields: Mapping[str, Any], name: Callable[[Option], str]) -> None:
    """What of the load balancer's settings needs others, or is of no use beside them."""
    by_field = {option.field: name(option) for option in of(Config)}
    both = [field for field in ("report_listen", "report_key") if field in fields]
    if len(both) == 1:
        pair = " and ".join(by_field[field] for field in ("report_listen", "report_key"))
        problems.add("", f"{pair} belong together (make a key: crablb key new)")
    secrets = ("admin_cert", "admin_key", "admin_token_file")
    missing = [by_field[field] for field in secrets if field not in fields]
    if "admin_listen" in fields and missing:
        problems.add(by_field["admin_listen"], f"needs {', '.join(missing)} as well: it is TLS, and asks for a token")
    if "admin_listen" not in fields:
        for field in secrets:
            if field in fields:
                problems.add(by_field[field], f"is of use with {by_field['admin_listen']} only")
    if fields.get("admin") is Switch.OFF:
        for field in ("admin_group", "admin_listen"):
            if field in fields:
                problems.add(by_field[field], f"is of no use with {by_field['admin']} off")


def _check_quorum(problems: Problems, fields: Mapping[str, Any], where: str, quorum: str) -> None:
    if fields.get("quorum_hysteresis") and not fields.get("quorum"):
        problems.add(where, f"is of use with {quorum} only")


def read_file(path: Path | str) -> str:
    """A configuration as it is written.  Raises :class:`ConfigError`."""
    try:
        return read_text(path)
    except ConfigError as error:
        if not str(path) or "\0" in str(path):
            raise
        if os.path.isdir(path):
            raise ConfigError(f"{error}; name a file in it") from None
        if os.path.lexists(path):
            raise
        raise ConfigError(f"{error}; make one: crablb quickstart --output {shlex.quote(str(path))}") from None


def load_config(path: Path | str, interfaces: Sequence[str] = ()) -> Config:
    """Read a TOML file; ``interfaces``, if any, override the file's.  Raises :class:`ConfigError` with every fault."""
    if Path(path).is_fifo():
        raise ConfigError(f"{path}: is a pipe; it is read again by a reload, which could wait for ever: use a file")
    why = trust.writer(path)  # before it is read: whom it says there are none of cannot change it meanwhile
    text = read_file(path)
    if not why:  # a policy of one's own may lie beside the file
        trust.beside(Path(path).resolve().parent)
    refusal = f"{why}, and what a configuration names is run as user {os.geteuid()}; {trust.remedy(why)}"
    with without_imports(because=refusal) if why else nullcontext():
        config = parse_config(text, interfaces, str(path))
    problems = [f"{path}: {service.vip}: check: {told}" for service, told in _programs(config, refusal if why else "")]
    if problems:
        raise ConfigError(problems)
    return config


def _programs(config: Config, refusal: str) -> Iterator[tuple[Service, str]]:
    """Programs that checks are not to run, with the reason.  ``refusal``: why none is to be."""
    for service in config.services:
        for program in dict.fromkeys(c.command[0] for c in service.checks or () if c.kind is CheckKind.EXEC):
            if refusal:
                yield service, refusal
            elif os.path.lexists(program) and (why := trust.writer(program)):
                yield service, f"{why}, and it would be run as user {os.geteuid()}; {trust.remedy(why)}"


def parse_config(text: str, interfaces: Sequence[str] = (), where: str = "") -> Config:
    """The text of a TOML file, of which ``where`` is the name; see :func:`load_config`."""
    problems = Problems()
    names = problems.attempt("--iface", parse_interfaces, interfaces) if interfaces else None
    config = problems.attempt(where, _parse, text, bool(interfaces))
    problems.finish()
    assert config is not None
    return replace(config, interfaces=names) if names else config


def _parse(text: str, overridden: bool) -> Config:
    """``overridden``: the interfaces are, and need not be there."""
    try:
        table = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or a number of more digits than Python takes
        raise ConfigError(str(error)) from None
    except RecursionError:
        raise ConfigError("is nested too deeply") from None
    if overridden:
        table.setdefault("interface", "overridden")
    lines = [n for n, line in enumerate(text.split("\n"), 1) if re.match(r"\s*\[\[\s*service\s*\]\]", line)]

    def place(i: int) -> str:
        return f"service {i + 1}" + (f" (line {lines[i]})" if i < len(lines) else "")

    return config_from_table(table, place)


def config_from_table(table: Mapping[str, object], place: Callable[[int], str] = "service {}".format) -> Config:
    """What a file says that has this in it; ``place``: of the i-th service.  Raises :class:`ConfigError`."""
    problems = Problems()
    fields = _read(problems, Config, table, place)
    _check_together(problems, fields, lambda option: option.name)
    entries = table.get("service")
    services = [
        (place(i), _names(service) if service else _names_of_entry(entries[i]), service)  # type: ignore[index]
        for i, service in enumerate(fields.get("services") or ())
    ]
    problems.found += _check_services(services, fields.get("table_size") or DEFAULT_TABLE_SIZE)
    problems.finish()
    return Config(**fields)


# ---- arguments ----


def parse_service(text: str) -> Service:
    """``tcp://10.0.0.100:80=10.0.0.11,10.0.0.12*3``.  Raises :class:`ConfigError` with every fault."""
    vip_text, equals, backends_text = text.partition("=")
    if not equals:
        raise ConfigError(f"{shown(text)} is not VIP=BACKEND,BACKEND,... (tcp://10.0.0.100:80=10.0.0.11,10.0.0.12)")
    problems = Problems()
    vip = problems.attempt("VIP", parse_vip, vip_text.strip())
    backends = [
        problems.attempt(f"backend {i}", parse_backend, part.strip())
        for i, part in enumerate(backends_text.split(","), 1)
    ]
    problems.finish()
    assert vip is not None
    return Service(vip, tuple(b for b in backends if b is not None))


def config_from_args(interfaces: str | Sequence[str], services: Sequence[str], **given: object) -> Config:
    """A configuration from ``--service`` strings.  Raises :class:`ConfigError` with every fault.

    ``given``: other options by their names, as the text of the argument or as what a file would hold; those of a
    service are for all of them.
    """
    problems = Problems()
    names = None
    if interfaces:
        names = problems.attempt("--iface", parse_interfaces, interfaces)
    else:
        problems.add("", "say which interface to serve: --iface eth0")
    if not services:
        problems.add(
            "",
            "say what to serve: --service tcp://10.0.0.100:80=10.0.0.11,10.0.0.12, or --config FILE.toml (made by"
            " crablb quickstart)",
        )
    fields: dict[Scope, dict[str, Any]] = {Config: {}, Service: {}}
    for name, value in given.items():
        option = _option(name)
        fields[option.scope][option.field] = _given(problems, option, value)
    _check_source_prefix(problems, fields[Service], "--source-prefix", "--policy ")
    _check_quorum(problems, fields[Service], "--quorum-hysteresis", "--quorum")
    _check_together(problems, fields[Config], lambda option: option.flags[0])
    placed = []
    for text in services:
        where = f"--service {text}"
        service = problems.attempt(where, parse_service, text)
        if service:
            service = _with(problems, where, service, fields[Service])
        placed.append((where, _names(service) if service else _names_of_text(text), service))
    problems.found += _check_services(placed, fields[Config].get("table_size") or DEFAULT_TABLE_SIZE)
    problems.finish()
    assert names is not None
    return Config(names, tuple(service for *_, service in placed if service), **fields[Config])


def _given(problems: Problems, option: Option, value: object) -> Any:
    flag = option.flags[0]
    held = problems.attempt(flag, option.kind.read, value) if isinstance(value, str) else value
    return None if held is None else _value(problems, option, held, flag, option.kind.parse, lambda _: flag)


def _with(problems: Problems, where: str, service: Service, fields: Mapping[str, Any]) -> Service:
    """The service with what was given for all.  Of the prefixes it gets those of its address family."""
    own = {name: value for name, value in fields.items() if value is not None}
    if prefixes := [prefix for prefix in own.pop("redirect_clients", ()) if prefix]:
        version = service.vip.address.version
        own["redirect_clients"] = tuple(prefix for prefix in prefixes if prefix.version == version)
        if not own["redirect_clients"]:
            problems.add(where, f"--redirect-clients names no IPv{version} prefix; to redirect none: --mode never")
    return replace(service, **own)


# ---- values ----


_REQUESTS = (CheckKind.HTTP, CheckKind.HTTPS)
_HANDSHAKES = (CheckKind.HTTPS, CheckKind.TLS)
#: What of a check's settings is of use with some kinds only.
_OF_KINDS = {
    "port": (CheckKind.TCP, *_REQUESTS, CheckKind.TLS, CheckKind.EXEC, CheckKind.AGENT),
    **dict.fromkeys(("method", "path", "host", "status", "body"), _REQUESTS),
    **dict.fromkeys(("verify", "sni", "ca_file"), _HANDSHAKES),
    "command": (CheckKind.EXEC,),
}


def check_check(check: Check, given: Collection[str]) -> list[str]:
    """What is wrong with a check, as a whole; ``given``: the fields that were said."""
    problems = []
    if check.kind is CheckKind.EXEC and not check.command:
        problems.append("command is missing; add command = ['/usr/local/bin/check']")
    if check.kind is CheckKind.AGENT and check.port is None:
        problems.append("port is missing; add port = 9999, where the agent listens")
    for option in of(Check):
        kinds = _OF_KINDS.get(option.field, tuple(CheckKind))
        if option.field in given and check.kind not in kinds:
            words = ", ".join(kind.value for kind in kinds)
            problems.append(f"{option.name}: is of use with type {words} only, not with {check.kind.value}")
    if "ca_file" in given and check.kind in _HANDSHAKES and not check.verify:
        problems.append("ca_file: is of use with verify = true only")
    if "body" in given and check.method == "HEAD":
        problems.append("body: is of no use with method = 'HEAD', whose answer has none")
    return problems


def check_services(services: Sequence[tuple[str, Service]], table_size: int) -> list[str]:
    """What is wrong with services taken together; each comes with the place it was read from."""
    return _check_services([(where, _names(service), service) for where, service in services], table_size)


#: The VIP and the backends of a service, as far as they can be read.
_Names = tuple[Vip | None, Sequence[Address]]


def _names(service: Service) -> _Names:
    return service.vip, [backend.address for backend in service.backends]


def _names_of_entry(entry: object) -> _Names:
    """Of a ``[[service]]`` that has faults."""
    if not isinstance(entry, Mapping):
        return None, ()
    backends = entry.get("backends")
    return _vip_of(entry.get("address")), _addresses_of(backends if isinstance(backends, list) else ())


def _names_of_text(text: str) -> _Names:
    """Of a ``--service`` that has faults."""
    vip, _, backends = text.partition("=")
    return _vip_of(vip.strip()), _addresses_of(backends.split(","))


def _vip_of(value: object) -> Vip | None:
    return Problems().attempt("", parse_vip, value)


def _addresses_of(backends: Iterable[object]) -> list[Address]:
    values = (each.get("address") if isinstance(each, Mapping) else each for each in backends)
    bare = (each.partition("*")[0].strip() if isinstance(each, str) else each for each in values)
    found = (Problems().attempt("", parse_address, each) for each in bare)
    return [address for address in found if address]


def _check_services(services: Sequence[tuple[str, _Names, Service | None]], table_size: int) -> list[str]:
    """Of a service that has faults of its own (None) what is named twice is told nevertheless."""
    problems = Problems()
    seen: dict[Vip, str] = {}
    vips = {vip.address: where for where, (vip, _), _ in services if vip}
    addresses: set[Address] = set()
    for where, (vip, backends), service in services:
        if vip and vip in seen:
            problems.add(where, f"{vip} is served already by {seen[vip]}; put all its backends there")
        if vip:
            seen.setdefault(vip, where)
        if service and not backends:
            problems.add(where, f"{vip} has no backends; name at least one")
        own: set[Address] = set()
        for address in backends:
            if address in own:
                problems.add(where, f"backend {address} is named twice; use a weight instead")
            own.add(address)
            if service and vip and address.version != vip.address.version and service.fallback is not Fallback.DSR_IPIP:
                problems.add(
                    where,
                    f"backend {address} is IPv{address.version} and {host_port(vip.address, vip.port)}"
                    f" is IPv{vip.address.version}; only a tunnel leads from one to the other: fallback = 'dsr-ipip'",
                )
            if address in vips:
                problems.add(where, f"backend {address} is also a VIP ({vips[address]}); give it an own address")
        if service:
            _check_service(problems, where, service, table_size)
        addresses |= own
    if len(addresses) > MAX_BACKENDS:
        problems.add("services", f"{len(addresses)} backends in all; the limit is {MAX_BACKENDS}")
    return problems.found


def _check_service(problems: Problems, where: str, service: Service, table_size: int) -> None:
    vip = service.vip
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


def checked(value: M) -> M:
    """The same, each field checked as in a file; words become the values that they stand for.

    Whatever a program has put into it.  Raises :class:`ConfigError` with every fault.
    """
    problems = Problems()
    fields: dict[str, Any] = {}
    for option in of(type(value)):
        given = getattr(value, option.field)
        if given is option.default:
            continue
        parse = partial(_checked_as, option.kind.nested) if option.kind.nested else option.kind.parse
        parsed = _value(problems, option, given, option.field, parse, partial("{}[{}]".format, option.field))
        if parsed != given:
            fields[option.field] = parsed
    if isinstance(value, Config):
        there = {o.field: v for o in of(Config) if (v := fields.get(o.field, getattr(value, o.field))) != o.default}
        _check_together(problems, there, lambda option: option.field)
    if isinstance(value, Service):
        said = {name: fields.get(name, getattr(value, name)) for name in ("quorum", "quorum_hysteresis")}
        _check_quorum(problems, said, "quorum_hysteresis", "quorum")
    if isinstance(value, Check) and not problems.found:
        given_fields = [o.field for o in of(Check) if getattr(value, o.field) != o.default]
        problems.found += check_check(replace(value, **fields), given_fields)
    problems.finish()
    return replace(value, **fields) if fields else value


def _checked_as(scope: Scope, value: object) -> object:
    if not isinstance(value, scope):
        raise ConfigError(f"{shown(value)} is no crablb.{scope.__name__}")
    return checked(value)
