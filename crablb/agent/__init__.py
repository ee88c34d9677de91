"""The endpoints of connection redirection on an unmodified kernel: what servers and clients run.

An agent puts its eBPF programs into the kernel and keeps them pinned, so that they work with or without a process.
"""

from crablb.agent.client import ClientAgent
from crablb.agent.server import ServerAgent

__all__ = ["ClientAgent", "ServerAgent"]
