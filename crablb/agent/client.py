"""The client endpoint: offers redirection, checks redirects, translates.  See bpf/client.bpf.c."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import structlog

from crablb._native import lib
from crablb.agent import offering
from crablb.agent.base import FILTER, Agent, detach_filters, tool
from crablb.errors import ConfigError, KernelError
from crablb.kernel import bpf
from crablb.model import Address, Network, OptionForm, Vip, mapped

log = structlog.get_logger()

FORMS = {OptionForm.CRAB: lib.CRAB_FORM_CRAB, OptionForm.EXPERIMENTAL: lib.CRAB_FORM_EXPERIMENTAL}
#: Ours must win over a route of the same prefix; IPv4 has no room below its default, 0.
IPV6_METRIC = "1"


def _ip(address: Address, *args: str) -> str:
    return tool("ip", f"-{address.version}", *args)


def _route(address: Address) -> dict[str, Any]:
    """The route that packets to an address take.  Raises :class:`KernelError` if there is none."""
    try:
        route: dict[str, Any] = json.loads(_ip(address, "-j", "route", "get", str(address)))[0]
    except KernelError as error:
        raise KernelError(f"no route to {address}: {error}; add one, as towards the load balancer") from None
    if route.get("type") == "local" or route.get("dev") == "lo":
        raise KernelError(f"{address} is an address of this host; a client cannot redirect connections to itself")
    return route


class ClientAgent(Agent):
    """Let the clients of a cgroup, in this network namespace, be redirected when they connect to ``vips``.

    ``backends``: the prefixes that backends may have; a redirect from elsewhere is refused.  ``interfaces``: where
    their packets come in; by default those that the routes to the VIPs and the prefixes use.  ``flows``: redirected
    connections that there is room for, unless an agent before has decided that.  ``retransmission``: seconds until a
    SYN that offered is sent again; 0: as the system does.
    """

    role: ClassVar[str] = "client"
    lasting = ("client_pending", "client_out", "client_in", "client_ports", "client_conns")

    def __init__(
        self,
        vips: Sequence[Vip],
        backends: Sequence[Network],
        *,
        option: OptionForm = OptionForm.CRAB,
        cgroup: Path | str | None = None,
        interfaces: Sequence[str] = (),
        flows: int = offering.FLOWS,
        retransmission: float = offering.RETRANSMISSION,
    ) -> None:
        super().__init__(vips, cgroup)
        if not backends:
            raise ConfigError("name the prefixes that backends may have: --backends 10.0.0.0/24")
        self.backends = list(backends)
        self.option = option
        self.interfaces = list(interfaces)
        self.sizes = dict.fromkeys(offering.FLOW_MAPS, flows)
        self.retransmission = retransmission

    def set_up(self, program: bpf.Object) -> None:
        addresses = list(dict.fromkeys(v.address for v in self.vips))
        routes = {address: _route(address) for address in addresses}
        # A redirect that fails to be sent makes its ICMP error come in by way of lo.
        names = ["lo", *(self.interfaces or self._interfaces(routes))]
        indices = {}
        for name in dict.fromkeys(names):
            try:
                indices[name] = socket.if_nametoindex(name)
            except OSError:
                raise KernelError(f"interface {name} does not exist (see ip link)") from None

        flows = program.map("client_out").max_entries
        told = offering.settings(flows, retransmission=self.retransmission)
        program.map("client_settings").update(0, told)
        for vip in self.vips:
            program.map("client_vips").update(vip.key(), FORMS[self.option])
        for prefix in self.backends:
            bits = prefix.prefixlen + (96 if prefix.version == 4 else 0)
            key = bits.to_bytes(4, "little") + mapped(prefix.network_address)
            program.map("client_backends").update(key, 1)

        # Whatever is done is noted first, so that it can be undone by anyone.
        state: dict[str, Any] = {
            "backends": [str(p) for p in self.backends],
            "option": self.option.value,
            "filters": {},
            "routes": [],
        }
        self.remember(**state)
        for name, index in indices.items():
            _, made = bpf.attach_tc(program.program("crab_ingress"), index, "ingress", priority=FILTER, handle=FILTER)
            state["filters"][name] = made
            self.remember(**state)
        egress = self.folder() / "egress"
        program.program("crab_egress").pin(egress)
        for address, route in routes.items():
            host = f"{address}/{address.max_prefixlen}"
            metric = ["metric", IPV6_METRIC] if address.version == 6 else []
            before = _ip(address, "route", "show", "exact", host, *metric).strip()
            state["routes"].append({"prefix": host, "before": before})
            self.remember(**state)
            via = ["via", route["gateway"]] if "gateway" in route else []
            _ip(
                address, "route", "replace", host, "encap", "bpf", "xmit", "pinned", str(egress),
                *via, "dev", route["dev"], *metric,
            )  # fmt: skip
        for _ in range(100):  # ENOMEM is a matter of the moment: see client_sweeper
            if program.program("crab_sweep").test_run().retval == 0:
                break
        else:
            raise KernelError("the kernel has no memory for the agent's timer; try again")
        # Last: from here on, connections offer.
        with program.program("crab_offer").attach_cgroup_sockops(self.cgroup) as link:
            link.pin(self.folder() / "link")

    def _interfaces(self, routes: dict[Address, dict[str, Any]]) -> list[str]:
        names = [route["dev"] for route in routes.values()]
        for prefix in self.backends:
            ends = {
                prefix.network_address + (prefix.num_addresses > 1),
                prefix.broadcast_address - (prefix.num_addresses > 2),
            }
            for address in ends:
                try:
                    names.append(_route(address)["dev"])
                except KernelError as error:
                    log.debug("no interface for backends", address=str(address), reason=str(error))
        return names

    @classmethod
    def tear_down(cls, state: dict[str, Any]) -> None:
        for route in state.get("routes", []):
            prefix, before = route["prefix"], route["before"]
            family = "-6" if ":" in prefix else "-4"
            metric = ["metric", IPV6_METRIC] if family == "-6" else []
            undo = ["replace", *before.splitlines()[0].split()] if before else ["del", prefix, *metric]
            try:
                tool("ip", family, "route", *undo)
            except KernelError as error:
                log.debug("route was gone", prefix=prefix, reason=str(error))
        detach_filters(state.get("filters", {}), "ingress")

    @classmethod
    def status(cls) -> dict[str, Any] | None:
        status = super().status()
        if status is not None:
            with bpf.Map.from_pin(cls.folder() / "client_out") as flows:
                status["flows"] = len(list(flows.keys()))
            status["redirects"] = offering.told(cls.folder())
        return status
