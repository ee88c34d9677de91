"""``python -m crablb.lab.listening nginx ...``: an unmodified nginx that listens by MPTCP.

It takes over sockets that listen already, as from an nginx that it replaces: environment variable NGINX names them
(src/core/nginx.c: ngx_add_inherited_sockets); and it stays in the foreground.
"""

from __future__ import annotations

import os
import socket
import sys

from crablb.lab.downloading import IPPROTO_MPTCP

BACKLOG = 511  # nginx's own


def main(*command: str) -> None:
    passed = ""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        sock = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, 80))
        sock.listen(BACKLOG)
        os.set_inheritable(fd := sock.detach(), True)
        passed += f"{fd};"
    print("listening", flush=True)
    os.execvpe(command[0], command, {**os.environ, "NGINX": passed})


if __name__ == "__main__":
    main(*sys.argv[1:])
