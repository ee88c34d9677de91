"""PostgreSQL: pgbench.  Its own regression tests are in tests/foreign."""

from __future__ import annotations

from crablb.lab import VIP4, VIP6, Node
from tests.helpers.processes import until
from tests.stacks.conftest import FETCHED, LIMIT, UNPRIVILEGED, Site

PORT = 5432
FOLDER = FETCHED / "postgresql"


def program(name: str) -> str:
    return str(next(FOLDER.glob(f"program/usr/lib/postgresql/*/{name}")))


def start_postgres(site: Site, server: Node, *run: str) -> None:
    """One whose data are lost if the machine dies.  ``run``: the command that runs it."""
    data = site.folder / server.name
    done = server.run(
        *UNPRIVILEGED, program("bin/initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8",
        "--no-locale", "--no-sync", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with open(data / "pg_hba.conf", "a") as access:
        access.write("host all all all trust\n")
    settings = {"listen_addresses": "*", "port": PORT, "unix_socket_directories": data, "fsync": "off"}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    site.start(server, PORT, *UNPRIVILEGED, *run, program("bin/postgres"), "-D", data, *options)
    # It listens before it lets anybody in.
    until(lambda: server.run(program("bin/pg_isready"), *at(server.ip4), check=False).returncode == 0, LIMIT)


def at(host: object) -> list[str]:
    return ["-h", str(host), "-p", str(PORT), "-U", "postgres"]


def test_pgbench(make_site):
    """Transactions of 8 clients at a time, whose sums are right."""
    site = make_site(PORT, servers=1)
    start_postgres(site, site.lab.servers[0])
    psql = [program("bin/psql"), "-AtX", "postgres"]
    for vip in (VIP4, VIP6):
        with site.counted(1):
            site.use(program("bin/pgbench"), "-i", "-q", *at(vip), "postgres")
        with site.counted(8 + 1):
            said = site.use(program("bin/pgbench"), "-n", "-c", "8", "-j", "2", "-t", "250", *at(vip), "postgres")
        assert "actually processed: 2000/2000" in said
        with site.counted(1):
            sums = "select count(*), sum(delta) = (select sum(abalance) from pgbench_accounts) from pgbench_history"
            assert site.use(*psql, *at(vip), "-c", sums).strip() == "2000|t"


def test_pgbench_connects(make_site):
    """A connection for each transaction, of which two servers that have the same data have some."""
    site = make_site(PORT)
    for server in site.lab.servers:
        start_postgres(site, server)
        server.run(program("bin/pgbench"), "-i", "-q", *at(server.ip4), "postgres")
    for vip in (VIP4, VIP6):
        with site.counted(200 + 1):
            said = site.use(program("bin/pgbench"), "-n", "-S", "-C", "-c", "4", "-t", "50", *at(vip), "postgres")
        assert "actually processed: 200/200" in said
    for server in site.lab.servers:
        count = "select sessions > 50 from pg_stat_database where datname = 'postgres'"
        said = server.run(program("bin/psql"), "-AtX", "postgres", *at(server.ip4), "-c", count).stdout
        assert said.strip() == "t"
