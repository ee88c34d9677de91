"""The hot loop by itself: what a SYN costs, and of what."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from crablb._native import lib

from bench import bypass
from bench.context import Context, Unavailable, one_cpu
from bench.figures import Curve, Plot, Row, Suite, Table, Target
from bench.redirect import Hop, Redirect
from crablb.model import CONSISTENT, Address, Hashing, Vip
from crablb.model import POLICIES as BUILTIN
from crablb.selection.custom import CHOICE, Asked, Custom
from crablb.selection.loads import Backends, Balance

#: Rings of frames, as hotloop.c has them: their length says which caches hold them.
RINGS = {"64 frames": ["64"], "4,096 frames": ["4096"], "128 MiB of frames": ["65536"], "flushed": ["4096", "flush"]}
USUAL = "4,096 frames"
FAMILIES = (4, 6)
VIPS: dict[int, Address] = {4: IPv4Address("10.0.0.100"), 6: IPv6Address("fd00::100")}
BACKENDS = 1000
SEED = bytes(16)
CALLGRIND_BATCHES = 50


def run(context: Context) -> Suite:
    suite = Suite("micro", "The hot loop")
    with one_cpu() as cpu:
        suite.notes.append(f"All of it runs on CPU {cpu}, but for what needs two.")
        measure(context, suite, suite.tables.append)
    two = part(suite, lambda: queues(context))
    if two:
        suite.tables.append(two)
    suite.targets = targets(suite)
    suite.plots.append(plot(suite))
    return suite


def part(suite: Suite, measured: Callable[[], Table]) -> Table | None:
    """A table, or a reason why there is none."""
    try:
        return measured()
    except Unavailable as reason:
        suite.left_out.append(str(reason))
        return None


def measure(context: Context, suite: Suite, add: Callable[[Table], None]) -> None:
    for measured in (syn, stages, instructions, scale, flows, policies, tables, disruption, checksum, python, bypassed):
        table = part(suite, lambda measured=measured: measured(context))  # type: ignore[misc]
        if table:
            add(table)


def hotloop(context: Context, *arguments: str) -> Callable[[], dict[str, float]]:
    program = context.make("hotloop")
    return lambda: context.json(program, *arguments)


def rounds(context: Context, most: int = 9) -> int:
    return context.pick(most, 3, 1)


# ---- a SYN ----


def syn(context: Context) -> Table:
    """The bare loop, crablb and the XDP program, in turn."""
    table = Table(
        "micro-syn", "A SYN, ns", "ns", note=(
            "Bare: what any redirect has to do (parse, keyed hash, Maglev, move the headers, put in the option, "
            "incremental checksums), for one kind of frame and without checking anything. Moved: the headers moved and "
            "no more. The XDP program does the same redirect in the kernel, without verifying checksums and without a "
            "flow cache, under BPF_PROG_TEST_RUN; what renewing its frame takes is taken off. Every SYN is a new "
            "connection; 1,000 backends, a flow cache of 2^20 entries. Flushed: frames, table and backends are in no "
            "cache."
        )
    )  # fmt: skip
    rings = RINGS if context.size != "tiny" else {USUAL: RINGS[USUAL]}
    for family in FAMILIES:
        with Redirect(context.bpf("redirect"), {Vip(VIPS[family], 80): hops(family)}, SEED) as redirect:
            subjects: dict[str, Callable[[], Mapping[str, float]]] = {
                name: hotloop(context, "syn", str(family), *ring) for name, ring in rings.items()
            }
            subjects["XDP"] = in_kernel(redirect, family, context.pick(1_000_000, 200_000, 1000))
            found = context.in_turn(f"a SYN, IPv{family}", subjects, rounds(context))
        for name in rings:
            bare = f"bare C loop, IPv{family}, {name}"
            table.rows.append(named(found["bare"][name], bare))
            table.rows.append(named(found["crablb"][name], f"crablb, IPv{family}, {name}", bare))
            table.rows.append(named(found["moved"][name], f"headers moved, IPv{family}, {name}", bare))
        usual = f"bare C loop, IPv{family}, {USUAL}"
        table.rows.append(named(found["net"]["XDP"], f"XDP program, IPv{family}", usual))
        table.rows.append(named(found["gross"]["XDP"], f"XDP program with its harness, IPv{family}", usual))
    return table


def named(row: Row, name: str, baseline: str = "", note: str = "") -> Row:
    return Row(name, row.samples, baseline, note, row.disturbed)


def hops(family: int) -> list[Hop]:
    first = int(ip_address("10.1.0.0" if family == 4 else "fd00::1:0"))
    return [Hop(type(VIPS[family])(first + i), bytes(6), bytes(6)) for i in range(BACKENDS)]


def frame(family: int) -> bytes:
    """The SYN that Linux sends, with an offer; nobody looks at its checksums."""
    options = bytes.fromhex("020405b40402080a000000010000000001030307") + bytes([42, 2, 1, 1])
    tcp = b"\x04\x00\x00\x50" + bytes(8) + bytes([11 << 4, 2]) + b"\xff\xff\x12\x34\x00\x00" + options
    if family == 4:
        ip = bytes.fromhex("4500004000000000400600000a090001") + VIPS[4].packed
        return bytes(12) + b"\x08\x00" + ip + tcp
    ip = bytes.fromhex("60000000002c0640") + ip_address("fd09::1").packed + VIPS[6].packed
    return bytes(12) + b"\x86\xdd" + ip + tcp


def in_kernel(redirect: Redirect, family: int, repeat: int) -> Callable[[], dict[str, float]]:
    redirect.test_frame(frame(family), v6=family == 6)

    def measured() -> dict[str, float]:
        before = redirect.counts()["redirected"]
        gross = redirect.object.program("renewed").test_run(frame(family), repeat=repeat).duration_ns
        assert redirect.counts()["redirected"] - before == repeat
        harness = redirect.object.program("harness").test_run(frame(family), repeat=repeat).duration_ns
        return {"gross": gross, "net": gross - harness}

    return measured


# ---- parts ----


def stages(context: Context) -> Table:
    """Sums of these are less than the whole: parts by themselves overlap with nothing and wait for nothing."""
    subjects = {f"IPv{family}": hotloop(context, "stages", str(family)) for family in FAMILIES}
    found = context.in_turn("stages", subjects, rounds(context))
    rows = [named(row, f"{stage}, {family}") for stage, families in found.items() for family, row in families.items()]
    return Table(
        "micro-stages", "Parts of the work, each by itself, ns", "ns", rows,
        note="Options: the search, which a list that has come before in the same form is spared.",
    )  # fmt: skip


def instructions(context: Context) -> Table:
    """By callgrind: the same in every run."""
    rows = []
    for family in FAMILIES:
        for where, count in callgrind(context, family).items():
            rows.append(Row(f"IPv{family}, {where}", [count]))
    return Table(
        "micro-instructions", "Instructions for a SYN, by file", "instructions", rows,
        note="callgrind, in crab_core_batch and all that it calls, 64 SYNs a batch.",
    )  # fmt: skip


def callgrind(context: Context, family: int, way: str = "redirect") -> dict[str, float]:
    """Instructions for each packet (``way``: as hotloop.c's batches has it): ``all``, and by source file."""
    valgrind, annotate = context.tool("valgrind"), context.tool("callgrind_annotate")
    with TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        context.output(
            valgrind, "--tool=callgrind", f"--callgrind-out-file={out}", "--toggle-collect=crab_core_batch",
            context.make("hotloop"), "batches", str(family), str(CALLGRIND_BATCHES), way,
        )  # fmt: skip
        return by_file(context.output(annotate, "--threshold=100", out), CALLGRIND_BATCHES * lib.CRAB_BATCH)


def by_file(annotated: str, syns: int) -> dict[str, float]:
    """What callgrind_annotate says, for each SYN; files of less than one instruction a SYN are left out."""
    total = re.search(r"^ *([\d,]+) \(100\.0%\)  PROGRAM TOTALS", annotated, re.MULTILINE)
    if not total:
        raise Unavailable("callgrind_annotate says something else than expected")
    found: dict[str, float] = {}
    for count, file in re.findall(r"^ *([\d,]+) \( *[\d.]+%\)  \S*?([\w-]+\.[ch]):", annotated, re.MULTILINE):
        found[file] = found.get(file, 0) + int(count.replace(",", "")) / syns
    found = dict(sorted(found.items(), key=lambda item: -item[1]))
    return {"all": int(total[1].replace(",", "")) / syns} | {name: n for name, n in found.items() if n >= 1}


def scale(context: Context) -> Table:
    sizes = {
        "2 backends, 1 service, 1,000 flows": ["2", "1", "1000"],
        "10,000 backends, 1,000 services, 1,000,000 flows": ["10000", "1000", "1000000"],
    }
    found = context.in_turn(
        "scale", {name: hotloop(context, "scale", *size) for name, size in sizes.items()}, rounds(context, 11)
    )["crablb"]
    small, large = found.values()
    return Table("micro-scale", "A SYN by the size of the configuration, ns", "ns", [small, large], baseline=small.name)


def flows(context: Context) -> Table:
    subjects = {
        f"{count:,} flows": hotloop(context, "scale", str(BACKENDS), "1", str(count)) for count in (10**3, 10**5, 10**6)
    }
    rows = list(context.in_turn("flow cache", subjects, rounds(context))["crablb"].values())
    return Table("micro-flows", "A SYN by the size of a full flow cache, ns", "ns", rows, baseline=rows[0].name)


def policies(context: Context) -> Table:
    names = [name for name in BUILTIN if name not in CONSISTENT]
    found = context.in_turn("policies", {name: hotloop(context, "policy", name) for name in names}, rounds(context))
    rows = []
    for name in names:
        base = named(found["maglev"][name], f"maglev, in turn with {name}")
        refresh = f"its loads: {found['refresh'][name].median:.0f} us, ten times a second, by another thread"
        rows += [base, named(found["policy"][name], name, base.name, refresh)]
    return Table("micro-policies", "A SYN by policy, 1,000 backends, ns", "ns", rows)


def prefix(hashing: Hashing) -> str:
    return "" if hashing is Hashing.MAGLEV else f"{hashing.value}, "


def made(context: Context) -> dict[str, Callable[[], dict[str, float]]]:
    """Makers of tables for 1,000 backends."""
    return {
        f"{prefix(hashing)}{size:,} entries": hotloop(context, "table", hashing.value, str(size), str(BACKENDS))
        for hashing in Hashing
        for size in (65537, 655373)
    }


def tables(context: Context) -> Table:
    rows = list(context.in_turn("tables", made(context), rounds(context))["ms"].values())
    return Table(
        "micro-maglev",
        "A table for 1,000 backends, Maglev's if it does not say otherwise, ms",
        "ms",
        rows,
        note="Maglev's paper: 1.8 and 22.9 ms.",
    )


def disruption(context: Context) -> Table:
    rows = []
    for name, make in made(context).items():
        found = make()
        rows += [
            Row(f"{name}, a backend fails or is drained", [found["disruption"]]),
            Row(f"{name}, a backend leaves the configuration", [found["removal"]]),
            Row(f"{name}, the most that one has, by its share", [found["most"]]),
            Row(f"{name}, the least that one has, by its share", [found["least"]]),
        ]
    return Table(
        "micro-disruption", "Entries that change when one of 1,000 backends goes, by how many were its own", "", rows,
        note="1 is the least there can be.",
    )  # fmt: skip


def checksum(context: Context) -> Table:
    subjects = {f"{size:,} bytes": hotloop(context, "checksum", str(size)) for size in (20, 44, 64, 256, 1460)}
    rows = list(context.in_turn("checksum", subjects, rounds(context))["ns"].values())
    return Table("micro-checksum", "A checksum, ns", "ns", rows)


# ---- Python ----


def by_hash(batch: npt.NDArray[np.void], backends: Backends) -> npt.NDArray[np.uint64]:
    chosen: npt.NDArray[np.uint64] = batch["hash"] % len(backends)
    return chosen


def by_connections(batch: npt.NDArray[np.void], backends: Backends) -> npt.NDArray[np.uint64]:
    """Of two backends by the connection's hash, the one with fewer connections."""
    connections, hashes = backends.connections, batch["hash"]
    one, other = hashes % len(backends), (hashes >> np.uint64(32)) % len(backends)
    return np.where(connections[one] <= connections[other], one, other)


def python(context: Context) -> Table:
    """All that happens in Python for a batch: the call, the policy, the check of its answer, what was assigned."""
    batches = np.zeros((100, lib.CRAB_BATCH), CHOICE)
    batches["hash"] = np.random.default_rng(1).integers(0, 2**64, batches.shape, np.uint64)
    count = context.pick(5000, 2000, 50)
    vip = Vip(VIPS[4], 80)

    def subject(policy: Callable[..., npt.NDArray[np.uint64]], size: int) -> Callable[[], dict[str, float]]:
        def failed(_: Vip, reason: str) -> None:
            raise AssertionError(reason)

        addresses = [IPv4Address(0x0A000000 + i) for i in range(size)]
        custom = Custom(failed)
        backends = Balance().backends(vip, dict.fromkeys(addresses, 1))
        custom.publish({0: Asked(vip, policy, backends, np.arange(size, dtype=np.uint16))})

        def measured() -> dict[str, float]:
            start = time.perf_counter()
            for i in range(count):
                custom.choose(batches[i % 100])
            return {"rate": lib.CRAB_BATCH * count / (time.perf_counter() - start) / 1e6}

        return measured

    subjects = {
        f"{what}, {size:,} backends": subject(policy, size)
        for what, policy in (("by the hash", by_hash), ("the less loaded of two", by_connections))
        for size in (10, 1000)
    }
    rows = list(context.in_turn("policies in Python", subjects, rounds(context))["rate"].values())
    return Table("micro-python", "Decisions of a policy in Python, millions a second", "10^6/s", rows, better="higher")


# ---- beside the hot loop ----


def bypassed(context: Context) -> Table:
    """Known fallback flows, which the XDP program forwards by itself."""
    counts = context.pick([1_000, 100_000, 1_000_000], [1_000], [1_000])
    rows: list[Row] = []
    with bypass.Programs(context) as programs:
        for count in counts:
            for tunnel in (False, True):
                with programs.loaded(count, tunnel) as subject:
                    found = context.in_turn(
                        f"bypass, {count:,} flows", subject.subjects(context), context.pick(5, 2, 1)
                    )
                what = f"{count:,} flows, {'IP in IP' if tunnel else 'by MAC address'}"
                base = named(found["ns"]["MAC only"], f"MAC addresses and no more, beside {what}")
                rows += [base, named(found["ns"]["ours"], what, base.name)]
    return Table(
        "micro-bypass", "A packet of a known fallback flow in the XDP program, cold, ns", "ns", rows,
        note="BPF_PROG_TEST_RUN, one packet of a random flow at a time; between two the caches are used by others.",
    )  # fmt: skip


def queues(context: Context) -> Table:
    if len(os.sched_getaffinity(0)) < 2:
        raise Unavailable("two queues on two cores: there is one core")
    subjects = {
        name: hotloop(context, "threads", n) for name, n in (("one queue, one core", "1"), ("two, on two", "2"))
    }
    rows = list(context.in_turn("two queues", subjects, rounds(context))["rate"].values())
    return Table("micro-queues", "SYNs by queues, millions a second", "10^6/s", rows, "higher", rows[0].name)


# ---- judgement ----


def targets(suite: Suite) -> list[Target]:
    found: list[Target] = []
    tables = {table.key: table for table in suite.tables}
    if "micro-syn" in tables:
        found.append(p1(tables["micro-syn"], tables.get("micro-instructions")))
    if "micro-scale" in tables:
        table = tables["micro-scale"]
        ratio = statistics.median(table.ratio(table.rows[1]))
        few, many = (row.median for row in table.rows)
        flows = [row.median for row in tables["micro-flows"].rows] if "micro-flows" in tables else [0.0]
        why = (
            f"{many - few:.0f} ns, of which {flows[-1] - flows[0]:.0f} for a flow cache that is larger than the CPU's "
            "caches: each SYN takes one line of it from memory"
        )
        found.append(Target("P7", f"{ratio:.2f} times", ratio <= 1.3, "" if ratio <= 1.3 else why))
    if "micro-maglev" in tables and "micro-disruption" in tables:
        found.append(p8(tables["micro-maglev"], tables["micro-disruption"]))
    if "micro-queues" in tables:
        table = tables["micro-queues"]
        ratio = statistics.median(table.ratio(table.rows[1]))
        why = "" if ratio >= 1.8 else "the two CPUs are not two whole cores"
        found.append(Target("P9", f"{ratio:.2f} times", ratio >= 1.8, why))
    return found


def p8(made: Table, changed: Table) -> Target:
    """By the larger table, what it asks for; and by the default one."""

    def of(table: Table, name: str) -> float:
        row = table.row(name)
        assert row
        return row.median

    told, reached = [], False
    for hashing in (h for h in Hashing if made.row(f"{prefix(h)}65,537 entries")):
        small, large = (f"{prefix(hashing)}{size:,} entries" for size in (65537, 655373))
        ms = of(made, small), of(made, large)
        moves = [of(changed, f"{each}, a backend leaves the configuration") for each in (small, large)]
        told.append(f"{hashing.value} {ms[0]:.2f} ms, {ms[1]:.1f} ms; {moves[0]:.1f} and {moves[1]:.1f} times")
        reached |= ms[0] <= 2 and ms[1] <= 25 and moves[1] <= 1.5
    return Target(
        "P8", "; ".join(told), reached, "" if reached else "none of the tables is made as fast, and moves as few"
    )


def p1(table: Table, counted: Table | None) -> Target:
    bare, xdp = {}, {}
    for family in FAMILIES:
        ours, base = table.row(f"crablb, IPv{family}, {USUAL}"), table.row(f"XDP program, IPv{family}")
        assert ours and base
        bare[family] = statistics.median(table.ratio(ours))
        xdp[family] = ours.over(base)
    value = ", ".join(f"IPv{f}: {bare[f]:.2f} times the bare loop, {xdp[f]:.2f} of the XDP program" for f in FAMILIES)
    reached = max(bare.values()) <= 1.8 and max(xdp.values()) <= 0.5
    why = ""
    if not reached and counted and counted.rows:
        row = counted.row("IPv4, all")
        why = f"{row.median:.0f} instructions a SYN, which no cache miss delays: " if row else ""
        why += "verifying both checksums, the option list and the flow cache are what the bare loop does not do"
    return Target("P1", value, reached, why)


def plot(suite: Suite) -> Plot:
    """Bars of the usual ring."""
    table = suite.table("micro-syn")
    curves = []
    names = ["bare C loop", "crablb", "XDP program"]
    for family in FAMILIES if table else ():
        rows = [table.row(f"{names[0]}, IPv{family}, {USUAL}"), table.row(f"{names[1]}, IPv{family}, {USUAL}"),
                table.row(f"{names[2]}, IPv{family}")] if table else []  # fmt: skip
        there = [row for row in rows if row]
        curves.append(Curve.of(f"IPv{family}", there))
    return Plot("micro-syn", "A SYN, without the network card", "", "ns", curves, "bars", names)
