"""Draw the pictures of the pages: ``python docs/pictures.py`` writes docs/pictures/*.svg.

Each is as wide as a telephone, has its words inside, and is light or dark: as the reader's screen is where it is shown
as an image (GitHub), as the reader has chosen where it is part of a page (docs/conf.py puts it in).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).parent / "pictures"
WIDTH = 380
LINE = 17  # of the words below
CHARACTERS = 47  # of such a line

#: By what an arrow carries: a first packet, all that follows, something that is said between machines, what is lost.
Kind = Literal["first", "data", "said", "lost"]
Point = tuple[float, float]

#: Light, dark.
COLOURS = {
    "ink": ("#1b1f24", "#e6e8eb"),
    "quiet": ("#59636e", "#9ba3ad"),
    "box": ("#f3f5f8", "#23282f"),
    "line": ("#8c959f", "#6b737d"),
    "first": ("#0a58ca", "#6ea8fe"),
    "data": ("#1a7f37", "#57c26e"),
    "said": ("#8250df", "#b892ff"),
    "lost": ("#c62828", "#ff7b72"),
}

STYLE = """\
svg.drawn {{ {light} }}
@media (prefers-color-scheme: dark) {{ svg.drawn {{ {dark} }} }}
body[data-theme="light"] svg.drawn {{ {light} }}
body[data-theme="dark"] svg.drawn {{ {dark} }}
svg.drawn text {{ font: 13px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--drawn-ink); }}
svg.drawn .name {{ font-weight: 600; text-anchor: middle; }}
svg.drawn .of, svg.drawn .packet {{ font-size: 11px; fill: var(--drawn-quiet); text-anchor: middle; }}
svg.drawn .head {{ font-weight: 600; }}
svg.drawn .number {{ font-size: 11px; font-weight: 700; text-anchor: middle; fill: #fff; }}
svg.drawn rect {{ fill: var(--drawn-box); stroke: var(--drawn-line); stroke-width: 1.3; }}
svg.drawn .gone rect {{ fill: none; stroke: var(--drawn-lost); stroke-dasharray: 5 4; }}
svg.drawn .gone text {{ fill: var(--drawn-lost); }}
svg.drawn .arrow {{ fill: none; stroke-width: 2; }}
svg.drawn .data {{ stroke-width: 4; }}
svg.drawn .lost, svg.drawn .resting {{ stroke-dasharray: 6 5; }}
svg.drawn .cross {{ stroke: var(--drawn-lost); stroke-width: 3; }}
"""


def style() -> str:
    colours = [" ".join(f"--drawn-{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1)]
    return STYLE.format(light=colours[0], dark=colours[1])


@dataclass(frozen=True)
class Box:
    """Something that packets go to, by its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    name: str
    of: Sequence[str] = ()  # lines below the name
    gone: bool = False

    def drawn(self) -> str:
        middle, n = self.x + self.width / 2, len(self.of)
        first = self.y + self.height / 2 + 4.5 - 7 * n
        lines = [f'<text class="name" x="{middle:g}" y="{first:g}">{escape(self.name)}</text>']
        lines += [
            f'<text class="of" x="{middle:g}" y="{first + 14 * i + 14:g}">{escape(line)}</text>'
            for i, line in enumerate(self.of)
        ]
        rect = f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="6"/>'
        return f'<g class="{"gone" if self.gone else "here"}">{rect}{"".join(lines)}</g>'


@dataclass(frozen=True)
class Packet:
    """A packet, and one inside of it."""

    x: float
    y: float
    outer: str
    inner: str = ""

    def drawn(self) -> str:
        width = 62 if not self.inner else 116
        parts = [f'<rect x="{self.x:g}" y="{self.y:g}" width="{width}" height="20" rx="2"/>']
        parts.append(f'<text class="packet" x="{self.x + 30:g}" y="{self.y + 14:g}">{escape(self.outer)}</text>')
        if self.inner:
            parts.append(f'<rect x="{self.x + 58:g}" y="{self.y + 3:g}" width="55" height="14" rx="2"/>')
            parts.append(f'<text class="packet" x="{self.x + 85:g}" y="{self.y + 14:g}">{escape(self.inner)}</text>')
        return "".join(parts)


@dataclass(frozen=True)
class Arrow:
    kind: Kind
    points: Sequence[Point]
    number: int = 0  # of what is told below; its place is the middle of the first part
    both: bool = False
    resting: bool = False  # nothing goes by it now
    at: float = 0.5

    def drawn(self, name: str) -> str:
        path = "M" + " L".join(f"{x:g},{y:g}" for x, y in self.points)
        begin = f' marker-start="url(#{name}-{self.kind})"' if self.both else ""
        classes = f"arrow {self.kind}{' resting' if self.resting else ''}"
        line = (
            f'<path class="{classes}" d="{path}" stroke="var(--drawn-{self.kind})"{begin}'
            f' marker-end="url(#{name}-{self.kind})"/>'
        )
        if not self.number:
            return line
        (x, y), (to_x, to_y) = self.points[:2]
        return line + numbered(self.number, self.kind, x + (to_x - x) * self.at, y + (to_y - y) * self.at)


@dataclass(frozen=True)
class Cross:
    """Here nothing gets through any more."""

    x: float
    y: float

    def drawn(self) -> str:
        left, right, over, under = self.x - 8, self.x + 8, self.y - 8, self.y + 8
        lines = f"M{left:g},{over:g} L{right:g},{under:g} M{left:g},{under:g} L{right:g},{over:g}"
        return f'<path class="cross" d="{lines}"/>'


@dataclass(frozen=True)
class Head:
    """Of a part of a picture."""

    y: float
    text: str

    def drawn(self) -> str:
        return f'<text class="head" x="10" y="{self.y:g}">{escape(self.text)}</text>'


def numbered(number: int, kind: Kind, x: float, y: float) -> str:
    # On a colour that is dark enough for white on both grounds: the light one's.
    disc = f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="{COLOURS[kind][0]}"/>'
    return f'{disc}<text class="number" x="{x:g}" y="{y + 4:g}">{number}</text>'


Thing = Box | Packet | Cross | Head


@dataclass(frozen=True)
class Picture:
    title: str
    height: float  # of the drawing
    things: Sequence[Thing]
    arrows: Sequence[Arrow]
    told: Sequence[tuple[Kind, str]] = ()  # of the arrows, by their numbers
    more: str = ""
    kinds: frozenset[Kind] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", frozenset(arrow.kind for arrow in self.arrows))
        assert {a.number for a in self.arrows} - {0} <= set(range(1, len(self.told) + 1)), self.title

    def svg(self, name: str) -> str:
        words, height = self._words()
        heads = (
            f'<marker id="{name}-{kind}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="11" markerHeight="11"'
            f' markerUnits="userSpaceOnUse" orient="auto-start-reverse">'
            f'<path d="M0,0 L10,5 L0,10 z" fill="var(--drawn-{kind})"/></marker>'
            for kind in sorted(self.kinds)
        )
        # Arrows before boxes, which they end at; crosses upon both.
        under = [arrow.drawn(name) for arrow in self.arrows]
        over = [thing.drawn() for thing in self.things]
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="drawn" role="img" aria-labelledby="{name}-title"'
                f' viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}">',
                f'<title id="{name}-title">{escape(self.title)}</title>',
                f"<style>\n{style()}</style>",
                f"<defs>{''.join(heads)}</defs>" if self.kinds else "",
                *over,
                *under,
                *words,
                "</svg>\n",
            ]
        )

    def _words(self) -> tuple[list[str], float]:
        y, found = self.height + 18, []
        for number, (kind, text) in enumerate(self.told, 1):
            found.append(numbered(number, kind, 19, y - 4.5))
            for line in textwrap.wrap(text, CHARACTERS):
                found.append(f'<text x="36" y="{y:g}">{escape(line)}</text>')
                y += LINE
            y += 5
        for line in textwrap.wrap(self.more, CHARACTERS + 4):
            found.append(f'<text x="10" y="{y:g}">{escape(line)}</text>')
            y += LINE
        return found, y - 4


