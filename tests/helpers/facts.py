"""A load balancer as metrics and the status page see it, made up."""

from __future__ import annotations

import random
import time
from typing import Any

from crablb.api import types
from crablb.control.metrics.facts import Facts, Reload
from crablb.dataplane.statistics import DAEMON_COUNTERS, WORKER_COUNTERS, XDP_COUNTERS, Rounds

AT = 1_790_000_000.0


def check(kind: str = "tcp", **more: Any) -> types.CheckResult:
    said = {"healthy": True, "ok": True, "reason": "connected", "at": AT - 1, "seconds": 0.0004, "streak": 900}
    said |= {"since": AT - 5000, "history": "+" * 60}
    return types.CheckResult(type=kind, **said | more)


def backend(service: str, address: str, **more: Any) -> types.Backend:
    said: dict[str, Any] = {"state": "up", "serving": True, "reason": "", "healthy": True, "weight": 1, "weight_now": 1}
    said |= {"backup": False, "cr": True, "cr_reason": "", "reached": "eth0 02:00:00:00:00:0b", "connections": 42}
    said |= {"load": 0.25, "assigned": 1234, "flows": 7, "share": 0.3333, "since": AT - 5000, "changed": False}
    said |= {"checks": [check(), check("redirect", reason="echoed"), check("fallback", reason="the VIP answered")]}
    return types.Backend(service=service, address=address, **said | more)


def service(vip: str, **more: Any) -> types.Service:
    said: dict[str, Any] = {"mode": "negotiated", "fallback": "auto", "policy": "maglev", "backends": 3, "serving": 3}
    said |= {"healthy_weight": 3, "weight": 3, "panic": False, "backups": False, "quorum": 0, "announced": True}
    said |= {"flows": 21, "packets": 100_000, "bytes": 90_000_000, "changed": False}
    return types.Service(vip=vip, **said | more)


def status(**more: Any) -> types.Status:
    said: dict[str, Any] = {"state": "serving", "problems": [], "queues": 2, "zero_copy": False, "ack_bypass": True}
    said |= {"version": types.Version(version="0.1.0", api=1, pid=4711, started=AT - 90_000)}
    mac = "02:00:00:00:00:02"
    said |= {"interfaces": [types.Interface(name="eth0", mode="native", mtu=1500, queues=2, mac=mac)]}
    said |= {"services": 1, "backends": 3, "backends_serving": 3, "flows": 21, "changes": 0}
    said |= {"configuration": "/etc/crablb/lb.toml"}
    said |= {"counters": {"xdp": dict.fromkeys(XDP_COUNTERS, 5), "workers": dict.fromkeys(WORKER_COUNTERS, 9)}}
    said["counters"]["daemon"] = dict.fromkeys(DAEMON_COUNTERS, 0)
    return types.Status(**said | more)


def facts(services: list[types.Service], backends: list[types.Backend], **more: Any) -> Facts:
    queues = [("eth0", 0), ("eth0", 1)]
    rounds = Rounds((7, 3, 0, 0, 0, 0, 0, 0, 1), 141, (0, 6, *[0] * 15, 2), 0.2)
    said: dict[str, Any] = {
        "at": AT,
        "status": status(services=len(services), backends=len(backends)),
        "events": [],
        "workers": {queue: {name: n for n, name in enumerate(WORKER_COUNTERS)} for queue in queues},
        "rounds": dict.fromkeys(queues, rounds),
        "flows_limit": 262144,
        "published": 12,
        "reload": Reload(True, AT - 600),
    }
    return Facts(services=services, backends=backends, **said | more)


def many(count: int, each: int = 10) -> Facts:
    """So many backends, some of which are ill."""
    choose = random.Random(1)
    services, backends = [], []
    for n in range(max(1, count // each)):
        vip = f"tcp://10.{n // 250}.{n % 250}.100:80"
        services.append(service(vip, backends=each))
        for m in range(min(each, count)):
            address = f"172.16.{n % 250}.{m + 1}"
            if choose.random() < 0.05:
                history = "".join(choose.choice("+++-") for _ in range(55)) + "-----"
                ill = check(healthy=False, ok=False, reason="refused", streak=5, history=history)
                more = {"checks": [ill, check("redirect")], "serving": False, "healthy": False}
                backends.append(backend(vip, address, reason="tcp: refused", weight_now=0, share=0.0, **more))
            else:
                backends.append(backend(vip, address, checks=[check(), check("redirect")]))
    return facts(services, backends, at=time.time())
