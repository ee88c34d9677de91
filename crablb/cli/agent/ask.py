"""``crablb agent status``, ``repair`` and ``remove``: of what is in the kernel, whoever put it there."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

from crablb.agent import ClientAgent, ServerAgent
from crablb.agent.base import Agent
from crablb.cli.agent.namespaces import chosen, in_each, prefix, require_rights
from crablb.errors import ConfigError, KernelError, Problems
from crablb.kernel import pins
from crablb.kernel.netns import Namespace
from crablb.values import counted

ROLES: dict[str, type[Agent]] = {"client": ClientAgent, "server": ServerAgent}


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,5}(\.\d+)?", text):
        raise ConfigError("is not a number of seconds (0 to 99999)")
    return float(text)


def _roles(args: argparse.Namespace) -> Mapping[str, type[Agent]]:
    return {role: cls for role, cls in ROLES.items() if args.role in (None, role)}


# ---- status ----


def run_status(args: argparse.Namespace) -> int:
    require_rights()
    problems = Problems()
    told = in_each(chosen(args), problems, lambda _: (_statuses(), _left()))
    if args.all_netns:
        told = {one: each for one, each in told.items() if any(each)}
    found = {one: statuses for one, (statuses, _) in told.items() if statuses or not args.all_netns}
    if args.json:
        named = {one.name: _plain(statuses) for one, statuses in found.items() if one}
        print(json.dumps(_plain(found[None]) if None in found else named))
    elif not told:
        print("no agent in any network namespace")
    else:
        for one, (statuses, left) in told.items():
            if one:
                print(f"{one}:")
            _show(statuses)
            for line in left:
                print(line)
    problems.finish()
    return int(any(status["faults"] for statuses in found.values() for status in statuses.values()))


def _statuses() -> dict[str, dict[str, Any]]:
    return {role: status for role, cls in ROLES.items() if (status := cls.status())}


def _plain(statuses: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """In place of a process that is not seen no number, which a script might end."""
    return {
        role: {**status, "pid": status["pid"] or None, "elsewhere": status["pid"] == pins.ELSEWHERE}
        for role, status in statuses.items()
    }


def _left() -> list[str]:
    """What agents have left."""
    return [
        f"{role}: stays: {what}; once they have ended: crablb agent remove {role}"
        for role, cls in ROLES.items()
        for what in cls.left()
    ]


def _show(statuses: Mapping[str, Mapping[str, Any]]) -> None:
    if not statuses:
        print("no agent in this network namespace")
    for role, status in statuses.items():
        where = "detached" if status["pid"] is None else pins.told(status["pid"])
        what = f"{', '.join(status['vips'])}, cgroup {status['cgroup']}" if status["vips"] else "MPTCP alone"
        print(f"{role}: {where}, {what}{', starting' if status['starting'] else ''}")
        if "routes" in status:
            _show_client(status)
        if role == "client":
            print(f"  MPTCP sockets {_takes_up(status['mptcp'])}")
        elif "mptcp" in status:
            _show_mptcp(status["mptcp"])
        for vip, n in status.get("connections", {}).items():
            print(f"  {vip:28} {n:>14,} open connections")
        for vip, n in status.get("redirected", {}).items():
            print(f"  {vip:28} {n['begun']:>14,} redirects begun, {n['completed']:,} completed")
        for name, value in status["counters"].items():
            if value:
                print(f"  {name:28} {value:>14,}")
        for fault in status["faults"]:
            print(f"  wrong: {fault}")


def _show_mptcp(status: Mapping[str, Any]) -> None:
    told = status.get("told", status["addresses"])  # unless the kernel does not tell of connections
    clients = f", only to {', '.join(status['clients'])}" if status["clients"] else ""
    print(f"  MPTCP, {status['mode']}: {', '.join(told)} {'is' if len(told) == 1 else 'are'} told{clients}")
    for said in status.get("unled", ()):
        print(f"    {said}")
    if "connections" in status:
        found = status["connections"]
        print(
            f"    open: {found['load_balancer']:,} by the load balancer, {found['both']:,} by both ways,"
            f" {found['direct']:,} directly"
        )


def _show_client(status: Mapping[str, Any]) -> None:
    room = f"{status['flows']:,} redirected connections (also closed ones), room for {status['room']:,}"
    print(f"  backends {', '.join(status['backends'])}, {room}")
    if "retransmission" in status:  # an agent of before did not note it
        when = f"after {status['retransmission']:g} s" if status["retransmission"] else "as the system does"
        print(f"  a SYN that offered is sent again {when}")
    for vip in status["vips"]:
        print(f"  {vip:28} {_vip(status, vip)}")
        for entry in status["redirects"]:
            minute = {name: n for name, n in entry["minute"].items() if n}
            if entry["vip"] == vip and minute:
                said = ", ".join(f"{n:,} {name}" for name, n in minute.items())
                print(f"    {entry['backend'] or 'in the last minute':26} {said}")


def _takes_up(status: Mapping[str, Any]) -> str:
    return f"go by the load balancer: {status['hindered']}" if status["hindered"] else "take up servers' addresses"


ROUTES = {"agent": "by the agent's route", "other": "by a route that is not the agent's", "none": "no route"}


def _vip(status: Mapping[str, Any], vip: str) -> str:
    said = "offers no more" if status.get("withdrawn") else "offering"
    for entry in status["redirects"]:
        if entry["vip"] == vip and entry["backend"] is None and entry["reason"] and not status.get("withdrawn"):
            when = f"in {entry['backing_off']:.0f} s" if entry["backing_off"] else "by the next connection"
            said = f"no offers since {entry['since']:.0f} s ago, tried again {when}"
    return f"{said}, {ROUTES[status['routes'][vip]]}"


# ---- repair ----


def run_repair(args: argparse.Namespace) -> int:
    require_rights()
    roles = _roles(args)
    which = f"{args.role} agent" if args.role else "agent"
    install = f"install one: crablb agent {args.role or 'server'} --vip ..."

    def repair(namespace: Namespace | None) -> list[bool]:
        installed = [cls for cls in roles.values() if cls.state() is not None]
        if not installed and not args.all_netns:
            raise KernelError(f"there is no {which} in this network namespace; {install}")
        return [_mended(cls, prefix(namespace)) for cls in installed]

    problems = Problems()
    mended = [each for done in in_each(chosen(args), problems, repair).values() for each in done]
    problems.finish()
    if not mended:
        raise KernelError(f"there is no {which} in any network namespace; {install}")
    return int(not all(mended))


def _mended(cls: type[Agent], before: str) -> bool:
    """Mend what can be; whether that is all."""
    found = cls.faults()
    refused: list[str] = []
    try:
        cls.repair()
    except KernelError as error:
        refused = str(error).splitlines()
    left = cls.faults()
    left += [why for why in refused if why not in left]
    for fault in found:
        if fault not in left:
            print(f"{before}mended; it was: {fault}")
    for fault in left:
        print(f"{before}not mended: {fault}")
    return not left


# ---- remove ----


def run_remove(args: argparse.Namespace) -> int:
    problems = Problems()
    wait = problems.each("--wait", [args.wait] if args.wait is not None else [], seconds)
    problems.finish()
    require_rights()
    end = time.monotonic() + wait[0] if wait else None
    with ExitStack() as owned:

        def begin(namespace: Namespace | None) -> list[type[Agent]]:
            with ExitStack() as all_or_none:
                found = [cls for cls in _roles(args).values() if cls.present() or not args.all_netns]
                for cls in found:
                    if (pid := pins.owner(cls.role)) is not None:
                        raise KernelError(
                            f"the {cls.role} agent is run by {pins.told(pid)}; end that ({pins.how_to_end(pid)}):"
                            " then it goes"
                        )
                    all_or_none.enter_context(cls.owned())
                owned.push(all_or_none.pop_all())
            for cls in () if args.now else found:
                cls.withdraw()
                if left := cls.live():
                    goes_on = f"{counted(left, 'connection')} left, to go on"
                    print(f"{prefix(namespace)}{cls.role}: offers no more; {goes_on}", flush=True)
            return found

        def finish(namespace: Namespace | None) -> None:
            for cls in begun[namespace]:
                left = 0
                if not args.now:
                    left = cls.drain(None if end is None else end - time.monotonic(), _pause)
                else:
                    with suppress(KernelError):  # how many there are is merely told
                        left = cls.live()
                removed = cls.remove()
                cut = f", which ends {counted(left, 'connection')}" if left else ""
                said = f"removed{cut}" if removed else "there was none"
                print(f"{prefix(namespace)}{cls.role}: {said}", flush=True)
                for what in cls.left():
                    print(f"{prefix(namespace)}{cls.role}: stays: {what}", flush=True)

        # All of them offer no more before any is waited for, so that the time is for all together.
        begun = in_each(chosen(args), problems, begin)
        in_each(list(begun), problems, finish)
    problems.finish()
    if not any(begun.values()):
        print("no agent in any network namespace")
    return 0


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return False
