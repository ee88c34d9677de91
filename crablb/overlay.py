"""Changes at run time: how what is wanted differs from what the configuration says, as plain values.

They are worked out (:func:`between`), laid over the configuration when it is read again (:func:`overlay`), told
(:func:`diff`) and made part of its file (:func:`save`).  Values stand as in a file (:func:`crablb.options.held`), so
that the whole is JSON.

Each change remembers what the configuration said of that very field when it was made.  It holds while the
configuration goes on to say so; if that says something else by and by, the configuration holds: who wrote it knew
later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from crablb.config import check_services, parse_config, read_backend, read_option, read_service
from crablb.errors import ConfigError
from crablb.model import Address, Backend, Config, Service, Vip
from crablb.options import Option, held, of, table
from crablb.values import parse_address, parse_vip, shown

__all__ = [
    "Changes",
    "Edit",
    "MemberEdit",
    "ServiceEdit",
    "backend_words",
    "between",
    "diff",
    "overlay",
    "save",
    "settings_words",
    "word",
]

M = TypeVar("M", bound=Service | Backend)


@dataclass(frozen=True, slots=True)
class Edit:
    """A setting: what the configuration said of it, and what it is.  None: nothing, or the default without words."""

    was: Any
    now: Any


@dataclass(frozen=True, slots=True)
class MemberEdit:
    """What was done to a backend."""

    added: dict[str, Any] | None = None  # its table; the configuration did not have it
    removed: bool = False  # the configuration has it
    settings: dict[str, Edit] = field(default_factory=dict)  # by the options' names; else

    def __bool__(self) -> bool:
        return self.added is not None or self.removed or bool(self.settings)


@dataclass(frozen=True, slots=True)
class ServiceEdit:
    """What was done to a service."""

    added: dict[str, Any] | None = None
    removed: bool = False
    settings: dict[str, Edit] = field(default_factory=dict)
    backends: dict[str, MemberEdit] = field(default_factory=dict)  # by address

    def __bool__(self) -> bool:
        return self.added is not None or self.removed or bool(self.settings or self.backends)


@dataclass(frozen=True, slots=True)
class Changes:
    """All of them, by service."""

    services: dict[str, ServiceEdit] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.services)

    def __len__(self) -> int:
        """How many there are: a setting is one, as is something added or removed."""
        return sum(
            max(1, len(edit.settings) + sum(max(1, len(member.settings)) for member in edit.backends.values()))
            for edit in self.services.values()
        )


def _settings(scope: type) -> Iterable[Option]:
    return (option for option in of(scope) if option.name not in ("address", "backends"))


# ---- from configurations to changes ----


def between(config: Config, wanted: Config) -> Changes:
    """What leads from the services of the one to those of the other, but for their order and that of backends."""
    before = {service.vip: service for service in config.services}
    after = {service.vip: service for service in wanted.services}
    edits: dict[str, ServiceEdit] = {}
    for vip, service in before.items():
        new = after.get(vip)
        if new is None:
            edits[str(vip)] = ServiceEdit(removed=True)
        elif new is not service and (edit := _service_edit(service, new)):
            edits[str(vip)] = edit
    edits |= {str(vip): ServiceEdit(added=table(new)) for vip, new in after.items() if vip not in before}
    return Changes(edits)


def _service_edit(before: Service, after: Service) -> ServiceEdit:
    old = {backend.address: backend for backend in before.backends}
    new = {backend.address: backend for backend in after.backends}
    edits: dict[str, MemberEdit] = {}
    for address, backend in old.items():
        if address not in new:
            edits[str(address)] = MemberEdit(removed=True)
        elif settings := _edits(backend, new[address]):
            edits[str(address)] = MemberEdit(settings=settings)
    edits |= {str(a): MemberEdit(added=table(backend)) for a, backend in new.items() if a not in old}
    return ServiceEdit(settings=_edits(before, after), backends=edits)


def _edits(before: M, after: M) -> dict[str, Edit]:
    if before == after:
        return {}
    pairs = ((o, getattr(before, o.field), getattr(after, o.field)) for o in _settings(type(before)))
    return {option.name: Edit(held(option, was), held(option, now)) for option, was, now in pairs if was != now}


# ---- from a configuration and changes to what is wanted ----


def overlay(config: Config, changes: Changes) -> tuple[Config, list[str]]:
    """The configuration with the changes in it, and which of them hold no more, in words.

    Of what the configuration says by now as well nothing is said.  :func:`between` tells what is left of the changes.
    What would be no configuration together is left out, as is what cannot be understood.
    """
    warnings: list[str] = []
    merged: dict[Vip, tuple[Service | None, Service | None]] = {}  # as configured, as wanted
    before = {service.vip: service for service in config.services}
    for name, edit in changes.services.items():
        try:
            vip = parse_vip(name)
            merged[vip] = before.get(vip), _merged(vip, before.get(vip), edit, warnings)
        except ConfigError as error:
            warnings += [f"{name}: {problem}; the change is given up" for problem in error.problems]
    services = _fitting(config, before, {vip: pair for vip, pair in merged.items() if pair[0] is not pair[1]}, warnings)
    return (config if services == config.services else replace(config, services=services)), warnings


def _fitting(
    config: Config,
    before: Mapping[Vip, Service],
    merged: Mapping[Vip, tuple[Service | None, Service | None]],
    warnings: list[str],
) -> tuple[Service, ...]:
    """The services with those of the merged ones that make no configuration invalid."""

    def placed(kept: Mapping[Vip, Service | None]) -> tuple[Service, ...]:
        return tuple(service for service in (dict(before) | dict(kept)).values() if service)

    def problems(kept: Mapping[Vip, Service | None]) -> list[str]:
        return check_services([(str(service.vip), service) for service in placed(kept)], config.table_size)

    def add(kept: dict[Vip, Service | None], more: list[tuple[Vip, Service | None]]) -> dict[Vip, Service | None]:
        found = problems(kept | dict(more))
        if not found:
            return kept | dict(more)
        if len(more) == 1:
            warnings.extend(f"{problem}; what was changed of {more[0][0]} at run time is given up" for problem in found)
            return kept
        half = len(more) // 2
        return add(add(kept, more[:half]), more[half:])

    pairs = [(vip, wanted) for vip, (_, wanted) in merged.items()]
    return placed(add({}, pairs)) if pairs else config.services


def _merged(vip: Vip, service: Service | None, edit: ServiceEdit, warnings: list[str]) -> Service | None:
    """The service as it is wanted; None: not at all.  Raises :class:`ConfigError` if the change makes no sense."""
    if edit.removed:
        return None
    if edit.added is not None:
        added = read_service(edit.added)
        if added.vip != vip:
            raise ConfigError(f"says of itself that it is {added.vip}")
        if service is None:
            return added
        if service != added:
            warnings.append(f"{vip}: was added at run time, and the configuration has it by now, otherwise: that holds")
        return service
    if service is None:
        warnings.append(f"{vip}: was changed at run time, and the configuration has it no more")
        return None
    return replace(
        _with(service, edit.settings, str(vip), warnings), backends=_backends(service, edit.backends, warnings)
    )


def _backends(service: Service, edits: Mapping[str, MemberEdit], warnings: list[str]) -> tuple[Backend, ...]:
    wanted = {backend.address: backend for backend in service.backends}
    for name, edit in edits.items():
        where = f"{service.vip}: {name}"
        try:
            if backend := _backend(parse_address(name), wanted.get(parse_address(name)), edit, where, warnings):
                wanted[backend.address] = backend
            else:
                wanted.pop(parse_address(name), None)
        except ConfigError as error:
            warnings += [f"{where}: {problem}; the change is given up" for problem in error.problems]
    return tuple(wanted.values())


def _backend(
    address: Address, backend: Backend | None, edit: MemberEdit, where: str, warnings: list[str]
) -> Backend | None:
    """As :func:`_merged`, a backend."""
    if edit.removed:
        return None
    if edit.added is not None:
        added = read_backend(edit.added)
        if added.address != address:
            raise ConfigError(f"says of itself that it is {added.address}")
        if backend is not None and backend != added:
            warnings.append(
                f"{where} was added at run time, and the configuration has it by now, otherwise: that holds"
            )
        return backend or added
    if backend is None:
        warnings.append(f"{where} was changed at run time, and the configuration has it no more")
        return None
    return _with(backend, edit.settings, where, warnings)


def _with(value: M, settings: Mapping[str, Edit], where: str, warnings: list[str]) -> M:
    """With the settings that the configuration has not changed since."""
    options = {option.name: option for option in _settings(type(value))}
    fields: dict[str, Any] = {}
    for name, edit in settings.items():
        if name not in options:
            raise ConfigError(f"there is no setting {shown(name)}")
        option = options[name]
        says = held(option, getattr(value, option.field))
        if says == edit.was:
            fields[option.field] = read_option(option, edit.now)
        elif says != edit.now:
            warnings.append(
                f"{where}: {name} was changed from {word(edit.was)} to {word(edit.now)} at run time;"
                f" the configuration says {word(says)} by now: that holds"
            )
    return replace(value, **fields) if fields else value


# ---- in words ----


def word(value: object) -> str:
    """A value of a file, for people."""
    if value is None:
        return "the default"
    if isinstance(value, list):
        return f"[{', '.join(map(word, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {word(each)}' for key, each in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def settings_words(settings: Mapping[str, Edit]) -> list[str]:
    """``policy: maglev -> random``."""
    return [f"{name}: {word(edit.was)} -> {word(edit.now)}" for name, edit in settings.items()]


def backend_words(address: str, edit: MemberEdit) -> str:
    """``10.0.0.11: weight 1 -> 3, state up -> drain``; one that was added or removed by its address and settings."""
    if edit.added is not None:
        rest = [f"{key} {word(value)}" for key, value in edit.added.items() if key != "address"]
        return " ".join([address, f"({', '.join(rest)})"]) if rest else address
    told = [words.replace(":", "", 1) for words in settings_words(edit.settings)]
    return f"{address}: {', '.join(told)}" if told else address


def diff(changes: Changes) -> list[str]:
    """A line for each service, setting or backend."""
    lines: list[str] = []
    for vip, edit in changes.services.items():
        if edit.removed:
            lines.append(f"{vip} removed")
        if edit.added is not None:
            lines.append(f"{vip} added, with {', '.join(map(word, edit.added.get('backends', [])))}")
        lines += [f"{vip} {words}" for words in settings_words(edit.settings)]
        for address, member in edit.backends.items():
            ended = " added" if member.added is not None else " removed" if member.removed else ""
            lines.append(f"{vip} {backend_words(address, member)}{ended}")
    return lines


# ---- into the file ----


def save(text: str, changes: Changes) -> str:
    """The text of a file with the changes worked in; its comments, order, notation and line ends stay.

    Raises :class:`ConfigError` if the text is no configuration, or they cannot be.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    config = parse_config(text, ("any",))
    wanted, _ = overlay(config, changes)
    left = between(config, wanted)
    if not left:
        return text
    if "\n" in text and text.count("\r\n") == text.count("\n"):  # tomlkit writes new lines without the \r
        return save(text.replace("\r\n", "\n"), changes).replace("\n", "\r\n")
    try:
        document = tomlkit.parse(text if text.endswith("\n") else f"{text}\n")
        for vip, edit in left.services.items():
            _work_in(document, parse_vip(vip), edit)
        made = tomlkit.dumps(document)
        same = not between(parse_config(made, ("any",)), wanted)
    except (TOMLKitError, ConfigError, KeyError, ValueError):  # a notation that it has no way with
        same = False
    if not same:
        raise ConfigError(
            ["the changes cannot be worked into the file as it is written; make them by hand:", *diff(changes)]
        )
    return made


