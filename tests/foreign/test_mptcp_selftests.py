"""The kernel's MPTCP selftests, in the networks that they make themselves, with agents in all of their namespaces.

Path managers, what is told of sockets, and the selftests' connections: none may do otherwise with the agents there.
Connections are to VIPs of the agents: where there is room they offer, and nobody takes it up.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from crablb.agent.base import cgroup_root
from tests.foreign.conftest import LIMIT, Result
from tests.foreign.test_mptcp_connect import LINUX, compiled
from tests.helpers.namespaces import Island, unique
from tests.helpers.processes import until

#: Those that need nothing that is not everywhere: the others are held up by netem, and by iptables.
SUITES = ("pm_netlink", "userspace_pm", "diag")
TRIES = 3
PROGRAMS = ("mptcp_connect", "mptcp_diag", "pm_nl_ctl")
VIPS = ("10.0.1.1:50002", "10.0.2.1:50003", "[dead:beef:1::1]:50004")
CRABLB = str(Path(sys.executable).with_name("crablb"))

# In front of ip(8): when an interface of a namespace comes up, agents come there, if they are not there and can be. A
# client's has a route to the VIPs, and none to itself.  Before a namespace goes, its agents' counters are written down.
IP = r"""#!/bin/bash
[ "$1 $2" = "netns exec" ] && exec %(ip)s "$@"  # which is to be the process that is killed
if [[ "$1 $2" == "netns del"* && -e %(folder)s/$3.client ]]; then
  nsenter --net=/run/netns/$3 %(crablb)s agent status --json >>%(folder)s/status
fi
%(ip)s "$@" || exit
[[ "$1" =~ ^-n && " $* " == *" link set "*" up "* ]] || exit 0
enter=(nsenter --net=/run/netns/$2)
if [ ! -e %(folder)s/$2.server ]; then
  "${enter[@]}" %(crablb)s agent server --detach --cgroup %(cgroup)s %(vips)s >>%(folder)s/log 2>&1 || exit
  touch %(folder)s/$2.server
fi
if [ ! -e %(folder)s/$2.client ] && %(ip)s -n $2 route get 10.0.1.1 2>/dev/null | grep -q 'dev [^l]' &&
   %(ip)s -n $2 route get dead:beef:1::1 2>/dev/null | grep -q 'dev [^l]'; then
  "${enter[@]}" %(crablb)s agent client --detach --cgroup %(cgroup)s %(vips)s --retransmission 0 \
    --backends 10.0.0.0/8 --backends dead:beef::/32 >>%(folder)s/log 2>&1 && touch %(folder)s/$2.client
fi
exit 0
"""


def test_selftests(tmp_path, compare):
    tree = tmp_path / "net"
    shutil.copytree(LINUX / "tools/testing/selftests/net", tree)
    for name in PROGRAMS:
        compiled(tree / f"mptcp/{name}.c", tree / "mptcp" / name)
    compare(
        "MPTCP selftests", "agents", lambda: run(tmp_path, tree, agents=False), lambda: run(tmp_path, tree, agents=True)
    )


def run(folder: Path, tree: Path, *, agents: bool) -> Result:
    """A test is well that once is: they wait half a second for what a machine that has much to do needs longer for."""
    found = Result()
    left = set(SUITES)
    for number in range(TRIES):
        outputs = once(folder / f"agents-{agents}-{number}", tree, left, agents)
        left.clear()
        for suite, said in outputs.items():
            lines = re.findall(r"^(ok|not ok) (\d+) - (.*?) # .*$", said, re.M)
            assert lines, said[-4000:]
            for verdict, at, name in lines:
                (found.passed if verdict == "ok" else found.failed).add(f"{suite} {at}: {name}")
                if verdict != "ok":
                    left.add(suite)
        if not left:
            break
    found.failed -= found.passed
    return found


def once(place: Path, tree: Path, suites: set[str], agents: bool) -> dict[str, str]:
    """What each of them says."""
    cgroup = cgroup_root() / "crablb-lab" / unique()
    cgroup.mkdir(parents=True)
    (place / "bin").mkdir(parents=True)
    vips = " ".join(f"--vip 'tcp://{vip}'" for vip in VIPS)
    if agents:
        program = place / "bin/ip"
        real = shutil.which("ip")
        program.write_text(IP % {"ip": real, "folder": place, "crablb": CRABLB, "cgroup": cgroup, "vips": vips})
        program.chmod(0o755)
    try:
        with Island(place) as island:
            begin = (
                f"echo $$ >{cgroup}/cgroup.procs; cd {tree}/mptcp"
                f"; export PATH={place}/bin:$PATH NSTAT_HISTORY={place}/$0; exec timeout $1 ./$0.sh 2>&1"
            )
            started = {suite: island.popen("bash", "-c", begin, suite, str(LIMIT)) for suite in suites}
            outputs = {suite: child.communicate()[0] for suite, child in started.items()}
    finally:
        (cgroup / "cgroup.kill").write_text("1")
        until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text())
        os.rmdir(cgroup)
    if agents:
        log = (place / "log").read_text()
        assert list(place.glob("*.server")), log
        if "userspace_pm" in suites:
            assert list(place.glob("*.client")), log
            offered = re.findall(r'"offered": (\d+)', (place / "status").read_text())
            assert any(map(int, offered)), (place / "status").read_text()
    return outputs
