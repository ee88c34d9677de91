"""``crablb quickstart``: from nothing to a configuration, by questions or by options, and what to run next."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from crablb import config, lint, reference
from crablb.api import client as api
from crablb.api import types
from crablb.cli import doctor, streams
from crablb.cli.arguments import add_interfaces
from crablb.control import state, supervisor
from crablb.doctor import shown
from crablb.doctor.finding import Finding, Severity
from crablb.errors import ConfigError, CrablbError, KernelError, Problems
from crablb.kernel import pins, routing, rtnetlink
from crablb.kernel.netlink import HopState, next_hops
from crablb.kernel.rtnetlink import LINK, ROUTE, Netlink
from crablb.model import Announce, Backend, Config, Service, Vip
from crablb.values import MAX_WEIGHT, member, near, parse_backend, parse_interfaces, parse_short_vip

T = TypeVar("T")

#: Where the unit of systemd looks for it (deploy/crablb.service).
PLACE = Path("/etc/crablb/lb.toml")
UNITS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
#: Sizes of a table, and ports that curl is a client for.
SMALL_TABLE, LARGE_TABLE = 65_537, 655_373
WEB = {80: "http", 8000: "http", 8080: "http", 443: "https", 8443: "https"}
IFF_UP, IFF_LOOPBACK = 1, 8
ETHERNET = 6  # bytes of an address


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "quickstart",
        help="make a configuration: asks, or takes as options, what is served by whom; looks at this machine, and says"
        " what to run next",
        epilog="Options that are given are not asked for. Exit status: 0, the file is written; 1, it is not, as you"
        " said, or nobody reads what is printed; 2, something is wrong, and nothing is written.",
    )
    add_interfaces(parser, "where clients' packets come in")
    parser.add_argument(
        "--vip",
        dest="vips",
        action="append",
        default=[],
        metavar="VIP",
        help="where clients connect to, as 10.0.0.100:80 or tcp://[fd00::100]:80; repeatable",
    )
    parser.add_argument(
        "--backend",
        dest="backends",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a server of each VIP of its address family, as 10.0.0.11, or with a weight 10.0.0.11*3; repeatable",
    )
    parser.add_argument(
        "--announce",
        choices=[each.value for each in Announce],
        help="who answers ARP and neighbour discovery for the VIPs: arp: the load balancer; none: nobody has to, or"
        " somebody else does (default: arp for VIPs on an interface's own segment)",
    )
    parser.add_argument(
        "--allow-own-address", action="store_true", help="a VIP may be the address that this machine is reached by"
    )
    parser.add_argument(
        "--output", metavar="FILE", help=f"where it is written (default: {PLACE} if this user may, else ./{PLACE.name})"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there; it is kept, as FILE.bak")
    parser.add_argument("--yes", action="store_true", help="ask nothing: what is suggested is taken")
    parser.add_argument("--json", action="store_true", help="print it as JSON, for programs; asks nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    asks = not (args.yes or args.json) and sys.stdin.isatty() and sys.stdout.isatty()
    try:
        path = _place(args.output, args.force, asks)
        replaces = path.exists()
        wanted = _asked(args) if asks else _told(args)
        text = reference.described(wanted, f"Made by crablb quickstart, for crablb serve --config {path}")
        wanted = config.parse_config(text)  # what is written is what is looked at
        if asks:
            streams.complain("looking at this machine and its network ...")
        findings = doctor.find(wanted.interfaces, wanted)[1]
        warnings = lint.odd(wanted)
        if asks:
            _show(findings, warnings, path)
            sick = any(one.severity is Severity.FAULT for one in findings)
            if not _agreed(f"write {path} all the same" if sick else f"write {path}", otherwise=not sick):
                raise _Declined
    except (_Declined, EOFError) as ended:
        print("\nnothing was written" if isinstance(ended, EOFError) else "nothing was written")
        return 1
    except KeyboardInterrupt:
        streams.complain("nothing was written")
        raise
    with _written(path, text, replaces):
        _tell(args, wanted, path, text, findings, warnings, shown_already=asks)
        sys.stdout.flush()
    return 0


def _tell(
    args: argparse.Namespace,
    wanted: Config,
    path: Path,
    text: str,
    findings: Sequence[Finding],
    warnings: Sequence[str],
    *,
    shown_already: bool,
) -> None:
    """That it is written, and what is next."""
    steps = _next(wanted, path)
    if args.json:
        told = {
            "file": str(path),
            "configuration": text,
            "sound": not any(_matters(one) for one in findings),
            "findings": [one.plain() for one in findings],
            "warnings": warnings,
            "next": [{"where": step.where, "commands": list(step.commands)} for step in steps],
        }
        print(json.dumps(told, indent=2))
        return
    if not shown_already:
        _show(findings, warnings, path)
    print(f"\n{path} is written. Next:")
    for number, step in enumerate(steps, 1):
        print(f"\n{number}. {step.where}:")
        for command in step.commands:
            print(f"    {command}")


class _Declined(Exception):
    """Whoever was asked does not want it."""


# ---- what is wanted ----


def _told(args: argparse.Namespace) -> Config:
    """What the options say.  Raises :class:`ConfigError` with every fault."""
    problems = Problems()
    links = _links()
    interfaces = args.interfaces or ([_suggested(links)] if args.yes and _suggested(links) else [])
    missing = [
        example
        for given, example in (
            (interfaces, f"--iface {_suggested(links) or 'eth0'}"),
            (args.vips, "--vip 10.0.0.100:80"),
            (args.backends, "--backend 10.0.0.11"),
        )
        if not given
    ]
    if missing:
        why = "nobody is asked (--yes, --json)" if args.yes or args.json else "there is no terminal to ask on"
        problems.add("", f"{why}; say by options what is missing, as {', '.join(missing)}")
    names = problems.attempt("--iface", _interfaces, interfaces, links) if interfaces else None
    vips = problems.attempt("--vip", _vips, args.vips, args.allow_own_address) if args.vips else ()
    backends = problems.attempt("--backend", _backends, args.backends) if args.backends else ()
    of = {vip: [b for b in backends or () if b.address.version == vip.address.version] for vip in vips or ()}
    for vip, own in of.items():
        if backends and not own:
            problems.add("--backend", f"none is IPv{vip.address.version}, as those of {vip} are; name one")
    for backend in backends or ():
        if vips and not any(backend in own for own in of.values()):
            problems.add("--backend", f"{backend.address} is IPv{backend.address.version}, and no VIP is")
    problems.finish()
    return _configuration(names or (), [(vip, tuple(own)) for vip, own in of.items()], args)


def _asked(args: argparse.Namespace) -> Config:
    """What the options say, and answers.  Raises :class:`ConfigError` for options, :class:`EOFError`."""
    with suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines by it
    links = _links()
    given = Problems()
    names = given.attempt("--iface", _interfaces, args.interfaces, links) if args.interfaces else None
    vips = given.attempt("--vip", _vips, args.vips, args.allow_own_address) if args.vips else None
    backends = given.attempt("--backend", _backends, args.backends) if args.backends else None
    given.finish()
    if names is None:
        print("Interfaces:")
        for link in links:
            print(f"  {link.name:15} {link.says}")
        names = _ask("Interface that clients' packets come in by", lambda text: _interfaces([text], links), links)
    if vips is None:
        question = "VIPs, which clients connect to (10.0.0.100:80)"
        vips = _ask(question, lambda text: _vips([text], args.allow_own_address))
    services: list[tuple[Vip, tuple[Backend, ...]]] = []
    for vip in vips:
        version = vip.address.version
        own = tuple(b for b in backends or () if b.address.version == version)
        before = next((some for other, some in services if other.address.version == version), ())
        services.append((vip, own or _ask_backends(vip, before, [*services])))
    return _configuration(names, services, args)


def _ask_backends(
    vip: Vip, before: Sequence[Backend], others: Sequence[tuple[Vip, tuple[Backend, ...]]]
) -> tuple[Backend, ...]:
    """``before``: those of a VIP that is like this one."""
    example = "10.0.0.11 10.0.0.12*3" if vip.address.version == 4 else "fd00::11 fd00::12*3"

    def parse(text: str) -> tuple[Backend, ...]:
        found = _backends([text])
        _fit([*others, (vip, found)])
        return found

    suggested = " ".join(_short(backend) for backend in before)
    return _ask(f"Backends of {vip} ({example}: with a weight)", parse, suggested=suggested)


def _configuration(
    names: tuple[str, ...], services: Sequence[tuple[Vip, tuple[Backend, ...]]], args: argparse.Namespace
) -> Config:
    _fit(services)
    most = max(len(backends) for _, backends in services)
    announce = member(Announce, args.announce) if args.announce else _announce(names, [vip for vip, _ in services])
    return Config(
        names,
        tuple(_services(services)),
        announce=announce,
        allow_own_address=args.allow_own_address,
        table_size=SMALL_TABLE if lint.SLOTS * most <= SMALL_TABLE else LARGE_TABLE,
    )


def _fit(services: Sequence[tuple[Vip, tuple[Backend, ...]]]) -> None:
    """Raises :class:`ConfigError` for what is wrong with services taken together."""
    if wrong := config.check_services([(str(one.vip), one) for one in _services(services)], LARGE_TABLE):
        raise ConfigError(wrong)


def _services(services: Iterable[tuple[Vip, tuple[Backend, ...]]]) -> list[Service]:
    return [Service(vip, backends) for vip, backends in services]


def _announce(names: Iterable[str], vips: Sequence[Vip]) -> Announce:
    """By the load balancer if they are of a segment that it is on, and nobody's here.  Raises OSError."""
    served = {index: name for index, name in _indices() if name in set(names)}
    hops = next_hops({vip.address for vip in vips}).values()
    near_by = [hop for hop in hops if hop.on_link and hop.ifindex in served and hop.state is not HopState.NOT_A_HOST]
    return Announce.ARP if near_by and not any(hop.state is HopState.NOT_A_HOST for hop in hops) else Announce.NONE


