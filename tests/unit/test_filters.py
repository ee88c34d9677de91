"""The language of captures: what it says, and what is wrong with what it does not."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crablb.errors import ConfigError
from crablb.filters import Filter, parse_filter

addresses = st.one_of(
    st.ip_addresses(v=4),
    st.ip_addresses(v=6).filter(lambda a: not a.ipv4_mapped),
)
networks = st.builds(
    lambda address, bits: ipaddress.ip_network(f"{address}/{bits % (address.max_prefixlen + 1)}", strict=False),
    addresses,
    st.integers(0, 128),
).filter(lambda n: not (n.version == 6 and n.network_address.ipv4_mapped))
ports = st.integers(1, 65535)


@st.composite
def filters(draw):
    client, vip = draw(st.none() | networks), draw(st.none() | addresses)
    if client and vip and client.version != vip.version:
        vip = None
    port = draw(st.none() | ports) if vip else None
    return Filter(client, vip, port, draw(st.none() | addresses), draw(st.none() | ports))


@given(filters())
def test_what_is_said_is_read(wanted):
    assert parse_filter(str(wanted)) == wanted


@given(filters(), st.randoms())
def test_order_and_space_say_nothing(wanted, random):
    parts = str(wanted).split(" and ") if str(wanted) else []
    random.shuffle(parts)
    spaced = "  and\t".join(f" {part.replace(' ', '   ')}" for part in parts)
    assert parse_filter(spaced + "\n") == wanted


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["client", "vip", "port", "and", "10.0.0.1", "80", ":"])).map(" ".join)
)
def test_whatever_is_written(text):
    """A filter or an error; and the place that an error names is there."""
    try:
        parse_filter(text)
    except ConfigError as error:
        (problem,) = error.problems
        if problem.startswith("filter, character "):
            place = int(problem.split()[2].rstrip(":"))
            assert 1 <= place <= len(text)
            assert not text[place - 1].isspace()
        else:
            assert "one is IPv4, one IPv6" in problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("clint 10.0.0.1", "filter, character 1: 'clint' is unknown; did you mean client?"),
        ("tcp", "filter, character 1: 'tcp' is unknown; there are client, vip, backend, port"),
        ("client", "filter, character 1: nothing follows 'client'; write client and 10.0.0.1, 10.0.0.0/24, fd00::1"),
        ("client 10.0.0.1 or port 80", "filter, character 17: 'or' stands where 'and' belongs"),
        ("port 80 and", "filter, character 9: nothing follows the 'and'; there are client, vip, backend, port"),
        ("port 80 and port 81", "filter, character 13: 'port' is there twice"),
        ("port http", "filter, character 6: 'http' is not a port; behind 'port' stands a number from 1 to 65535"),
        ("port 0", "filter, character 6: '0' is not a port"),
        ("port 65536", "filter, character 6: '65536' is not a port"),
        ("vip 10.0.0", "filter, character 5: '10.0.0' is not an IP address"),
        ("vip 10.0.0.100:", "filter, character 5: '10.0.0.100:' is not a port"),
        ("vip fd00::100:zz", "filter, character 5: 'fd00::100:zz' is not an IP address"),
        ("client 10.0.0.1/33", "filter, character 8: '10.0.0.1/33' is not a prefix"),
        ("backend ::ffff:10.0.0.1", "filter, character 9: '::ffff:10.0.0.1' is no address that packets have"),
        ("client 10.0.0.1 and vip fd00::1", "filter: no packet is from 10.0.0.1/32 and to fd00::1"),
    ],
)
def test_errors_name_the_place(text, problem):
    with pytest.raises(ConfigError) as raised:
        parse_filter(text)
    (said,) = raised.value.problems
    assert said.startswith(problem)


def test_vips_as_everywhere():
    wanted = Filter(vip=ipaddress.ip_address("10.0.0.100"), vip_port=80)
    assert parse_filter("vip 10.0.0.100:80") == parse_filter("vip tcp://10.0.0.100:80") == wanted
    six = ipaddress.ip_address("fd00::100")
    assert parse_filter("vip [fd00::100]:80") == Filter(vip=six, vip_port=80)
    assert parse_filter("vip fd00::100") == parse_filter("vip [fd00::100]") == Filter(vip=six)


def test_clients_host_bits_say_nothing():
    assert parse_filter("client 10.0.0.7/24") == parse_filter("client 10.0.0.0/24")