# ---- the ways of a connection ----

CLIENT = Box(10, 14, 104, 46, "client", ["10.0.0.1"])
BALANCER = Box(250, 14, 120, 46, "load balancer", ["VIP 10.0.0.100"])
SERVER = Box(60, 190, 260, 50, "backend", ["its own address (DIP): 10.0.0.11"])

REDIRECT = Picture(
    "Redirection: the load balancer sees one SYN, client and backend speak directly",
    244,
    [CLIENT, BALANCER, SERVER],
    [
        Arrow("first", [(116, 37), (246, 37)], 1),
        Arrow("first", [(296, 62), (296, 186)], 2),
        Arrow("said", [(76, 188), (76, 64)], 3, at=0.35),
        Arrow("data", [(102, 66), (102, 184)], 4, both=True, at=0.35),
    ],
    [
        ("first", "SYN to the VIP. A TCP option offers: I can be redirected."),
        ("first", "The same SYN, to the DIP of the backend that was chosen; the option now names the VIP."),
        ("said", "SYN-ACK, from the DIP."),
        ("data", "All that follows, directly. The client's program goes on seeing the VIP as its peer."),
    ],
)

FALLBACK = Picture(
    "Fallback in one segment: the client's packets pass the load balancer, the answers do not",
    244,
    [CLIENT, BALANCER, Box(60, 190, 260, 50, "backend", ["has the VIP too, and tells nobody"])],
    [
        Arrow("data", [(116, 37), (244, 37)], 1),
        Arrow("data", [(296, 62), (296, 184)], 2),
        Arrow("data", [(90, 188), (90, 66)], 3),
    ],
    [
        (
            "data",
            "Every packet of a client that offers nothing, to the VIP. Of the first one user space decides; the others"
            " are forwarded by the XDP program alone.",
        ),
        ("data", "The same packet, in a frame to the backend's MAC address."),
        ("data", "Answers, from the VIP, directly: direct server return (DSR)."),
    ],
)

