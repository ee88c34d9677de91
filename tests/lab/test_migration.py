"""docs/migration.md: each pair of configurations, theirs and then ours, asked by the same client."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.lab.demo import crablb, start_agent, start_serve
from tests.helpers.namespaces import inside, unique
from tests.helpers.processes import ROOT, until
from tests.helpers.world import command, status

#: One lab serves all of it.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("migration")]

PAGE = (ROOT / "docs/migration.md").read_text()
VIP = f"tcp://{VIP4}:80"

NGINX = """
user root; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off; keepalive_timeout 0;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 80;
    location / {{ return 200 "{name} $remote_addr\\n"; }}
    location /healthz {{ if (-f {folder}/sick) {{ return 503; }} return 200; }}
  }}
  server {{ listen 81 proxy_protocol; location / {{ return 200 "{name} $proxy_protocol_addr\\n"; }} }}
}}
"""


def section(title: str) -> list[str]:
    """The blocks under a heading, up to the next one."""
    [part] = [part for part in re.split(r"^#+ ", PAGE, flags=re.M) if part.startswith(f"{title}\n")]
    return re.findall(r"^```(?:toml|text)\n(.*?)^```$", part, re.M | re.S)


class Site:
    """Four web servers, and a client without an agent, which may get one."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        for server in lab.servers:
            here = self.of(server)
            here.mkdir()
            (here / "nginx.conf").write_text(NGINX.format(folder=here, name=server.name))
            server.run("nginx", "-c", str(here / "nginx.conf"))
            server.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
            start_agent(server, "server", "--vip", f"tcp://{VIP4}:443", "--dsr")

    def of(self, server: Node) -> Path:
        return self.folder / server.name

    def asked(self, times: int = 40, scheme: str = "http") -> Counter[str]:
        """So many connections of the client: who answered, and whom he saw."""
        url = f"{scheme}://{VIP4}/?[1-{times}]"
        told = self.lab.client.run("curl", "-sk", "--max-time", "60", url, check=False).stdout
        return Counter(told.split("\n")[:-1])

    def answering(self, times: int = 40) -> set[str]:
        return {line.split()[0] for line in self.asked(times)}

    def shares(self) -> Counter[str]:
        """How many of fifty connections each answered."""
        return Counter(line.split()[0] for line in self.asked(50).elements())

    @contextmanager
    def sick(self, *servers: int) -> Iterator[None]:
        files = [self.folder / f"server{n}/sick" for n in servers]
        try:
            for file in files:
                file.touch()
            yield
        finally:
            for file in files:
                file.unlink()

    @contextmanager
    def vip_here(self) -> Iterator[None]:
        """The VIP is the load balancer's own address, as theirs wants it."""
        self.lab.lb.ip(f"addr add {VIP4}/32 dev lo")
        try:
            yield
        finally:
            self.lab.lb.ip(f"addr del {VIP4}/32 dev lo")

    @contextmanager
    def haproxy(self, text: str, node: Node | None = None) -> Iterator[None]:
        node = node or self.lab.lb
        config = self.folder / f"{node.name}.cfg"
        config.write_text(f"global\n    stats socket {self.folder}/{node.name}.sock mode 600 level admin\n\n{text}")
        with running(node, "haproxy", "-db", "-f", str(config), cwd=self.folder):
            until((self.folder / f"{node.name}.sock").exists)
            yield

    def haproxy_told(self, line: str) -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"{self.folder}/lb.sock")
            sock.sendall(f"{line}\n".encode())
            return sock.recv(4096).decode().strip()

    @contextmanager
    def crablb(self, text: str) -> Iterator[None]:
        config = self.folder / "lb.toml"
        config.write_text(text)
        child = start_serve(self.lab, self.folder, config=config)
        try:
            yield
        finally:
            child.terminate()
            child.wait()
            self.lab.lb.forget()

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The client has an agent."""
        child = start_agent(
            self.lab.client, "client", "--backends", "10.0.0.0/24", "--backends", "fd00::/64", "--no-verify"
        )
        before = status(self.lab)["total"]["redirected"]
        try:
            yield
            assert status(self.lab)["total"]["redirected"] > before
        finally:
            child.terminate()
            child.wait()


@contextmanager
def running(node: Node, *args: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    with open(cwd / f"{args[0]}-{node.name}.log", "a") as log:
        child = node.popen(*args, stdout=log, stderr=log, cwd=cwd)
    try:
        yield child
    finally:
        child.terminate()
        child.wait()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Lab.create(unique(), servers=4, offload=False) as lab:
        yield Site(lab, tmp_path_factory.mktemp("migration"))


ALL_THREE = {"server1", "server2", "server3"}
THREE_TO_ONE = {"server1": 30, "server2": 10, "server3": 10}


def states(site: Site) -> Iterator[set[str]]:
    """Who answers: when all are well; with one sick; with all sick but the backup."""
    yield site.answering()
    with site.sick(1):
        until(lambda: site.answering() == {"server2", "server3"})
        yield site.answering()
    with site.sick(1, 2, 3):
        until(lambda: site.answering() == {"server4"})
        yield site.answering()


def test_weights_checks_and_a_backup(site):
    theirs, ours = section("Weights, HTTP checks, a backup server")
    with site.vip_here(), site.haproxy(theirs):
        until(lambda: len(site.asked(1)) == 1)
        assert site.shares() == THREE_TO_ONE
        before = list(states(site))

        # On the same machine ours takes the VIP away from it, and doctor says who is there.
        with inside(site.lab.client.netns):
            held = socket.create_connection((str(VIP4), 80), timeout=60)
        with held, site.crablb(ours):
            found = site.lab.lb.run(*crablb("doctor", "--json"), check=False).stdout
            assert "vip-listener" in {finding["id"] for finding in json.loads(found)["findings"]}
            held.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with pytest.raises(ConnectionError):
                assert not held.recv(100), "it is HAProxy's no more"

    with site.crablb(ours):
        with site.prepared():
            assert site.shares() == THREE_TO_ONE
        assert list(states(site)) == before == [ALL_THREE, {"server2", "server3"}, {"server4"}]


def test_at_run_time(site):
    """Each row of the table that changes something."""
    theirs, ours = section("The same server for a client")
    theirs = theirs.replace("balance source\n    hash-type consistent", "balance roundrobin")
    ours = ours.replace('"source-hash"', '"round-robin"')
    rows = re.findall(r"^\| `(set server [^`]+)` \| `crablb ([^`]+)` \|$", PAGE, re.M)
    assert len(rows) == 4
    order = sorted(rows, key=lambda row: "ready" in row[0])  # the last: it puts back what was before it
    before = []
    with site.vip_here(), site.haproxy(theirs):
        until(lambda: site.answering() == ALL_THREE)
        for line, _ in order:
            assert site.haproxy_told(line) == "", line
            before.append(site.answering())
            if "weight" in line:
                site.haproxy_told("set server web/s2 weight 1")
            elif "ready" not in line:
                site.haproxy_told("set server web/s2 state ready")
    with site.crablb(ours):
        for (line, told), expected in zip(order, before, strict=True):
            command(site.lab.lb, *told.split())
            assert site.answering() == expected, told
            if "weight" in line:
                command(site.lab.lb, "weight", "10.0.0.12", "1")
            elif "ready" not in line:
                command(site.lab.lb, "ready", "10.0.0.12")
        command(site.lab.lb, "reload", "--discard")
    assert before == [ALL_THREE - {"server2"}] * 3 + [ALL_THREE]


def test_the_same_server(site):
    theirs, ours = section("The same server for a client")
    with site.vip_here(), site.haproxy(theirs):
        until(lambda: len(site.asked(1)) == 1)
        assert len(site.answering()) == 1
    with site.crablb(ours):
        before = site.answering()
        assert len(before) == 1
        with site.prepared():
            assert site.answering() == before


def test_the_clients_address(site):
    theirs, ours = section("The client's address")
    with site.vip_here(), site.haproxy(theirs):
        until(lambda: len(site.asked(1)) == 1)
        assert site.asked(5) == {"server1 10.0.0.1": 5}
    with site.vip_here(), site.haproxy(theirs.replace(":81 send-proxy", ":80")):
        until(lambda: len(site.asked(1)) == 1)
        assert site.asked(5) == {"server1 10.0.0.2": 5}
    with site.crablb(ours):
        assert site.asked(5) == {"server1 10.0.0.1": 5}
        with site.prepared():
            assert site.asked(5) == {"server1 10.0.0.1": 5}


def test_tls(site):
    """HAProxy that ended TLS for all stands behind the VIP, on each server."""
    theirs, ours = section("TLS")
    subject = ["-subj", "/CN=web", "-days", "1"]
    pem = str(site.folder / "web.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-keyout", pem, "-out", f"{pem}.crt", *subject],
        check=True, capture_output=True,
    )  # fmt: skip
    Path(pem).write_text(Path(pem).read_text() + Path(f"{pem}.crt").read_text())
    with ExitStack() as stack:
        for server in site.lab.servers[:2]:
            stack.enter_context(site.haproxy(theirs, server))
        stack.enter_context(site.crablb(ours))
        until(lambda: status(site.lab)["state"] == "serving")
        assert {line.split()[0] for line in site.asked(40, "https")} == {"server1", "server2"}


def has_ipvs() -> bool:
    """This kernel has IPVS, built in or as a module."""
    return subprocess.run(["modprobe", "ip_vs"], capture_output=True, check=False).returncode == 0 or (
        Path("/proc/net/ip_vs").exists()
    )


def test_ipvs(site):
    theirs, ours = section("IPVS")[:2]
    if has_ipvs():
        assert shutil.which("ipvsadm"), "install ipvsadm (make test does)"
        with site.vip_here():
            site.lab.lb.run("ipvsadm", "--restore", input=theirs, capture_output=True)
            assert site.lab.lb.run("ipvsadm", "--save", "--numeric").stdout.split() == theirs.split()
            before = site.shares()
            site.lab.lb.run("ipvsadm", "--clear")
        assert before == THREE_TO_ONE
    with site.crablb(ours):
        assert site.answering() == ALL_THREE
        with site.prepared():
            assert site.shares() == THREE_TO_ONE


@contextmanager
def keepalived(site: Site, text: str, name: str) -> Iterator[None]:
    """On the load balancer; on return it has the VIP."""
    config = site.folder / f"{name}.conf"
    config.write_text(text)
    checked = site.lab.lb.run("keepalived", "--config-test", f"--use-file={config}", check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    pids = [f"--{of}pid={site.folder}/{name}{of}.pid" for of in ("", "vrrp_", "checkers_")]
    part = [] if "virtual_server" in text and has_ipvs() else ["--vrrp"]
    with running(
        site.lab.lb, "keepalived", "--dont-fork", "--log-console", *part, f"--use-file={config}", *pids, cwd=site.folder
    ):
        until(lambda: f"inet {VIP4}/32" in site.lab.lb.run("ip", "-4", "addr", "show", "dev", "eth0").stdout)
        yield


def test_keepalived(site):
    theirs, ours, vrrp = section("A virtual server, and VRRP")
    client = site.lab.client
    client.ip(f"route del {VIP4}/32")
    try:
        before = {"server1", "server2"}
        with keepalived(site, theirs, "theirs"):
            if has_ipvs():
                until(lambda: site.answering() == before)
                with site.sick(1):
                    until(lambda: site.answering() == {"server2"})
        script = "/usr/bin/systemctl is-active --quiet crablb"
        assert script in vrrp
        serving = site.folder / "serving"
        serving.touch()
        with keepalived(site, vrrp.replace(script, f"/usr/bin/test -e {serving}"), "ours"):
            with site.crablb(ours):
                assert site.answering() == before
                with site.sick(1):
                    until(lambda: site.answering() == {"server2"})
            serving.unlink()
            until(lambda: f"inet {VIP4}/32" not in site.lab.lb.run("ip", "-4", "addr", "show", "dev", "eth0").stdout)
        with site.crablb(ours.replace('"none"', '"arp"')):
            until(lambda: site.answering() == before)
    finally:
        client.ip(f"route add {VIP4}/32 via {site.lab.lb.ip4}")
