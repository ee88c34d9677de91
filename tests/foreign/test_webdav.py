"""litmus, a WebDAV test suite, and Apache: two servers, which have files and locks in common."""

from __future__ import annotations

import re

import pytest

from tests.foreign.conftest import LIMIT, ForeignSite, Result, targets
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


@pytest.mark.parametrize("family", [4, 6])
def test_litmus(make_site, way, family, compare):
    site = make_site(PORT)
    (site.folder / "files").mkdir()
    modules = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in MODULES)
    for server in site.lab.servers:
        config = site.folder / f"{server.name}.conf"
        config.write_text(CONFIG.format(dir=site.folder, port=PORT, name=server.name, modules=modules))
        site.start(server, PORT, *UNPRIVILEGED, *site.by, "apache2", "-X", "-f", config)
    own, vip = targets(site.lab.servers[0])[family]

    def through() -> Result:
        with site.went():
            found = run(site, vip, *site.by)
        return found

    compare(f"litmus, IPv{family}", way, lambda: run(site, own), through)


def run(site: ForeignSite, host: str, *by: str) -> Result:
    done = site.lab.client.run(
        *by, "litmus", "-k", f"http://{f'[{host}]' if ':' in host else host}:{PORT}/",
        cwd=site.folder, check=False, timeout=LIMIT,
    )  # fmt: skip
    found, suite = Result(), ""
    for line in done.stdout.replace("\r", "\n").splitlines():
        if name := re.match(r"-> running `(\w+)'", line):
            suite = name[1]
        elif test := re.match(r" *\d+\. (\w+)\.+ (pass|FAIL)", line):
            (found.passed if test[2] == "pass" else found.failed).add(f"{suite} {test[1]}")
    assert {name.split()[0] for name in found.run} == {"basic", "copymove", "props", "locks", "http"}, done.stdout
    assert bool(found.failed) == bool(done.returncode), done.stdout
    return found
