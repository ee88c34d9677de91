"""What Prometheus is given: complete, by its conventions, the same as the load balancer says, in time."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import subprocess
import time
from ipaddress import ip_address
from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from crablb import lasting
from crablb.agent.metrics import METRICS as AGENT_METRICS
from crablb.api import types
from crablb.control import metrics
from crablb.control.metrics import Metrics, exposition
from crablb.control.metrics.exposition import METRICS, OUTCOMES, SEEN, SOCKET, render
from crablb.control.metrics.facts import Gatherer
from crablb.dataplane.events import Event
from crablb.dataplane.statistics import DAEMON_COUNTERS, WORKER_COUNTERS, XDP_COUNTERS, Rounds
from crablb.model import Config
from tests.helpers import facts as made
from tests.helpers.processes import ROOT
from tests.helpers.showing import showing

VIP = "tcp://10.0.0.100:80"


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """By name and labels, as Prometheus' own client reads them; each of them once."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def named(found, name, **labels):
    return found[name, tuple(sorted(labels.items()))]


def two():
    ill = made.check(healthy=False, ok=False, reason="refused", streak=4, at=made.AT - 2, seconds=1.5)
    backends = [
        made.backend(VIP, "10.0.0.11", assigned=7, weight=3, weight_now=2, share=0.625),
        made.backend(
            VIP, "10.0.0.12", state="drain", serving=False, healthy=None, load=None, connections=None, checks=[ill]
        ),
    ]
    return made.facts([made.service(VIP, policy="random", panic=True, quorum=2, healthy_weight=1)], backends)


def test_what_it_says_is_what_there_is():
    facts = two()
    found = samples(render(facts))
    one, other = ({"service": VIP, "backend": f"10.0.0.1{n}"} for n in (1, 2))
    assert named(found, "crablb_backend_redirects_total", **one) == 7
    assert named(found, "crablb_backend_weight", **one) == 3
    assert named(found, "crablb_backend_weight_now", **one) == 2
    assert named(found, "crablb_backend_share_ratio", **one) == 0.625
    assert named(found, "crablb_backend_state", **other, state="drain") == 1
    assert named(found, "crablb_backend_serving", **other) == 0
    assert named(found, "crablb_check_consecutive_failures", **one, check="tcp", number="1") == 0
    assert named(found, "crablb_check_consecutive_failures", **other, check="tcp", number="1") == 4
    assert named(found, "crablb_check_duration_seconds", **other, check="tcp", number="1") == 1.5
    assert named(found, "crablb_service_panic", service=VIP) == 1
    assert named(found, "crablb_start_time_seconds") == facts.status.version.started
    # Of what is not known there is nothing, rather than a nought.
    for name in ("healthy", "load_ratio", "connections"):
        assert (f"crablb_backend_{name}", tuple(sorted(other.items()))) not in found
    for (interface, queue), counts in facts.workers.items():
        where = {"interface": interface, "queue": str(queue)}
        assert named(found, "crablb_worker_received_packets_total", **where) == counts["received"]
        for name in OUTCOMES:
            assert named(found, "crablb_worker_packets_total", **where, reason=name) == counts[name]


def test_every_counter_is_in_it():
    assert {"received", "sent", *OUTCOMES, *SEEN, *SOCKET} == set(WORKER_COUNTERS)
    assert (OUTCOMES[0], OUTCOMES[-1]) == ("redirected", "drop_tx")
    assert (SEEN[0], SEEN[-1]) == ("reassigned", "flows_full")
    assert all(name.startswith("xsk_") for name in SOCKET)
    found = samples(render(two()))
    for metric, label, names in (
        ("crablb_xdp_packets_total", "reason", XDP_COUNTERS),
        ("crablb_daemon_events_total", "event", DAEMON_COUNTERS),
    ):
        assert {dict(labels)[label] for name, labels in found if name == metric} == set(names)