def _short(backend: Backend) -> str:
    return str(backend.address) + (f"*{backend.weight}" if backend.weight != 1 else "")


# ---- answers ----


def _words(texts: Iterable[str]) -> list[str]:
    return [word for text in texts for word in re.split(r"[\s,;]+", text) if word]


def _interfaces(texts: Iterable[str], links: Sequence[Link]) -> tuple[str, ...]:
    """Raises :class:`ConfigError`."""
    names = parse_interfaces(_words(texts))
    there = {link.name: link for link in links}
    known = f"there is {', '.join(there)}" if there else "there is none at all"
    problems = Problems()
    for name in names:
        if name not in there:
            problems.add("", f"there is no Ethernet interface {name!r}; {near(name, tuple(there), known)}")
    problems.finish()
    return names


def _vips(texts: Iterable[str], allow_own_address: bool) -> tuple[Vip, ...]:
    """Raises :class:`ConfigError`."""
    words = _words(texts)
    problems = Problems()
    vips = [vip for word in words if (vip := problems.attempt("", parse_short_vip, word))]
    if not words:
        problems.add("", "name one, as 10.0.0.100:80")
    for vip in sorted({vip for vip in vips if vips.count(vip) > 1}, key=str):
        problems.add("", f"{vip} is named twice")
    trial = Config((), tuple(Service(vip, ()) for vip in vips), allow_own_address=allow_own_address)
    problems.attempt("", supervisor.check, trial)
    problems.finish()
    return tuple(vips)