def _work_in(document: Any, vip: Vip, edit: ServiceEdit) -> None:
    import tomlkit

    services = document["service"]
    if edit.added is not None:
        if not len(services):
            document["service"] = services = tomlkit.aot()
        tables = isinstance(services, tomlkit.items.AoT)
        services.append(tomlkit.item(edit.added) if tables else _inline(edit.added))
        return
    at = next(i for i, each in enumerate(services) if parse_vip(each["address"]) == vip)
    if edit.removed:
        del services[at]
        if not len(services):
            document.remove("service")
            document["service"] = []
        return
    service = services[at]
    _set(service, edit.settings, Service)
    # Those that are added first: an array that would be empty in between loses its form.
    for address, member in sorted(edit.backends.items(), key=lambda each: each[1].added is None):
        _work_in_backend(service["backends"], parse_address(address), member)


def _work_in_backend(backends: Any, address: Address, edit: MemberEdit) -> None:
    import tomlkit

    if edit.added is not None:
        if isinstance(backends, tomlkit.items.AoT):
            backends.append(tomlkit.item(edit.added))
        else:
            # Behind a last one without a comma and with comments, tomlkit 0.15 puts the next without one between.
            last = _well(backends.as_string(), (entry := _entry(read_backend(edit.added))))
            backends.insert(len(backends) - (not last), entry)
        return
    at = next(i for i, each in enumerate(backends) if _address(each) == address)
    entry = backends[at]
    if edit.removed:
        del backends[at]
    elif isinstance(entry, str):
        backends[at] = _entry(_with(read_backend(str(entry)), edit.settings, "", []))
    else:
        if "weight" in edit.settings:
            entry["address"] = entry["address"].partition("*")[0]
        _set(entry, edit.settings, Backend)


