"""Who else could have written what is obeyed: modules of policies, a configuration that names programs, those programs.

Whoever can write what root imports or runs, or can put something else in its place, is root.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path
from types import ModuleType
from typing import Any

from crablb.errors import ConfigError

__all__ = ["beside", "others", "writer"]

LINKS = 40  # in one path, as the kernel has it


def others(found: os.stat_result) -> str:
    """Who beside root and this process' user may write it, in words; empty: nobody."""
    if found.st_uid not in (0, os.geteuid()):
        return f"it is user {found.st_uid}'s"
    if found.st_mode & 0o022:
        return f"others can write it (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def writer(path: Path | str) -> str:
    """Who else may write what is at a path, or put something else there: the file, folder or link that lets him, and
    why; empty: nobody.

    Of a folder above with the sticky bit (/tmp) only what it holds matters: others can add to it, and replace nothing.
    What is mounted to be read only is written by nobody here.
    """
    try:
        return _writer(list(_way(Path(path))))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"{path}: cannot be looked at: {getattr(error, 'strerror', None) or error}"


def _writer(steps: list[Path]) -> str:
    for step in steps:
        found = step.lstat()
        if os.statvfs(step).f_flag & os.ST_RDONLY:
            continue
        if stat.S_ISLNK(found.st_mode):  # has no mode of its own
            why = "" if found.st_uid in (0, os.geteuid()) else others(found)
        elif step != steps[-1] and found.st_mode & stat.S_ISVTX and found.st_uid in (0, os.geteuid()):
            why = ""
        else:
            why = others(found)
        if why:
            return f"{step}: {why}"
    return ""


def _way(path: Path) -> Iterator[Path]:
    """All that leads to a file: folders, links and those that links lead through, from the root on; itself last."""
    here, left, links = Path("/"), list(reversed((Path.cwd() / path).parts[1:])), 0
    yield here
    while left:
        name = left.pop()
        here = here.parent if name == ".." else here / name
        yield here
        if here.is_symlink():
            links += 1
            if links > LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = here.readlink()
            here = Path("/") if target.is_absolute() else here.parent
            left += reversed(target.parts[target.is_absolute() :])


def remedy(why: str) -> str:
    """What to do about what :func:`writer` says."""
    path = why.partition(": ")[0]
    return f"chown -h root {path}; chmod go-w {path}"


# ---- modules ----


class _Finder(FileFinder):
    """Of modules in a folder beside a configuration: finds none that others could have written."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = super().find_spec(fullname, target)
        # Its compiled form is taken in its place; a package without a file of its own is its folders.
        parts = [spec.origin, spec.cached, *(spec.submodule_search_locations or ())] if spec else []
        for step in dict.fromkeys(step for part in parts if part for step in (Path(part), Path(part).parent)):
            if os.path.lexists(step) and (why := writer(step)):
                user = os.geteuid()
                raise ConfigError(f"module {fullname!r}: {why}, and it would be run as user {user}; {remedy(why)}")
        return spec


_LOADERS: tuple[Any, ...] = (
    (ExtensionFileLoader, EXTENSION_SUFFIXES),
    (SourceFileLoader, SOURCE_SUFFIXES),
    (SourcelessFileLoader, BYTECODE_SUFFIXES),
)
_folders: set[str] = set()


def _hook(path: str) -> _Finder:
    if not any(Path(path).is_relative_to(folder) for folder in _folders):
        raise ImportError
    return _Finder(path, *_LOADERS)


def beside(folder: Path) -> None:
    """Modules may be imported from a folder, after all others: those that nobody else could have written."""
    if str(folder) not in sys.path:
        _folders.add(str(folder))
        if _hook not in sys.path_hooks:
            sys.path_hooks.insert(0, _hook)
        sys.path.append(str(folder))
