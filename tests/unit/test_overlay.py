"""Changes at run time: worked out, laid over what the configuration says by then, and made part of its file."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crablb.config import check_services, parse_config, read_service
from crablb.errors import ConfigError
from crablb.model import Backend, Check, CheckKind, Config, Fallback, Mode, Service, State
from crablb.options import table
from crablb.overlay import Changes, Edit, MemberEdit, ServiceEdit, between, diff, overlay, save
from crablb.values import parse_address, parse_vip

VIPS = [f"tcp://10.0.0.{n}:80" for n in (100, 101, 102)] + ["tcp://[fd00::100]:80"]


def hosts(vip: str) -> list[str]:
    return [f"fd00::{n}" for n in range(11, 15)] if "[" in vip else [f"10.0.0.{n}" for n in range(11, 15)]


def backends(address: str) -> st.SearchStrategy[Backend]:
    return st.builds(
        Backend,
        st.just(parse_address(address)),
        weight=st.integers(1, 4),
        cr=st.booleans(),
        state=st.sampled_from(State),
        backup=st.booleans(),
        check_port=st.sampled_from([None, 8080]),
    )


CHECKS = [
    None,
    (),
    (Check(CheckKind.TCP),),
    (Check(CheckKind.HTTP, path="/ok", status=((200, 299), (404, 404)), interval=1.5), Check(CheckKind.AGENT, port=9)),
]


@st.composite
def services(draw: st.DrawFn, vip: str) -> Service:
    chosen = draw(st.lists(st.sampled_from(hosts(vip)), min_size=1, unique=True))
    return Service(
        parse_vip(vip),
        tuple(draw(backends(address)) for address in chosen),
        mode=draw(st.sampled_from(Mode)),
        fallback=draw(st.sampled_from(Fallback)),
        slow_start=draw(st.sampled_from([0.0, 30.0, 2.5])),
        checks=draw(st.sampled_from(CHECKS)),
        quorum=draw(st.integers(0, 2)),
    )


@st.composite
def configs(draw: st.DrawFn) -> Config:
    chosen = draw(st.lists(st.sampled_from(VIPS), unique=True, max_size=4))
    return Config(("eth0",), tuple(draw(services(vip)) for vip in chosen))


def quoted(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {quoted(each)}' for key, each in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(quoted, value))}]"
    return json.dumps(value)


@st.composite
def texts(draw: st.DrawFn, config: Config) -> str:
    """A file that means this, as somebody may have written it."""
    comment = st.sampled_from(["", "  # one, two = [3]", "# é"])
    lines = ["# of ours", 'interface = "eth0" # the first']
    if not config.services:
        return "\n".join([*lines, "service = []"])
    if draw(st.booleans()) and draw(st.booleans()):
        return "\n".join([*lines, f"service = {quoted([table(service) for service in config.services])}"])
    for service in config.services:
        said = table(service)
        members: list[Any] = said.pop("backends")  # type: ignore[assignment]
        checks: list[Any] = said.pop("check", None)  # type: ignore[assignment]
        lines += ["", "# a service" + draw(comment), "[[service]]" + draw(comment)]
        if checks is not None and (draw(st.booleans()) or not checks):
            said["check"], checks = checks, []
        lines += [f"{key} = {quoted(value)}{draw(comment)}" for key, value in said.items()]
        form = draw(st.integers(0, 2))
        if form == 0:
            lines.append(f"backends = {quoted(members)}{draw(comment)}")
        elif form == 1:
            lines.append("backends = [" + draw(comment))
            for i, each in enumerate(members):
                comma = "," if i + 1 < len(members) or draw(st.booleans()) else ""
                lines.append(f"  {quoted(each)}{comma}{draw(comment)}")
                if draw(st.booleans()):
                    lines.append("  # by itself")
            lines.append("]")
        else:
            for each in members:
                whole = each if isinstance(each, dict) else {"address": each}
                lines += ["[[service.backends]]", *(f"{key} = {quoted(value)}" for key, value in whole.items())]
        for check in checks or ():
            whole = check if isinstance(check, dict) else {"type": check}
            lines += ["[[service.check]]", *(f"{key} = {quoted(value)}" for key, value in whole.items())]
    return "\n".join(lines) + draw(st.sampled_from(["", "\n", "\n# the end\n"]))


def valid(config: Config) -> bool:
    return not check_services([(str(s.vip), s) for s in config.services], config.table_size)


def alike(one: Config, other: Config) -> bool:
    """But for the order of services and backends."""
    return not between(one, other)


@settings(max_examples=50)
@given(configs(), configs())
def test_the_changes_between_two_lead_from_one_to_the_other(one, other):
    assume(valid(one) and valid(other))
    changes = msgspec.json.decode(msgspec.json.encode(between(one, other)), type=Changes)
    assert changes == between(one, other)
    made, warnings = overlay(one, changes)
    assert alike(made, other)
    assert not warnings
    # Who has them already has nothing to do, and is told nothing.
    assert overlay(other, changes) == (other, [])
    assert bool(changes) == bool(diff(changes)) == (not alike(one, other))


@settings(max_examples=50)
@given(configs(), configs(), configs())
def test_whatever_has_become_of_the_configuration_the_result_is_one(one, other, later):
    assume(valid(one) and valid(other) and valid(later))
    made, _ = overlay(later, between(one, other))
    assert valid(made)
    # And what is left of the changes holds once more, without a word.
    assert overlay(later, between(later, made))[1] == []


@settings(max_examples=50)
@given(configs(), configs(), st.data())
def test_what_is_saved_is_what_was_wanted(one, other, data):
    """save(file, changes), and nothing over it, is the file with the changes over it."""
    assume(valid(one) and valid(other))
    text = data.draw(texts(one))
    assert alike(parse_config(text), one)
    try:
        saved = save(text, between(one, other))
    except ConfigError as error:
        # What a list in one line cannot hold may be refused, never written wrongly.
        assert "by hand" in error.problems[0]
        assert "service = [" in text
        return
    assert alike(parse_config(saved), other)
    if alike(one, other):
        assert saved == text


FILE = """# ours
interface = "eth0"

