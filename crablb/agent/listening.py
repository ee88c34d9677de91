"""Whether a server has anybody who takes redirected connections."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from crablb.kernel import rtnetlink
from crablb.kernel.rtnetlink import Listener
from crablb.model import Address, Vip


def lacking(vips: Collection[Vip], alone: Collection[Vip] = ()) -> dict[Vip, str]:
    """Why nobody in this network namespace takes redirected connections to these VIPs, of those where it is so.

    They come to an address of the server's own, on the VIP's port; ``alone``: VIPs to which none are to come, so that
    who listens at the VIP itself does.
    """
    listeners = list(rtnetlink.tcp_listeners())
    addresses = {vip.address for vip in vips}
    reasons = ((vip, _reason(vip, listeners, addresses - {vip.address} if vip in alone else addresses)) for vip in vips)
    return {vip: reason for vip, reason in reasons if reason}


def _reason(vip: Vip, listeners: Iterable[Listener], vips: Collection[Address]) -> str:
    here = [one for one in listeners if one.port == vip.port]
    family = [one for one in here if one.address.version == vip.address.version or one.both]
    if any(one.address not in vips and not one.address.is_loopback for one in family):
        return ""
    if family:
        where = ", ".join(sorted({str(one.address) for one in family}))
        return f"{vip}: servers listen on {where} only, and redirected connections come to this host's own address"
    if here:
        return f"{vip}: nothing listens on port {vip.port} over IPv{vip.address.version}"
    return f"{vip}: nothing listens on port {vip.port}"