def test_histograms():
    rounds = Rounds((4, 2, 0, 0, 0, 0, 0, 0, 1), 264, (10, 0, 5, *[0] * 14, 1), 0.5)
    found = samples(render(made.facts([], [], rounds={("eth0", 0): rounds}, workers={})))
    where = {"interface": "eth0", "queue": "0"}

    def buckets(name):
        return {float(dict(labels)["le"]): value for (each, labels), value in found.items() if each == f"{name}_bucket"}

    sizes, times = buckets("crablb_worker_round_packets"), buckets("crablb_worker_packet_seconds")
    assert sizes == {float(1 << n): 4 if n == 0 else 6 if n < 8 else 7 for n in range(9)} | {math.inf: 7}
    assert named(found, "crablb_worker_round_packets_sum", **where) == 264
    assert len(times) == 18
    assert (times[256e-9], times[512e-9], times[1024e-9], times[math.inf]) == (10, 10, 15, 16)
    assert named(found, "crablb_worker_packet_seconds_sum", **where) == 0.5
    assert named(found, "crablb_worker_packet_seconds_count", **where) == 16


def test_names_are_prometheus_own_kind(tmp_path):
    """By promtool, which knows the conventions; and by their words: base units, a help, no label that is free."""
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=render(made.many(30)), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    for metric in METRICS:
        assert metric.help.endswith(".")
        assert not re.search(r"_(ms|us|kb|percent|milliseconds)\b", metric.name)
        assert set(metric.labels) <= {
            "service", "backend", "check", "interface", "queue", "reason", "event", "state", "version", "python",
            "mode", "fallback", "policy", "number",
        }  # fmt: skip


def test_nothing_that_a_configuration_says_breaks_the_text():
    evil = 'tcp://[fd00::1]:80"} 1\nx{y="\\'
    service = made.service(evil, policy='a"b\\c\nd')
    found = samples(render(made.facts([service], [made.backend(evil, '"\n\\')])))
    assert named(found, "crablb_backend_serving", service=evil, backend='"\n\\') == 1
    assert (
        named(found, "crablb_service_info", service=evil, mode="negotiated", fallback="auto", policy='a"b\\c\nd') == 1
    )


def test_checks_of_one_type_are_told_apart():
    seconds = [("http", 1.0), ("tcp", 2.0), ("http", 3.0)]
    twice = made.backend(VIP, "10.0.0.11", checks=[made.check(kind, seconds=took) for kind, took in seconds])
    found = samples(render(made.facts([made.service(VIP)], [twice])))
    where = {"service": VIP, "backend": "10.0.0.11"}
    for kind, number, took in (("http", "1", 1.0), ("tcp", "1", 2.0), ("http", "2", 3.0)):
        assert named(found, "crablb_check_duration_seconds", **where, check=kind, number=number) == took


def test_ten_thousand_backends():
    """A line in 15 us, as prometheus_client writes them, would be three seconds; the limit is for a busy machine."""
    facts = made.many(10_000)
    began = time.process_time()
    text = render(facts)
    assert time.process_time() - began < 2
    assert text.count(b"\ncrablb_backend_serving{") == 10_000
    assert len(text) < 32 << 20


def test_the_documents_name_them_all():
    page = (ROOT / "docs/metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(crablb_\w+)`(?: \(.*?\))? \| \w+ \| .*? \| (.*) \|$", page, re.M))
    agents = {f"crablb_agent_{name}": text for name, _, text, _ in AGENT_METRICS}
    agents["crablb_agent_installed"] = "1: the agent is in the kernel."
    assert rows == {metric.full_name: metric.help for metric in METRICS} | agents


# ---- the look ----


class Source:
    """An operator that counts how often it is asked, and may fail."""

    def __init__(self) -> None:
        self.asked, self.broken = 0, False
        self.facts = two()
        self.config, self.published = self, 5
        self.flows = 262144

    async def look(self):
        self.asked += 1
        await asyncio.sleep(0)
        if self.broken:
            raise RuntimeError("broken")
        return self.facts.status, self.facts.services, self.facts.backends

    def events(self, since=0):
        return [
            types.Event(number=n, at=made.AT, kind="changed", service="", backend="", interface="", reason="")
            for n in range(1000)
        ]

    def rounds(self):
        return dict(self.facts.rounds)

    def statistics(self):
        return {"workers": list(self.facts.workers.values())}


