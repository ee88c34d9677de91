"""deploy/: each alert fires for its cause alone, none while all is well; the dashboard shows metrics that there are."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from crablb.agent.metrics import METRICS as AGENT_METRICS
from crablb.agent.metrics import render as render_agent
from crablb.control.metrics.exposition import METRICS, render
from tests.helpers import facts as made
from tests.helpers.alerts import LENGTH, RULES, firing, healthy_series, rules
from tests.helpers.processes import ROOT

VIP = "tcp://10.0.0.100:80"
DASHBOARD = ROOT / "deploy/grafana-dashboard.json"
STILL = f"1x{LENGTH}"
RISES = f"0+600x{LENGTH}"  # 10 a second
ONCE = f"0x10 1x{LENGTH}"

#: Alert -> which series are otherwise, and how; and what else fires then.
CAUSES: dict[str, tuple[dict[str, str], set[str]]] = {
    "CrablbDown": ({r'up\{job="crablb"': f"0x{LENGTH}"}, set()),
    "CrablbNoBackend": ({"crablb_service_backends_serving": f"0x{LENGTH}"}, set()),
    "CrablbQuorumLost": ({"crablb_service_announced": f"0x{LENGTH}"}, set()),
    "CrablbInterfaceGone": ({"crablb_interface_up": f"0x{LENGTH}"}, set()),
    "CrablbPanic": ({"crablb_service_panic": STILL}, set()),
    "CrablbBackendUnhealthy": ({r"crablb_backend_healthy.*10\.0\.0\.11": f"0x{LENGTH}"}, set()),
    "CrablbBackendFlapping": ({r"crablb_backend_healthy.*10\.0\.0\.11": " ".join(["1 0"] * (LENGTH // 2))}, set()),
    "CrablbBackupsServe": ({"crablb_service_backups_serving": STILL}, set()),
    "CrablbDegraded": ({"crablb_degraded": STILL}, set()),
    "CrablbFlowsNearlyFull": ({r"crablb_flows\{": f"250000x{LENGTH}"}, set()),
    "CrablbFlowCacheFull": ({'crablb_worker_events_total.*"flows_full"': ONCE}, set()),
    "CrablbPacketsDropped": ({'crablb_worker_packets_total.*"drop_no_path"': RISES}, set()),
    "CrablbQueueOverrun": ({'crablb_worker_socket_events_total.*"rx_full"': ONCE}, set()),
    "CrablbWorkerBusy": (
        {
            "crablb_worker_round_packets_sum": f"0+20000x{LENGTH}",
            "crablb_worker_round_packets_count": f"0+100x{LENGTH}",
        },
        set(),
    ),
    "CrablbNoSocket": ({'crablb_xdp_packets_total.*"drop_no_socket"': ONCE}, set()),
    "CrablbDescriptorsShort": ({"process_open_fds": f"1000x{LENGTH}", "process_max_fds": f"1024x{LENGTH}"}, set()),
    "CrablbReloadFailed": ({"crablb_config_last_reload_successful": f"0x{LENGTH}"}, set()),
    "CrablbAgentDown": ({r'up\{job="crablb-agent"': f"0x{LENGTH}"}, set()),
    "CrablbAgentFaults": ({r"crablb_agent_faults": f"2x{LENGTH}"}, set()),
    "CrablbAgentNotListening": ({"crablb_agent_listening": f"0x{LENGTH}"}, set()),
    "CrablbOffersFail": (
        {"crablb_agent_offers_failed_total": f"0+80x{LENGTH}", "crablb_agent_offers_total": f"0+100x{LENGTH}"},
        set(),
    ),
} | {
    alert: ({f'crablb_daemon_events_total.*"{event}"': ONCE}, set())
    for alert, event in {
        "CrablbRedirectsStopped": "redirects_stopped",
        "CrablbServerSilent": "reports_silent",
        "CrablbVipInUse": "vips_in_use",
        "CrablbReportsForged": "reports_forged",
        "CrablbStateUnsaved": "state_unsaved",
        "CrablbTaskFailed": "policy_failed",
    }.items()
}

SERVER = {
    "counters": {"echoed": 10},
    "faults": [],
    "listening": {VIP: True},
    "connections": {VIP: 3},
    "redirected": {VIP: {"begun": 10, "completed": 10}},
}
CLIENT = {
    "counters": {"offered": 10},
    "faults": [],
    "offering": {VIP: True},
    "flows": 4,
    "room": 524288,
    "redirects": [
        {"vip": VIP, "backend": None, "offered": 10, "taken": 9, "completed": 9, "failed": 0},
        {"vip": VIP, "backend": "10.0.0.11", "offered": None, "taken": None, "completed": 9, "failed": 0},
    ],
}


def well():
    """All series of a load balancer and two agents where nothing is wrong."""
    backends = [made.backend(VIP, f"10.0.0.1{n}") for n in (1, 2, 3)]
    series = healthy_series(render(made.facts([made.service(VIP)], backends)))
    for role, status in (("server", SERVER), ("client", CLIENT)):
        series |= healthy_series(render_agent(role, status), "crablb-agent")
    return series


def test_none_while_all_is_well():
    assert firing(well()) == []


def test_none_by_traffic_alone():
    """What rises in an ordinary life: packets that are redirected, answered, passed; scans of closed ports; reloads."""
    usual = r'"(redirected|fallback_\w+|drop_(closed|rate|flags)|closed|echo|learned|flow|pass_\w+|reloads|changes)"'
    series = {name: RISES if re.search(usual, name) else values for name, values in well().items()}
    assert firing(series) == []


@pytest.mark.parametrize("alert", sorted(CAUSES))
def test_it_fires(alert):
    causes, more = CAUSES[alert]
    series = well()
    for pattern, values in causes.items():
        found = [name for name in series if re.match(pattern, name)]
        assert found, pattern
        series |= dict.fromkeys(found, values)
    assert set(firing(series)) == {alert} | more


def test_it_fires_after_a_day():
    changed = 'crablb_runtime_changes{job="crablb", instance="lb1"}'
    up = 'up{job="crablb", instance="lb1"}'
    assert firing({changed: "1x1500", up: "1x1500"}, 1500) == ["CrablbChangesUnsaved"]
    assert firing({changed: "1x1000 0x500", up: "1x1500"}, 1500) == []


def test_no_alert_that_is_not_tried():
    assert CAUSES.keys() | {"CrablbChangesUnsaved"} == rules().keys()


def test_down_also_where_prometheus_knows_no_load_balancer():
    assert firing({name: v for name, v in well().items() if 'job="crablb",' not in name}) == ["CrablbDown"]


def test_a_backend_that_is_drained_is_no_alert():
    series = well()
    series = {name.replace('state="up"', 'state="maint"'): values for name, values in series.items()}
    healthy = [name for name in series if name.startswith("crablb_backend_healthy")]
    assert firing(series | dict.fromkeys(healthy, f"0x{LENGTH}")) == []


# ---- names ----

KNOWN = {metric.full_name for metric in METRICS} | {f"crablb_agent_{row[0]}" for row in AGENT_METRICS}
KNOWN |= {"crablb_agent_installed"}


def asked(expression: str) -> set[str]:
    """The metrics of an expression, histograms by their own names."""
    bare = re.sub(r'"[^"]*"', "", expression)
    names = set(re.findall(r"\bcrablb_\w+", bare))
    return {re.sub(r"_(bucket|sum|count)$", "", name) if name not in KNOWN else name for name in names}


def test_alerts_are_of_metrics_that_there_are():
    for alert, rule in rules().items():
        assert asked(rule["expr"]) <= KNOWN, alert
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "remedy"}
    assert asked("nothing + crablb_nothing_total") - KNOWN == {"crablb_nothing_total"}


def panels(board):
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", ())


def test_the_dashboard_is_of_metrics_that_there_are():
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"] == "crablb"
    shown = set()
    names = set()
    for panel in panels(board):
        assert panel["title"]
        for target in panel.get("targets", ()):
            found = asked(target["expr"])
            assert found <= KNOWN, target["expr"]
            shown |= found
            names |= set(re.findall(r"\$(\w+)", target["expr"]))
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert names - {"__rate_interval"} <= variables
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            assert asked(str(variable["query"])) <= KNOWN
    assert len(shown) > 40
    ids = [panel["id"] for panel in panels(board)]
    assert len(ids) == len(set(ids))


def test_rules_are_sound():
    done = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
