"""What is legal in a configuration, and seldom meant."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations

from crablb.model import Bypass, Check, CheckKind, Config, Mode, Service

__all__ = ["odd", "unreadable"]

#: Weights that are further apart than so are told.
APART = 100
#: Slots of a table for each backend that Maglev's paper asks for.
SLOTS = 100


def odd(config: Config) -> list[str]:
    """Each with its place."""
    found = list(_of_all(config))
    for service in config.services:
        own = [*_of_weights(service, config.table_size), *_of_health(service), *_of_clients(service)]
        found += [f"{service.vip}: {words}" for words in own]
    return found


def unreadable(config: Config) -> list[str]:
    """The files that it names and this process cannot read or run; each with its place."""
    found = []
    for name in ("admin_cert", "admin_key", "admin_token_file"):
        if (path := getattr(config, name)) and not os.access(path, os.R_OK):
            found.append(f"{name}: {path} cannot be read here")
    for service in config.services:
        for check in service.checks or ():
            if check.ca_file and not os.access(check.ca_file, os.R_OK):
                found.append(f"{service.vip}: check {check.kind.value}: ca_file: {check.ca_file} cannot be read here")
            if check.command and not os.access(check.command[0], os.X_OK):
                found.append(f"{service.vip}: check exec: command: {check.command[0]} cannot be run here")
    return found


def _of_all(config: Config) -> Iterator[str]:
    for name in ("admin_listen", "metrics_listen"):
        endpoint = getattr(config, name)
        if endpoint and endpoint[0].is_unspecified:
            yield f"{name}: {endpoint[0]} is every address of this machine, the VIPs among them; name the one it is for"
    if config.keep and config.ack_bypass is Bypass.OFF:
        yield 'keep: with ack_bypass = "off" there is nothing to keep'
    if not config.services:
        yield "there is no service: nothing is served"


def _of_weights(service: Service, table_size: int) -> Iterator[str]:
    backends = service.backends
    if table_size < SLOTS * len(backends):
        yield (
            f"table_size: {table_size} slots for {len(backends)} backends; with less than {SLOTS * len(backends)} their"
            " shares are uneven"
        )
    shares = [backend for backend in backends if backend.share]
    if not shares:
        states = sorted({backend.state.value if backend.weight else "weight 0" for backend in backends})
        yield f"no backend gets new connections: all are {', '.join(states)}"
        return
    least, most = min(shares, key=lambda b: b.share), max(shares, key=lambda b: b.share)
    if most.share > APART * least.share:
        yield (
            f"weights are far apart: {least.address} gets one connection for {most.share // least.share:,} of"
            f" {most.address}"
        )
    if all(backend.backup for backend in shares):
        yield "all backends are backups, and serve as if none was"


def _of_health(service: Service) -> Iterator[str]:
    primaries = [b for b in service.backends if b.share and not b.backup]
    weight = sum(backend.share for backend in primaries)
    if service.quorum > weight:
        yield f"quorum: {service.quorum} is above the weight of its backends, {weight}: the VIP is never announced"
    elif service.quorum and service.quorum + service.quorum_hysteresis > weight:
        yield (
            f"quorum_hysteresis: with {service.quorum + service.quorum_hysteresis} above the weight of its backends,"
            f" {weight}, the VIP is never announced again"
        )
    if service.checks == ():
        if service.quorum:
            yield "quorum: without checks (check = []) all is always healthy"
        for backend in service.backends:
            if backend.check_address or backend.check_port:
                yield f"{backend.address}: check_address, check_port: there are no checks (check = [])"
    elif len(primaries) == 1 and not service.panic and not any(b.backup for b in service.backends):
        yield "panic: with 0 and one backend, nobody serves when a check of it fails"
    checks = service.checks or ()
    for check in checks:
        yield from (f"check {check.kind.value}: {words}" for words in _of_check(service, check))
    for one, other in combinations(checks, 2):
        if one == other:
            yield f"check {one.kind.value}: is there twice"


def _of_check(service: Service, check: Check) -> Iterator[str]:
    if check.timeout >= check.interval:
        yield f"timeout: {check.timeout:g} s, and the next one is due after {check.interval:g} s"
    if check.fast_interval > check.interval:
        yield f"fast_interval: {check.fast_interval:g} s is slower than the interval, {check.interval:g} s"
    if check.kind is CheckKind.REDIRECT:
        if service.mode is Mode.NEVER:
            yield 'with mode = "never" nobody is redirected'
        elif not any(backend.cr for backend in service.backends):
            yield "no backend is redirected to (cr = false)"
    if check.verify and not (check.sni or check.host):
        name = "sni" if check.kind is CheckKind.TLS else "sni, or host"
        yield f"verify: a certificate seldom names {service.vip.address}; say {name}"


def _of_clients(service: Service) -> Iterator[str]:
    prefixes = service.redirect_clients
    for prefix in prefixes:
        if not prefix.prefixlen:
            yield f"redirect_clients: {prefix} is everybody; leave it out"
    for one, other in combinations(sorted(prefixes, key=lambda p: p.prefixlen), 2):
        if one.version == other.version and one.prefixlen and other.subnet_of(one):  # type: ignore[arg-type]
            yield (
                f"redirect_clients: {other} is within {one}"
                if one != other
                else f"redirect_clients: {one} is there twice"
            )
    if prefixes and service.mode is Mode.NEVER:
        yield 'redirect_clients: with mode = "never" nobody is redirected'
    if (
        service.mode is not Mode.NEVER
        and service.backends
        and all(b.address.version != service.vip.address.version for b in service.backends)
    ):
        yield "no backend is of the VIP's address family: nobody is redirected"
    if service.slow_start > 3600:
        yield f"slow_start: {service.slow_start:g} s is more than an hour"
