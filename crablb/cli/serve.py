"""``crablb serve``: the load balancer."""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
from contextlib import ExitStack
from pathlib import Path

import structlog
import uvloop

from crablb import config
from crablb import log as logging
from crablb.control import admin, notify, seed, takeover
from crablb.control.daemon import serve
from crablb.control.estate import Heir
from crablb.control.state import Store, place
from crablb.control.successor import FLAG, Parent, again, parent
from crablb.control.watch import fingerprint
from crablb.errors import ConfigError, KernelError
from crablb.kernel import capabilities, pins
from crablb.model import Config, Service, Switch
from crablb.options import OPTIONS, Option

#: As many as an event loop has descriptors, and some more.
PIPES = 8
#: Errors that tell of a lack of descriptors.
DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
DIED = "who served has ended before this one took over; it is as after a death"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="run the load balancer",
        epilog="Signals: SIGTERM, SIGINT and SIGQUIT end it; SIGHUP has it read its file again (crablb reload); SIGUSR1"
        " opens the log anew; SIGUSR2 has the installed program take over (crablb takeover). Exit status: 0, it was"
        " told to end, or another process has taken over; 1, it could not go on (the log says why); 2, it never began.",
    )
    parser.add_argument("--config", metavar="FILE.toml", help="read all but the interface from a file (crablb config)")
    groups = {
        Config: parser.add_argument_group("the load balancer"),
        Service: parser.add_argument_group("services", "For all that are given by --service."),
    }
    for option in OPTIONS:
        if option.flags:
            groups[option.scope].add_argument(
                *option.flags,
                dest=option.name,
                action="append" if option.repeatable else "store",
                nargs="?" if option.kind.implied else None,
                const=option.kind.implied,
                metavar=option.kind.metavar,
                help=option.explained.replace("%", "%%"),
            )
    parser.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"], help="the least that is logged"
    )
    parser.add_argument(
        FLAG,
        action="store_true",
        help="serve in place of the load balancer that runs on the interfaces, with its sockets and flows; it ends when"
        " this one serves, and goes on if this one does not come to that (crablb takeover; docs/takeover.md)",
    )
    parser.set_defaults(run=run)


def read_config(args: argparse.Namespace) -> Config:
    """The configuration that the arguments describe.  Raises :class:`ConfigError`."""
    given = {o.name: value for o in OPTIONS if o.flags and (value := getattr(args, o.name)) is not None}
    interfaces, services = given.pop("interface", []), given.pop("service", [])
    if args.config is None:
        return config.config_from_args(interfaces, services, **given)
    extra = [_called(o) for o in OPTIONS if (o.flags and o.name in given) or (services and o.name == "service")]
    if extra:
        raise ConfigError(f"{', '.join(extra)} cannot be given with --config; say it in {args.config}")
    return config.load_config(args.config, interfaces)


def _called(option: Option) -> str:
    """Its flag, with its key in a file where that is another word."""
    flag = option.flags[0]
    return flag if flag == f"--{option.name.replace('_', '-')}" else f"{flag} (key: {option.name})"


def run(args: argparse.Namespace) -> int:
    starter = parent()
    known, settings = _known(args), read_config(args)
    logging.set_up(args.log_level)
    capabilities.require("crablb serve", capabilities.SERVE)
    pins.prepare()
    # Who serves in a dead parent's place is another one, which was not asked.
    if args.takeover and not (starter and starter.gone) and (heir := _heir(settings)):
        try:
            # From now on nothing is reloaded there: what was until now is in the file.
            known = _known(args)
            return _serve(args, read_config(args), known, heir)
        except takeover.Gone:  # what follows is to begin without what this attempt had
            takeover.until_ended(heir.predecessor.pid)
            if not starter:
                structlog.get_logger().warning(DIED)
        except BaseException as error:
            reason = str(error) or type(error).__name__
            if isinstance(error, OSError) and error.filename:
                reason = f"{error.filename}: {error.strerror}"
            heir.predecessor.failed(reason)
            raise
        finally:
            heir.close()
    if starter:
        _outlive(starter)
    return _serve(args, settings, known, None)


def _known(args: argparse.Namespace) -> str:
    """To be asked before it is read, so that no change is missed."""
    return fingerprint(Path(args.config)) if args.config else ""


def _outlive(starter: Parent) -> None:
    """Go on in place of a process that has started this one and died before it handed over.

    Raises :class:`KernelError` where a service manager starts another one: it does not know this one, and would neither
    watch nor end it.
    """
    if not starter.gone:
        takeover.until_ended(starter.pid)  # its sockets are closed before it has ended
    if not starter.gone:
        raise KernelError(f"process {starter.pid}, which has started this one, hands nothing over, and lives")
    starter.adopt_log()
    if notify.asked():
        raise KernelError(f"{DIED}: the service manager starts another one")
    structlog.get_logger().warning(DIED)


def _heir(settings: Config) -> Heir | None:
    """Who serves now; None: nobody does.  Raises :class:`KernelError`."""
    if predecessor := takeover.connect(settings.interfaces):
        return Heir(predecessor)
    structlog.get_logger().info("nobody serves that could be taken over; it is started as usual")
    return None


def _serve(args: argparse.Namespace, settings: Config, known: str, heir: Heir | None) -> int:
    for name in () if heir else settings.interfaces:  # before all that a second daemon would trip over: ports, changes
        instead = (
            "have it read its file anew (crablb reload) or serve anew (crablb takeover), or this one serve in its place"
            " (--takeover), or "
        )
        pins.check_free(f"lb-{name}", f"the load balancer of {name}", instead)
    admin.join(settings, heir.parts.admin_group if heir else None)
    capabilities.keep((*capabilities.SERVE, *capabilities.OF_USE))
    key = settings.seed or (heir.parts.seed if heir else b"") or seed.load()
    names = settings.interfaces
    store = Store(place(names[0]), names, key) if settings.persist is Switch.ON else None
    read = (lambda: read_config(args)) if args.config else None
    command = again() if args.program else None
    loop = _event_loop()
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(serve(settings, key, read, args.config or "", known, store, heir, command))
    except RuntimeError as error:  # a loop that could not begin to run cannot be closed either
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def _event_loop() -> asyncio.AbstractEventLoop:
    """One that has all it needs of the kernel.  Raises :class:`KernelError`."""
    try:
        with ExitStack() as stack:  # libuv aborts, without a word, if it gets no pipe
            for fd in (fd for _ in range(PIPES) for fd in os.pipe()):
                stack.callback(os.close, fd)
        loop = uvloop.new_event_loop()
        loop.call_soon(loop.stop)
        loop.run_forever()  # it takes what signals come by when it runs for the first time
    except OSError as error:
        remedy = "ulimit -n, LimitNOFILE= in a systemd unit" if error.errno in DESCRIPTORS else "ulimit -v, MemoryMax="
        raise KernelError(f"no event loop can be made: {error.strerror}; raise the limit: {remedy}") from None
    return loop