TUNNEL = Picture(
    "Fallback through a tunnel: the packet goes behind a gateway inside of another one",
    314,
    [
        CLIENT,
        BALANCER,
        Box(250, 132, 120, 44, "gateway", ["a router"]),
        Box(60, 260, 260, 50, "backend", ["in another subnet; has the VIP too"]),
        Packet(152, 46, "to VIP"),
        Packet(122, 84, "to DIP", "to VIP"),
        Packet(122, 206, "to DIP", "to VIP"),
        Packet(14, 150, "from VIP"),
    ],
    [
        Arrow("data", [(116, 34), (244, 34)], 1),
        Arrow("data", [(296, 62), (296, 126)], 2),
        Arrow("data", [(296, 178), (296, 254)], 2),
        Arrow("data", [(90, 258), (90, 66)], 3, at=0.25),
    ],
    [
        ("data", "Every packet of a client that offers nothing, to the VIP."),
        (
            "data",
            "The same packet inside of one to the DIP (IP in IP, over IPv4 or IPv6), which routers can carry; the"
            " backend's agent takes it out.",
        ),
        ("data", "Answers, from the VIP, directly."),
    ],
)

MPTCP = Picture(
    "MPTCP, backup: the server leads the client to the direct way, inside of the connection",
    244,
    [CLIENT, BALANCER, Box(60, 190, 260, 50, "backend", ["has the VIP, and its own address (DIP)"])],
    [
        Arrow("first", [(116, 37), (246, 37)], 1),
        Arrow("first", [(296, 62), (296, 186)], 2),
        Arrow("said", [(76, 188), (76, 64)], 3, at=0.35),
        Arrow("data", [(102, 66), (102, 184)], 4, both=True, at=0.35),
    ],
    [
        ("first", "SYN of an MPTCP socket (MP_CAPABLE) to the VIP. The client needs no agent."),
        ("first", "As it is, by the fallback."),
        (
            "said",
            "SYN-ACK from the VIP, then: no more subflows to this address; I am at the DIP, too (ADD_ADDR); this way is"
            " a backup (MP_PRIO).",
        ),
        (
            "data",
            "A second subflow (MP_JOIN), to the DIP: three and a half round trips after the SYN all data goes by it,"
            " both ways.",
        ),
    ],
    "The first way stays, and rests: data comes back to it if the direct one dies.",
)

LEAVE = Picture(
    "MPTCP, leave: once the direct way stands, the first one is closed",
    244,
    [
        CLIENT,
        BALANCER,
        Box(60, 190, 260, 50, "backend", ["has the VIP, and its own address (DIP)"]),
        Cross(206, 37),
        Cross(296, 124),
    ],
    [
        Arrow("lost", [(116, 37), (246, 37)], 2, at=0.28),
        Arrow("lost", [(296, 62), (296, 186)]),
        Arrow("data", [(90, 66), (90, 184)], 1, both=True),
    ],
    [
        ("data", "The second subflow, to the DIP, as before; it stands."),
        (
            "lost",
            "The agent's process on the backend closes the first one: the load balancer never sees the connection"
            " again, its close included.",
        ),
    ],
    "If the direct way dies there is no other: the connection hangs, as a redirected one does.",
)


def panel(y: float, head: str, balancer: Box, *things: Thing) -> list[Thing]:
    client = Box(10, y + 14, 76, 40, "client")
    server = Box(300, y + 14, 70, 40, "backend")
    return [Head(y, head), client, server, balancer, *things]


DEAD = Box(136, 34, 116, 40, "load balancer", ["dead"], gone=True)