def _backends(texts: Iterable[str]) -> tuple[Backend, ...]:
    """Raises :class:`ConfigError`."""
    words = _words(texts)
    problems = Problems()
    backends = [backend for word in words if (backend := problems.attempt("", parse_backend, word))]
    if not words:
        problems.add("", "name one at least, as 10.0.0.11")
    addresses = [backend.address for backend in backends]
    for address in sorted({each for each in addresses if addresses.count(each) > 1}, key=str):
        problems.add("", f"{address} is named twice; give it a weight instead: {address}*2 (up to {MAX_WEIGHT})")
    with Netlink() as netlink:
        for address in dict.fromkeys(addresses):
            if routing.is_local(netlink, address):
                problems.add("", f"{address} is this machine's own address, whose servers cannot be backends")
    problems.finish()
    return tuple(backends)


def _ask(question: str, parse: Callable[[str], T], links: Sequence[Link] = (), *, suggested: str = "") -> T:
    """Until the answer is one; what is wrong with it is told.  Raises :class:`EOFError`."""
    suggested = suggested or (_suggested(links) if links else "")
    shown_default = f" [{suggested}]" if suggested else ""
    while True:
        answer = input(f"{question}{shown_default}: ").strip() or suggested
        try:
            return parse(answer)
        except CrablbError as error:
            streams.complain(str(error))


def _agreed(question: str, *, otherwise: bool) -> bool:
    """Raises :class:`EOFError`."""
    while True:
        answer = input(f"{question}? [{'Y/n' if otherwise else 'y/N'}] ").strip().lower()
        if answer in ("y", "yes", "n", "no", ""):
            return answer.startswith("y") if answer else otherwise
        streams.complain("say y or n")


# ---- this machine ----


@dataclass(frozen=True, slots=True)
class Link:
    """An Ethernet interface of this network namespace."""

    name: str
    up: bool
    leads_out: bool  # it has the default route
    addresses: tuple[str, ...]

    @property
    def says(self) -> str:
        notes = [", ".join(self.addresses) or "no address"]
        notes += [] if self.up else [f"down (ip link set {self.name} up)"]
        notes += ["default route"] if self.leads_out else []
        return "; ".join(notes)


