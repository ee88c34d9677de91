#!/usr/bin/env python3
"""A load balancer inside an asyncio program: it reads commands, and tells what happens.

In a lab (``crablb lab up``; servers and client as in the README):

    crablb lab exec lb -- python examples/embedded.py eth0 tcp://10.0.0.100:80=10.0.0.11,10.0.0.12

Commands: ``drain ADDRESS``, ``up ADDRESS``, ``weight ADDRESS NUMBER``, ``show``; the end of the input, or
SIGTERM, stops it.
"""

import asyncio
import signal
import sys
from ipaddress import ip_address

from crablb import ConfigError, CrablbError, LoadBalancer, State


async def obey(lb: LoadBalancer, line: str) -> None:
    """Do what a line says; what cannot be done is said, and changes nothing."""
    vip = lb.services[0].vip
    match line.split():
        case ["drain", address]:
            lb.drain(vip, ip_address(address))
        case ["up", address]:
            lb.set_state(vip, ip_address(address), State.UP)
        case ["weight", address, number]:
            lb.set_weight(vip, ip_address(address), int(number))
        case ["show"]:
            print(f"{lb.statistics().workers['redirected']} connections were redirected", flush=True)
        case _:
            print("drain ADDRESS, up ADDRESS, weight ADDRESS NUMBER, show", flush=True)


async def tell(lb: LoadBalancer) -> None:
    async for event in lb.events():
        print(f"{event.kind} {event.backend or ''} {event.reason}".strip(), flush=True)


async def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("embedded.py INTERFACE VIP=BACKEND,...")
    interface, service = sys.argv[1:]
    async with LoadBalancer(interface, [service]) as lb:
        print(f"serving {lb.services[0].vip}", flush=True)
        telling = asyncio.create_task(tell(lb))
        lines = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        loop.add_signal_handler(signal.SIGTERM, lines.feed_eof)  # else what is in the kernel would stay there
        while line := (await lines.readline()).decode():
            try:
                await obey(lb, line)
            except (ConfigError, ValueError) as error:
                print(f"not done: {error}", flush=True)
        telling.cancel()
        print(f"{lb.statistics().workers['redirected']} connections were redirected", flush=True)


if __name__ == "__main__":
    # Without this SIGTERM would end the program at once, and leave in the kernel what is there: like SIGKILL.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
    except CrablbError as error:
        sys.exit(str(error))
