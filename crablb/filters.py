"""Which packets a capture takes: a small language that the workers and the XDP program decide cheaply.

::

    client 10.0.0.1            client 10.0.0.0/24         vip 10.0.0.100        vip [fd00::100]:443
    backend 10.0.0.11          port 443                   client fd00::/64 and vip [fd00::100]:80 and backend fd00::11
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from crablb.errors import ConfigError
from crablb.model import Address, Network
from crablb.values import near

__all__ = ["WORDS", "Filter", "parse_client", "parse_filter", "parse_target"]

WORDS = ("client", "vip", "backend", "port")
THERE_ARE = f"there are {', '.join(WORDS)}"
#: What may stand behind each, in an error.
EXAMPLES = {
    "client": "10.0.0.1, 10.0.0.0/24, fd00::1 or fd00::/64",
    "vip": "10.0.0.100, 10.0.0.100:80, fd00::100 or [fd00::100]:80",
    "backend": "10.0.0.11 or fd00::11",
    "port": "a number from 1 to 65535",
}


@dataclass(frozen=True, slots=True)
class Filter:
    """The packets that have all that is named.  Nothing named: those that the load balancer takes."""

    client: Network | None = None
    vip: Address | None = None
    vip_port: int | None = None  # with a VIP
    backend: Address | None = None  # that it is sent to
    port: int | None = None  # of either side

    def __str__(self) -> str:
        said = []
        if self.client:
            whole = self.client.prefixlen == self.client.max_prefixlen
            said.append(f"client {self.client.network_address if whole else self.client}")
        if self.vip:
            bracketed = f"[{self.vip}]" if self.vip.version == 6 and self.vip_port else f"{self.vip}"
            said.append(f"vip {bracketed}" + (f":{self.vip_port}" if self.vip_port else ""))
        if self.backend:
            said.append(f"backend {self.backend}")
        if self.port:
            said.append(f"port {self.port}")
        return " and ".join(said)


class _WrongError(Exception):
    """What is behind a word is not what belongs there."""


def parse_filter(text: str) -> Filter:
    """The filter that a text says; the empty one names nothing.

    Raises :class:`ConfigError`, which has the place.
    """
    words = [(match.start() + 1, match[0]) for match in re.finditer(r"\S+", text)]
    fields: dict[str, object] = {}
    said: set[str] = set()
    at = 0
    while at < len(words):
        place, word = words[at]
        if said:
            if word != "and":
                raise _error(place, f"{word!r} stands where 'and' belongs")
            at += 1
            if at == len(words):
                raise _error(place, f"nothing follows the 'and'; {THERE_ARE}")
            place, word = words[at]
        if word not in WORDS:
            raise _error(place, f"{word!r} is unknown; {near(word, WORDS, THERE_ARE)}")
        if word in said:
            raise _error(place, f"{word!r} is there twice")
        if at + 1 == len(words):
            raise _error(place, f"nothing follows {word!r}; write {word} and {EXAMPLES[word]}")
        place, value = words[at + 1]
        try:
            fields |= _value(word, value)
        except _WrongError as error:
            raise _error(place, f"{value!r} {error}; behind {word!r} stands {EXAMPLES[word]}") from None
        said.add(word)
        at += 2
    made = Filter(**fields)  # type: ignore[arg-type]
    if made.client and made.vip and made.client.version != made.vip.version:
        raise ConfigError(f"filter: no packet is from {made.client} and to {made.vip}: one is IPv4, one IPv6")
    return made


def parse_client(text: str) -> Network:
    """One client's address, as a network of its own.  Raises :class:`ConfigError`."""
    try:
        return ipaddress.ip_network(_address(text))
    except _WrongError as error:
        raise ConfigError(f"{text!r} {error}; a client is one address: 10.0.0.1 or fd00::1") from None


def parse_target(text: str) -> tuple[Address, int | None]:
    """A VIP, with a port or without.  Raises :class:`ConfigError`."""
    try:
        return _target(text)
    except _WrongError as error:
        raise ConfigError(f"{text!r} {error}; write {EXAMPLES['vip']}") from None


def _error(place: int, what: str) -> ConfigError:
    return ConfigError(f"filter, character {place}: {what}")


def _value(word: str, text: str) -> dict[str, object]:
    if word == "port":
        return {"port": _port(text)}
    if word == "client":
        return {"client": _network(text)}
    if word == "backend":
        return {"backend": _address(text)}
    vip, port = _target(text)
    return {"vip": vip, "vip_port": port}


def _target(text: str) -> tuple[Address, int | None]:
    text = text.removeprefix("tcp://")
    if match := re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*):([^:]*)", text):
        return _address(match[1]), _port(match[2])
    return _address(text), None


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise _WrongError("is not a port")
    return int(text)


def _address(text: str) -> Address:
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        raise _WrongError("is not an IP address") from None
    if isinstance(address, ipaddress.IPv6Address) and (address.scope_id or address.ipv4_mapped):
        raise _WrongError("is no address that packets have")
    return address


def _network(text: str) -> Network:
    bare, slash, bits = text.partition("/")
    address = _address(bare)
    if not slash:
        return ipaddress.ip_network(address)
    try:
        return ipaddress.ip_network(f"{address}/{bits}", strict=False)
    except ValueError:
        raise _WrongError("is not a prefix") from None