def _indices() -> list[tuple[int, str]]:
    with Netlink() as netlink:
        return [(i, rtnetlink.text(found.get(rtnetlink.IFLA_IFNAME))) for i, _, found in _dumped(netlink)]


def _dumped(netlink: Netlink) -> list[tuple[int, int, dict[int, bytes]]]:
    """Index, flags, attributes of each link."""
    fields = [(link.fields(LINK), link.attributes(LINK)) for link in rtnetlink.links(netlink)]
    return [(of[2], of[3], dict(found)) for of, found in fields]


def _links() -> list[Link]:
    """Those that are up first, and of them those that lead out.  Raises OSError."""
    with Netlink() as netlink:
        out = set()
        for far in rtnetlink.FAR:
            try:
                out.add(rtnetlink.number(rtnetlink.route(netlink, far).attributes(ROUTE).get(routing.RTA_OIF)))
            except OSError:  # no default route
                continue
        addresses: dict[int, list[str]] = {}
        for address, index in rtnetlink.addresses(netlink).items():
            if not ipaddress.ip_address(address).is_link_local:
                addresses.setdefault(index, []).append(address)
        found = [
            Link(
                rtnetlink.text(more.get(rtnetlink.IFLA_IFNAME)),
                bool(flags & IFF_UP),
                index in out,
                tuple(addresses.get(index, ())),
            )
            for index, flags, more in _dumped(netlink)
            if not flags & IFF_LOOPBACK and len(more.get(rtnetlink.IFLA_ADDRESS, b"")) == ETHERNET
        ]
    return sorted(found, key=lambda link: (not link.up, not link.leads_out))


def _suggested(links: Sequence[Link]) -> str:
    """The one that leads out, or the only one; empty: nobody knows."""
    up = [link for link in links if link.up]
    return next((link.name for link in up if link.leads_out), up[0].name if len(up) == 1 else "")


def _matters(finding: Finding) -> bool:
    return finding.severity in (Severity.FAULT, Severity.WARNING)


def _show(findings: Sequence[Finding], warnings: Sequence[str], path: Path) -> None:
    colour, width = shown.terminal()
    # What routers have to know is a note of the doctor, whom nobody has told that this is all new.
    told = [one for one in findings if _matters(one) or one.id == "vip-routed"]
    for line in shown.lines(told, colour=colour, width=width):
        print(line)
    for warning in warnings:
        streams.complain(f"warning: {warning}")
    asked = f"crablb doctor --config {shlex.quote(str(path))}"
    print(f"{shown.summary(findings)} (all of it, once the file is written: {asked})")


# ---- the file ----


def _place(given: str | None, force: bool, asks: bool) -> Path:
    """Where it is written.  Raises :class:`ConfigError` where it cannot be, before anybody is asked anything."""
    if given is not None and (not given or "\0" in given):
        raise ConfigError(f"--output: {given!r} names no file")
    path = Path(os.path.abspath(given)) if given else PLACE
    if not given and not _writable(path):
        path = Path.cwd() / PLACE.name
    path = path.resolve()  # what a link stands for is replaced, and not the link
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file: --output {path / PLACE.name}")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file; name another: --output FILE")
    if path != PLACE and not path.parent.exists():  # a slip, perhaps
        raise ConfigError(f"there is no folder {path.parent}; make it: mkdir -p {shlex.quote(str(path.parent))}")
    if not _writable(path):
        raise ConfigError(f"{path} cannot be written here by this user; name another: --output FILE")
    if path.exists() and not force:
        if not asks:
            raise ConfigError(f"{path} is there already; replace it: --force, or name another: --output FILE")
        if not _agreed(f"{path} is there already. Replace it (it is kept as {path.name}.bak)", otherwise=False):
            raise _Declined
    return path


def _writable(path: Path) -> bool:
    """Whether a file can be made or replaced there, with the folders that it needs."""
    folder = next(each for each in path.parents if each.exists())
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK, effective_ids=True)


