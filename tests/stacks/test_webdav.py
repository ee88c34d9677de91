"""litmus, a WebDAV test suite, and Apache."""

from __future__ import annotations

import re

from crablb.lab import VIP4, VIP6
from tests.stacks.conftest import UNPRIVILEGED

PORT = 8080
CONFIG = """
ServerName crablb
ServerRoot {dir}
Listen {port}
PidFile {dir}/{name}.pid
ErrorLog /dev/stderr
{modules}
DocumentRoot {dir}/files
<Directory {dir}/files>
  Require all granted
  Dav on
</Directory>
DavLockDB {dir}/locks
"""
MODULES = ("mpm_event", "authz_core", "dav", "dav_fs")


def test_litmus(make_site):
    """Two servers, which have files and locks in common."""
    site = make_site(PORT)
    (site.folder / "files").mkdir()
    modules = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in MODULES)
    for server in site.lab.servers:
        config = site.folder / f"{server.name}.conf"
        config.write_text(CONFIG.format(dir=site.folder, port=PORT, name=server.name, modules=modules))
        site.start(server, PORT, *UNPRIVILEGED, "apache2", "-X", "-f", config)
    for vip in (str(VIP4), f"[{VIP6}]"):
        with site.counted():
            said = site.use("litmus", "-k", f"http://{vip}:{PORT}/", cwd=site.folder)
        summaries = re.findall(r"summary for `(\w+)': of (\d+) tests run: (\d+) passed, (\d+) failed", said)
        assert [suite for suite, *_ in summaries] == ["basic", "copymove", "props", "locks", "http"], said
        assert all(run == passed and failed == "0" for _, run, passed, failed in summaries), said