[[service]]
address = "tcp://10.0.0.100:80"   # the shop
backends = [
  "10.0.0.11",      # rack 1
  "10.0.0.12*3",    # rack 2
  # spare
  { address = "10.0.0.13", cr = false },
]

# the wiki
[[service]]
address = "tcp://10.0.0.101:80"
backends = ["10.0.0.11"]
"""


def changed(config: Config, vip: str, address: str, **fields: Any) -> Config:
    def with_it(service: Service) -> Service:
        own = (replace(b, **fields) if str(b.address) == address else b for b in service.backends)
        return replace(service, backends=tuple(own)) if str(service.vip) == vip else service

    return replace(config, services=tuple(map(with_it, config.services)))


def test_comments_order_and_notation_stay():
    config = parse_config(FILE)
    wanted = changed(config, VIPS[0], "10.0.0.12", weight=5)
    wanted = changed(wanted, VIPS[0], "10.0.0.13", state=State.DRAIN)
    wanted = changed(wanted, VIPS[1], "10.0.0.11", weight=2)
    assert save(FILE, between(config, wanted)) == FILE.replace("12*3", "12*5").replace(
        "cr = false }", 'cr = false, state = "drain"}'
    ).replace('backends = ["10.0.0.11"]', 'backends = ["10.0.0.11*2"]')


@pytest.mark.parametrize("bare", [0, 1])
def test_line_ends_stay(bare):
    """Those that a line has; of a new one, what all have."""
    before = FILE.replace("\n", "\r\n").replace("\r\n", "\n", bare)
    config = parse_config(before)
    wanted = changed(config, VIPS[0], "10.0.0.12", weight=5)
    assert save(before, between(config, wanted)) == before.replace("12*3", "12*5")
    more = replace(wanted.services[0], vip=parse_vip(VIPS[2]))
    saved = save(before, between(config, replace(wanted, services=(*wanted.services, more))))
    assert (saved.count("\r\n") == saved.count("\n")) is (not bare)
    assert saved.count("\r\n") > before.count("\r\n") - 1


def weight(config: Config, address: str) -> int:
    return next(b.weight for b in config.services[0].backends if str(b.address) == address)


def test_the_field_that_the_file_has_changed_since_is_the_files():
    config = parse_config(FILE)
    changes = between(config, changed(config, VIPS[0], "10.0.0.12", weight=5, state=State.DRAIN))
    edited = parse_config(FILE.replace("12*3", "12*7"))
    made, warnings = overlay(edited, changes)
    assert weight(made, "10.0.0.12") == 7
    assert made.services[0].backends[1].state is State.DRAIN  # that it says nothing of
    assert warnings == [
        "tcp://10.0.0.100:80: 10.0.0.12: weight was changed from 3 to 5 at run time; the configuration says 7 by now:"
        " that holds"
    ]
    # Another field of the same backend is another field.
    beside, warnings = overlay(parse_config(FILE.replace('"10.0.0.11",', '"10.0.0.11*9",')), changes)
    assert (weight(beside, "10.0.0.11"), weight(beside, "10.0.0.12"), warnings) == (9, 5, [])


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (ServiceEdit(backends={"10.0.0.19": MemberEdit(settings={"weight": Edit(1, 2)})}), "has it no more"),
        (ServiceEdit(backends={"10.0.0.11": MemberEdit(settings={"size": Edit(1, 2)})}), "there is no setting 'size'"),
        (ServiceEdit(backends={"10.0.0.11": MemberEdit(settings={"weight": Edit(1, "x")})}), "'x' is not a weight"),
        (ServiceEdit(backends={"nobody": MemberEdit(removed=True)}), "is not an IP address"),
        (ServiceEdit(backends={"10.0.0.19": MemberEdit(added={})}), "address is missing"),
        (ServiceEdit(backends={"10.0.0.19": MemberEdit(added={"address": "10.0.0.18"})}), "says of itself"),
        (ServiceEdit(backends={"10.0.0.101": MemberEdit(added={"address": "10.0.0.101"})}), "is also a VIP"),
        (ServiceEdit(backends={f"10.0.0.{n}": MemberEdit(removed=True) for n in (11, 12, 13)}), "has no backends"),
        (ServiceEdit(settings={"mode": Edit("negotiated", "odd")}), "'odd' is not one of"),
        (ServiceEdit(added={"address": "tcp://10.0.0.100:80", "backends": ["10.0.0.14"]}), "otherwise: that holds"),
        (ServiceEdit(added={"address": "tcp://10.0.0.109:80"}), "says of itself"),
        (ServiceEdit(added={"backends": "x"}), "is not a list"),
    ],
)
def test_what_makes_no_sense_is_told_and_left_out(edit, told):
    config = parse_config(FILE)
    good = ServiceEdit(backends={"10.0.0.11": MemberEdit(settings={"weight": Edit(1, 2)})})
    made, warnings = overlay(config, Changes({VIPS[0]: edit, VIPS[1]: good}))
    assert made == changed(config, VIPS[1], "10.0.0.11", weight=2)
    assert told in " ".join(warnings)


def test_a_service_that_is_none():
    config = parse_config(FILE)
    made, warnings = overlay(config, Changes({"udp://x": ServiceEdit(removed=True)}))
    assert made is config
    assert "the change is given up" in warnings[0]


def test_words():
    config = parse_config(FILE)
    wanted = changed(config, VIPS[0], "10.0.0.11", weight=3, state=State.DRAIN)
    first = replace(wanted.services[0], policy="random", backends=wanted.services[0].backends[:2])
    new = read_service({"address": VIPS[2], "backends": ["10.0.0.14*2", "10.0.0.15"]})
    changes = between(config, replace(config, services=(first, new)))
    assert diff(changes) == [
        "tcp://10.0.0.100:80 policy: maglev -> random",
        "tcp://10.0.0.100:80 10.0.0.11: weight 1 -> 3, state up -> drain",
        "tcp://10.0.0.100:80 10.0.0.13 removed",
        "tcp://10.0.0.101:80 removed",
        "tcp://10.0.0.102:80 added, with 10.0.0.14*2, 10.0.0.15",
    ]
    assert len(changes) == 6


def test_a_file_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="Invalid statement"):
        save("= nothing", Changes())