def test_many_who_ask_are_told_by_one_look():
    async def ask():
        source = Source()
        gatherer = Gatherer(source, source, clock=lambda: 1000.0)
        first = asyncio.ensure_future(gatherer.facts())
        await asyncio.sleep(0)
        first.cancel()  # who asked first has gone
        told = await asyncio.gather(*(gatherer.facts() for _ in range(50)))
        assert len({id(facts) for facts in told}) == 1
        assert source.asked == 1
        facts = told[0]
        assert (facts.reload.well, facts.reload.since) == (True, 1000.0)
        assert facts.workers == source.facts.workers
        assert len(facts.events) == 50

    asyncio.run(ask())


def test_a_look_that_fails_is_looked_at_anew():
    async def ask():
        source = Source()
        gatherer = Gatherer(source, source)
        source.broken = True
        with pytest.raises(RuntimeError):
            await gatherer.facts()
        source.broken = False
        assert await gatherer.facts()

    asyncio.run(ask())


def test_reloads():
    now = 1000.0

    async def ask():
        nonlocal now
        source = Source()
        gatherer = Gatherer(source, source, clock=lambda: now)
        now = 2000.0
        gatherer.hear(Event("not-reloaded", reason="a fault"))
        failed = samples(render(await gatherer.facts()))
        assert named(failed, "crablb_config_last_reload_successful") == 0
        assert named(failed, "crablb_config_last_reload_success_timestamp_seconds") == 1000
        gatherer.hear(Event("reloaded"))
        gatherer.hear(Event("changed"))
        gatherer._look = None
        well = samples(render(await gatherer.facts()))
        assert named(well, "crablb_config_last_reload_successful") == 1
        assert named(well, "crablb_config_last_reload_success_timestamp_seconds") == 2000

    asyncio.run(ask())


# ---- by HTTP ----


def test_by_http():
    facts = two()
    with showing(lambda: facts) as shown:
        status, headers, body = shown.get("/metrics")
        assert status == 200
        assert headers["content-type"] == exposition.CONTENT_TYPE
        assert samples(body).keys() == samples(render(facts)).keys()
        assert shown.get("/metrics", accept_encoding="gzip")[1]["content-encoding"] == "gzip"
        assert shown.get("/nothing")[0] == 404
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            for path in ("/", "/metrics", "/status.json"):
                assert shown.get(path, method)[0] == 405
        assert shown.get("/v1/status")[0] == 404  # nothing of the API is here
        assert shown.get("/metrics", "HEAD")[2] == b""


def test_a_fault_is_told_and_the_next_look_is_not_hurt():
    broken = True

    def look():
        if broken:
            raise RuntimeError("broken")
        return two()

    with showing(look) as shown:
        assert shown.get("/metrics")[0] == 500
        broken = False
        assert shown.get("/metrics")[0] == 200


def test_different_questions_are_bounded():
    facts = two()
    with showing(lambda: facts) as shown:
        answers = [shown.get(f"/status.json?q={n}")[0] for n in range(40)]
        assert answers[:16] == [200] * 16
        assert set(answers[16:]) == {503}
        facts = two()
        assert shown.get("/status.json?q=50")[0] == 200


def test_nobody_who_comes_early_is_refused(monkeypatch):
    """As soon as it has started, which is before a successor says that it serves."""

    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        made = Metrics(
            cast(Gatherer, SimpleNamespace()), Config((), (), metrics_listen=(ip_address("127.0.0.1"), port))
        )
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        made.start()
        socket.create_connection(("127.0.0.1", port)).close()
        await made.close()
        # What another one listens at is told, once, and served when it is free.
        made = Metrics(
            cast(Gatherer, SimpleNamespace()), Config((), (), metrics_listen=(ip_address("127.0.0.1"), port))
        )
        told: list[str] = []
        said = {level: lambda event, **_: told.append(event) for level in ("error", "info")}
        monkeypatch.setattr(metrics, "log", SimpleNamespace(**said))
        monkeypatch.setattr(lasting, "FIRST", 0.01)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", port))
            other.listen()
            made.start()
            await asyncio.sleep(0.1)
            assert told == ["metrics are not served"]
        while len(told) < 2:
            await asyncio.sleep(0.01)
        assert told == ["metrics are not served", "metrics are served"]
        await made.close()

    asyncio.run(test())