def _well(array: str, entry: Any) -> bool:
    """Whether an element can be put at the end of an array."""
    import tomlkit

    trial = tomlkit.parse(f"a = {array}")
    trial["a"].append(entry)
    try:
        tomlkit.parse(tomlkit.dumps(trial))
    except ValueError:
        return False
    return True


def _set(found: Any, settings: Mapping[str, Edit], scope: type) -> None:
    defaults = {option.name: held(option, option.default) for option in _settings(scope)}
    for name, edit in settings.items():
        if edit.now is None:
            found.remove(name)
        elif name in found or edit.now != defaults[name]:
            found[name] = edit.now


def _address(entry: Any) -> Address:
    return parse_address(str(entry if isinstance(entry, str) else entry["address"]))


def _entry(backend: Backend) -> Any:
    """In a list, by its shorter notation."""
    notation: Any = held(next(o for o in of(Service) if o.name == "backends"), (backend,))
    return notation[0] if isinstance(notation[0], str) else _inline(notation[0])


def _inline(found: Mapping[str, Any]) -> Any:
    import tomlkit

    made = tomlkit.inline_table()
    for key, value in found.items():
        made[key] = (
            [_inline(each) if isinstance(each, dict) else each for each in value] if isinstance(value, list) else value
        )
    return made
