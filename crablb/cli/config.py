"""``crablb config``: configuration files, without a load balancer."""

from __future__ import annotations

import argparse

from crablb import reference
from crablb.cli import check as checking


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("config", help="check a configuration file, or print an example of one")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")

    check = actions.add_parser("check", help=checking.HELP)
    checking.add_arguments(check)

    example = actions.add_parser("example", help="print a file with every option, explained")
    example.set_defaults(run=run_example)
    page = actions.add_parser("reference", help="print the reference of all options, as Markdown")
    page.set_defaults(run=run_reference)
    shape = actions.add_parser("schema", help="print the JSON Schema of files, for editors")
    shape.set_defaults(run=run_schema)
    description = actions.add_parser("openapi", help="print the description of the API of a running load balancer")
    description.set_defaults(run=run_openapi)


def run_openapi(_: argparse.Namespace) -> int:
    import msgspec

    from crablb.control.admin.openapi import describe

    print(msgspec.json.format(msgspec.json.encode(describe()), indent=2).decode())
    return 0


def run_example(_: argparse.Namespace) -> int:
    print(reference.example(), end="")
    return 0


def run_reference(_: argparse.Namespace) -> int:
    print(reference.reference(), end="")
    return 0


def run_schema(_: argparse.Namespace) -> int:
    from crablb import schema

    print(schema.text(), end="")
    return 0
