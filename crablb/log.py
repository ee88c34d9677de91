"""Structured logs: readable on a terminal, JSON lines everywhere else, always on standard error."""

from __future__ import annotations

import logging
import sys

import structlog

_always: dict[str, object] = {}


def always(**what: object) -> None:
    """Have this in every line of this process from now on."""
    _always.update(what)


def _add_always(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {**_always, **event}


def to_standard_error() -> None:
    """As structlog has it, but there, unless the program has configured it: standard output is the program's."""
    if not structlog.is_configured():
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


def set_up(level: str = "info") -> None:
    """``level``: debug, info, warning or error."""
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer(default=str)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _add_always,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