DIES = Picture(
    "The load balancer dies: what becomes of open connections",
    436,
    [
        *panel(20, "Redirected", DEAD),
        *panel(
            128,
            "Fallback, the daemon dies",
            Box(136, 142, 116, 58, "XDP program", ["in the kernel; the", "daemon is dead"]),
        ),
        *panel(248, "Fallback, the machine dies", replace(DEAD, y=262), Cross(111, 282)),
        *panel(348, "MPTCP", replace(DEAD, y=362)),
    ],
    [
        Arrow("data", [(48, 76), (48, 90), (335, 90), (335, 80)], both=True),
        Arrow("data", [(88, 160), (130, 160)]),
        Arrow("data", [(254, 160), (294, 160)]),
        Arrow("data", [(335, 184), (335, 212), (48, 212), (48, 188)]),
        Arrow("lost", [(88, 282), (132, 282)]),
        Arrow("data", [(48, 404), (48, 418), (335, 418), (335, 408)], both=True),
    ],
    more=(
        "Redirected connections, and those of MPTCP that have the direct way, go on: their data does not pass there."
        " Those by fallback go on in the kernel while the daemon is dead; if the machine dies they hang, until another"
        " load balancer has the VIP, which finds the backend by the same hash. New connections wait for either."
    ),
)

TAKEOVER = Picture(
    "Takeover: a new process goes on where the old one was, and no packet is lost",
    288,
    [
        Box(14, 14, 140, 62, "old process", ["serves,", "then goes"], gone=True),
        Box(226, 14, 140, 62, "new process", ["starts up,", "then serves"]),
        Box(
            14,
            138,
            352,
            66,
            "kernel",
            ["AF_XDP sockets with the frames in their rings,", "XDP program, its maps and flows"],
        ),
        Box(130, 246, 120, 38, "network card"),
    ],
    [
        Arrow("said", [(224, 32), (160, 32)], 1),
        Arrow("said", [(156, 58), (220, 58)], 2),
        Arrow("lost", [(84, 134), (84, 80)], 4),
        Arrow("first", [(296, 134), (296, 80)], 3),
        Arrow("data", [(190, 242), (190, 208)], both=True),
    ],
    [
        ("said", "The new process asks the old one, on a UNIX socket of the machine."),
        (
            "said",
            "It gets the AF_XDP sockets themselves (SCM_RIGHTS), flows, counters, health, and changes at run time.",
        ),
        ("first", "It serves from the same rings: what has come meanwhile waited there."),
        ("lost", "The old process goes. If the new one fails before that, the old one goes on."),
    ],
    "Known flows by fallback are forwarded by the XDP program all the time; redirected connections never pass here.",
)

HOUSE = Picture(
    "The house: what is in which room; an arrow only goes down",
    440,
    [
        Box(10, 10, 172, 56, "cli  lab  doctor", ["people"]),
        Box(198, 10, 172, 56, "balancer", ["programs: import crablb"]),
        Box(10, 104, 172, 62, "control", ["the daemon's tasks: API,", "health, metrics, state"]),
        Box(198, 104, 172, 62, "agent", ["the endpoints: servers", "and clients"]),
        Box(10, 204, 172, 62, "dataplane", ["what the workers and the", "XDP program see"]),
        Box(214, 204, 128, 62, "selection", ["which backend"]),
        Box(10, 304, 360, 44, "kernel", ["libbpf, AF_XDP, netlink, pins"]),
        Box(10, 376, 172, 60, "native", ["the hot loop, in C: no", "allocation, no system call"]),
        Box(198, 376, 172, 60, "bpf", ["what runs in the kernel:", "lb, client, server, dsr"]),
    ],
    [
        Arrow("first", [(96, 66), (96, 100)]),
        Arrow("first", [(225, 66), (160, 100)]),
        Arrow("first", [(160, 66), (225, 100)]),
        Arrow("first", [(96, 166), (96, 200)]),
        Arrow("first", [(182, 235), (210, 235)]),
        Arrow("first", [(96, 266), (96, 300)]),
        Arrow("first", [(278, 166), (278, 200)]),
        Arrow("first", [(357, 166), (357, 300)]),
        Arrow("first", [(96, 348), (96, 372)]),
        Arrow("first", [(284, 348), (284, 372)]),
    ],
    more="Plain values (model, options, config, ...) are the ground that all may stand on.",
)

PICTURES = {
    "redirect": REDIRECT,
    "fallback": FALLBACK,
    "tunnel": TUNNEL,
    "mptcp": MPTCP,
    "leave": LEAVE,
    "dies": DIES,
    "takeover": TAKEOVER,
    "house": HOUSE,
}


def write(folder: Path) -> Iterable[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        (path := folder / f"{name}.svg").write_text(picture.svg(name))
        yield path


if __name__ == "__main__":
    for path in write(FOLDER):
        print(path)
