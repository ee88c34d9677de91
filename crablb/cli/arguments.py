"""Arguments that commands without a running load balancer have in common."""

from __future__ import annotations

import argparse

__all__ = ["add_interfaces"]


def add_interfaces(parser: argparse._ActionsContainer, says: str, *, required: bool = False) -> None:
    """``--iface``, again and again."""
    parser.add_argument(
        "--iface",
        "--interface",
        dest="interfaces",
        action="append",
        default=[],
        required=required,
        metavar="IF",
        help=f"{says}; repeatable",
    )
