"""What a load balancer that runs says of itself, by its API: its configuration, and its backends by each check."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crablb.api import client, types
from crablb.api.client import ApiError, Client, NotRunning
from crablb.config import config_from_table
from crablb.doctor.finding import Finding, fault, note, ok, warning
from crablb.errors import ConfigError
from crablb.model import Config
from crablb.version import VERSION

__all__ = ["Answers", "configuration", "judge", "read", "sockets"]

#: Seconds that it may take to answer: for the configuration, which others wait for; for the rest.
SOON, SECONDS = 1.0, 3.0
#: What the doctor goes by; the rest may name what this process cannot read (a policy's module, keys).
OPTIONS = ("interface", "xdp_mode", "queues", "ack_bypass", "announce", "allow_own_address", "closed")
OF_SERVICES = ("address", "backends", "mode", "fallback")


@dataclass(frozen=True, slots=True)
class Answers:
    """``refused``: why there is nothing else; ``silent``: it did not answer in time, or nonsense."""

    status: types.Status | None = None
    services: tuple[types.Service, ...] = ()
    backends: tuple[types.Backend, ...] = ()
    refused: str = ""
    silent: bool = False
    installed: str = ""  # the version of crablb that is; empty: not known


# ---- read ----


def sockets(interfaces: Collection[str]) -> list[Path]:
    """Those of the load balancers of these interfaces, each once."""
    there = client.found()
    return list(dict.fromkeys(there[name].resolve() for name in interfaces if name in there))


def configuration(paths: Iterable[Path]) -> Config | None:
    """Of the first that tells; None if nobody does."""
    for path in paths:
        try:
            with Client(path, timeout=SOON) as asked:
                return parse(asked.get("/v1/config", types.Configuration).settings)
        except (ApiError, NotRunning, ConfigError):  # which is told by `read`
            continue
    return None


def parse(settings: Mapping[str, Any]) -> Config:
    """As much of a configuration as the doctor goes by.  Raises :class:`ConfigError`."""
    table: dict[str, object] = {name: settings[name] for name in OPTIONS if name in settings}
    services = settings.get("service", [])
    table["service"] = [{name: one[name] for name in OF_SERVICES if name in one} for one in services]
    return config_from_table(table)


def read(path: Path) -> Answers:
    try:
        with Client(path, timeout=SECONDS) as asked:
            return Answers(
                asked.get("/v1/status", types.Status),
                tuple(asked.get("/v1/services", list[types.Service])),
                tuple(asked.get("/v1/backends", list[types.Backend])),
                installed=VERSION,
            )
    except NotRunning as error:
        return Answers(refused=str(error))
    except ApiError as error:
        return Answers(refused=str(error), silent=True)


# ---- judge ----


def judge(found: Answers) -> Iterator[Finding]:
    if not found.status:
        if found.silent:
            yield warning(
                "api-silent",
                f"the load balancer does not answer as it should: {found.refused}",
                "its control side is stuck, or very busy; known flows and new connections go on",
                "its log; crablb status",
            )
        else:
            why = found.refused or "it has no socket: admin = 'off', it began a moment ago, or is one of before"
            yield note("api-none", "the load balancer cannot be asked", why, "admin = 'on', and a restart")
        return
    for trouble in found.status.checks_trouble:
        yield warning(
            "checks-late", trouble, "what servers do is found out late, or not at all", "crablb status; its log"
        )
    for service in found.services:
        yield from _service(service, found.backends)
    for backend in found.backends:
        yield from _backend(backend)
    runs = found.status.version.version
    if found.installed and runs != found.installed:
        yield note(
            "version",
            f"crablb {runs} runs, and {found.installed} is installed",
            "what is installed is in use from the next start",
            "restart crablb serve: the next one takes over",
        )
    if found.status.changes:
        yield note(
            "changes",
            f"{found.status.changes} changes at run time are not in {found.status.configuration or 'the arguments'}",
            "they outlive reloads and restarts, and whoever reads the file does not see them",
            "crablb diff shows them, crablb save writes them there",
        )


def _service(service: types.Service, backends: Iterable[types.Backend]) -> Iterator[Finding]:
    if not service.serving and service.backends:
        reasons = [one.reason for one in backends if one.service == service.vip and one.reason]
        yield fault(
            "service-down",
            f"{service.vip}: no backend serves",
            ", ".join(dict.fromkeys(reasons)) or "none gets new connections",
            f"crablb backends {service.vip}",
        )
    elif service.panic:
        yield warning(
            "panic",
            f"{service.vip}: panic: {service.healthy_weight} of {service.weight} of the weight is healthy",
            "health is disregarded: connections go to backends that fail their checks too",
            f"crablb backends {service.vip}; mend the servers, or the checks if they are wrong",
        )
    elif service.serving:
        yield ok("service", f"{service.vip}: {service.serving} of {service.backends} backends serve")
    if service.quorum and not service.announced:
        yield fault(
            "quorum-lost",
            f"{service.vip} is withdrawn: {service.healthy_weight} of the weight is healthy, quorum = {service.quorum}",
            "it is not announced until there is more",
            f"crablb backends {service.vip}",
        )


def _backend(backend: types.Backend) -> Iterator[Finding]:
    name = f"{backend.service}, backend {backend.address}"
    failed = [check for check in backend.checks if check.ok is False]
    if backend.healthy is False:
        told = "; ".join(f"{check.type}: {check.reason}" for check in failed) or backend.reason
        tell = note if _out(backend) else warning
        yield tell(
            "backend-unhealthy",
            f"{name} is unhealthy: {told}",
            _follows(backend),
            f"crablb backends {backend.service}; on the server: ss -ltn, and its log",
        )
    else:
        for check in failed:
            yield note(
                "check-failed",
                f"{name}: check {check.type} failed last: {check.reason}",
                "it is healthy all the same: not often enough in a row, or another check's word counts",
                f"crablb backends {backend.service}",
            )
    if not backend.cr and backend.cr_reason and backend.cr_reason not in CHOSEN:
        yield warning(
            "backend-fallback",
            f"{name} is not redirected to: {backend.cr_reason}",
            "its clients take the fallback: each of their packets passes the load balancer",
            f"on {backend.address}: crablb agent status; what filters the way between it and clients",
        )


def _out(backend: types.Backend) -> str:
    """The operator's word that gives a backend no new connections, whatever its health; empty: there is none."""
    if backend.state != "up":
        return f"state is {backend.state}"
    return "" if backend.weight else "weight is 0"


def _follows(backend: types.Backend) -> str:
    """What comes of it that a backend is unhealthy."""
    if out := _out(backend):
        return f"it gets no new connections anyway, as its {out}"
    if backend.serving:
        return "it gets new connections all the same, as health is disregarded (panic)"
    if backend.backup:
        return "it gets no new connections, and would stand in for no other backend"
    return "it gets no new connections"


#: Why a backend is not redirected to that was so configured.
CHOSEN = ("mode is never", "cr is false", "another address family")