@contextmanager
def _written(path: Path, text: str, replaces: bool) -> Iterator[None]:
    """Whole or not at all, its folders with it; and not if it cannot be told.  Raises :class:`KernelError`."""
    backup = path.with_name(f"{path.name}.bak")
    missing = [folder for folder in path.parents if not folder.exists()]
    made: list[Path] = []
    try:
        before = {each: (each.read_bytes(), each.stat().st_mode & 0o777) for each in (path, backup) if each.exists()}
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
            folder.chmod(0o755)  # whatever the umask
        (_replace if replaces else _make)(path, text.encode())
    except OSError as error:
        for folder in reversed(made):
            folder.rmdir()
        raise KernelError(
            f"{path} cannot be written: {error.strerror or error}; nothing is; name another: --output FILE"
        ) from None
    try:
        yield
    except BaseException:
        for each in (path, backup) if replaces else (path,):
            if each in before:
                state.write(each, *before[each])
            else:
                each.unlink()
        for folder in reversed(made):
            folder.rmdir()
        raise


def _replace(path: Path, data: bytes) -> None:
    mode = path.stat().st_mode & 0o777
    state.write(path.with_name(f"{path.name}.bak"), path.read_bytes(), mode)
    state.write(path, data, mode)


def _make(path: Path, data: bytes) -> None:
    """Never over one that somebody else has made meanwhile."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    state.write(fresh, data, 0o644)
    try:
        os.link(fresh, path)
    finally:
        fresh.unlink()


# ---- what to run next ----


@dataclass(frozen=True, slots=True)
class Step:
    where: str
    commands: tuple[str, ...]


def _next(wanted: Config, path: Path) -> list[Step]:
    vips = [service.vip for service in wanted.services]
    servers = sorted(wanted.backends, key=lambda address: (address.version, int(address)))
    agent = shlex.join(["crablb", "agent", "server", *(word for vip in vips for word in ("--vip", str(vip)))])
    return [
        _here(wanted, path),
        Step(
            f"on each server ({', '.join(map(str, servers))}), as root, where crablb is installed as well",
            (f"{agent} --dsr --detach",),
        ),
        Step("on a client", tuple(map(_check, vips))),
    ]


def _here(wanted: Config, path: Path) -> Step:
    file = shlex.quote(str(path))
    root = "" if os.geteuid() == 0 else "sudo "
    if running := _running(wanted):
        pid, by = running
        if by == path:
            return Step(f"here ({pins.told(pid)} serves by this file)", (f"{root}{_program()} reload",))
        what = f"by {by}" if by else "not by this file"
        words = (
            f"here ({pins.told(pid)} serves already, by {what}): what this one would change of that, and serve by it"
        )
        return Step(words, (f"{root}{_program()} plan {file}", f"{root}{_program()} serve --config {file} --takeover"))
    booted = os.path.isdir("/run/systemd/system") and _same_network_as_init()
    if booted and path == PLACE and any(os.path.exists(f"{folder}/crablb.service") for folder in UNITS):
        return Step("here", (f"{root}systemctl enable --now crablb",))
    return Step("here, as root" if not root else "here", (f"{root}{_program()} serve --config {file}",))


def _running(wanted: Config) -> tuple[int, Path | None] | None:
    """The process that serves one of the interfaces, and by what file, if it says."""
    try:
        held = pins.held()
    except OSError:  # another user's
        return None
    pid, name = next(
        ((pid, name) for name in wanted.interfaces if (pid := held.get(f"lb-{name}")) is not None), (None, "")
    )
    if pid is None:
        return None
    try:
        with api.Client(api.discover(name), timeout=2) as client:
            file = client.get("/v1/status", types.Status).configuration
    except CrablbError:  # it cannot be asked
        file = ""
    return pid, Path(file).resolve() if file else None


def _same_network_as_init() -> bool:
    try:
        return os.path.samefile("/proc/self/ns/net", "/proc/1/ns/net")
    except OSError:  # another user's: it is asked by sudo then
        return True


def _program() -> str:
    """What a shell here calls this program by."""
    called = shutil.which(sys.argv[0]) if os.path.basename(sys.argv[0]) == "crablb" else None
    found = shutil.which("crablb")
    if found and os.geteuid() == 0 and (not called or os.path.samefile(found, called)):
        return "crablb"
    if path := called or found:
        return shlex.quote(os.path.abspath(path))  # also for sudo, whose PATH is another
    return f"{shlex.quote(sys.executable)} -m crablb"


def _check(vip: Vip) -> str:
    """A command that any client has, and that ends."""
    host = f"[{vip.address}]" if vip.address.version == 6 else str(vip.address)
    if scheme := WEB.get(vip.port):
        port = "" if vip.port in (80, 443) else f":{vip.port}"
        insecure = " -k" if scheme == "https" else ""
        return f"curl -sS{insecure} --max-time 5 '{scheme}://{host}{port}/'"
    return f"timeout 5 bash -c '</dev/tcp/{vip.address}/{vip.port}' && echo {vip} answers"
