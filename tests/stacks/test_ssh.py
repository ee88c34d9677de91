"""OpenSSH: ssh and scp."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from crablb.lab import VIP4, VIP6
from crablb.lab.demo import make_big
from tests.stacks.conftest import Site

PORT = 2222
# Where a fresh installation has it only once its service was started.
EMPTY = Path("/run/sshd")


def start_sshd(site: Site) -> list[str]:
    """On all servers, which have one host key.  Options of clients that know it, and are known."""
    host, user = site.folder / "host", site.folder / "user"
    for key in (host, user):
        site.use("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    names = f"[{VIP4}]:{PORT},[{VIP6}]:{PORT}"
    (site.folder / "known").write_text(f"{names} {host.with_suffix('.pub').read_text()}")
    EMPTY.mkdir(mode=0o755, exist_ok=True)
    settings = {
        "Port": PORT,
        "HostKey": host,
        "AuthorizedKeysFile": user.with_suffix(".pub"),
        "PermitRootLogin": "prohibit-password",
        "StrictModes": "no",  # the keys lie in a folder that everybody may write into
        "UsePAM": "no",
        "PidFile": "none",
        "Subsystem": "sftp internal-sftp",
    }
    config = site.folder / "sshd_config"
    config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    for server in site.lab.servers:
        site.start(server, PORT, "/usr/sbin/sshd", "-D", "-e", "-f", config)
    known = f"UserKnownHostsFile={site.folder / 'known'}"
    return ["-F", "none", "-i", str(user), "-o", known, "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes"]


@pytest.mark.parametrize("topology", ["bridge", "routed"])
def test_ssh_and_scp(make_site, topology):
    site = make_site(PORT, topology=topology)
    options = start_sshd(site)
    big, there, back = site.folder / "big", site.folder / "there", site.folder / "back"
    make_big(big, 16 << 20)
    for family, vip in ((4, str(VIP4)), (6, str(VIP6))):
        with site.counted(1):
            said = site.use("ssh", *options, "-p", str(PORT), f"root@{vip}", "echo $SSH_CONNECTION")
        assert said.split()[2] in {site.accepted_on(server, family) for server in site.lab.servers}
        with site.counted(1):
            # Both ways at once.
            ssh = shlex.join(["ssh", *options, "-p", str(PORT), f"root@{vip}", "cat"])
            site.use("sh", "-c", f"{ssh} <{big} >{back}")
        assert back.read_bytes() == big.read_bytes()
        with site.counted(2):
            site.use("scp", *options, "-P", str(PORT), big, f"root@[{vip}]:{there}")
            site.use("scp", *options, "-P", str(PORT), f"root@[{vip}]:{there}", back)
        assert there.read_bytes() == back.read_bytes() == big.read_bytes()
        there.unlink()
        back.unlink()
