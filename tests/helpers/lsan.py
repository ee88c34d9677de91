"""LeakSanitizer over an unmodified interpreter: a pytest plugin (``-p tests.helpers.lsan``) for one that ``liblsan`` is
preloaded into, with ``PYTHONMALLOC=malloc``.

It looks once, when the last test is done and all modules are there yet: what nothing points at then is lost.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT

__all__ = ["environment", "lost"]

#: Whose memory it is: who has called the allocator.  CPython's own, which loses some, is another matter.
OURS = re.compile(
    r"^\s+#1 \S+ in \S+ native/|^\s+#1 .*/(_native|_libbpf)[^/]*\.so|^\s+#1 .*/lib(bpf|elf)[.-]", re.MULTILINE
)


def environment(report: Path) -> dict[str, str]:
    """For the interpreter; what is found goes to ``report``, with the process's id behind its name."""
    library = subprocess.run(["gcc", "-print-file-name=liblsan.so"], check=True, capture_output=True, text=True)
    # Frame pointers are where there are none: that which calls the allocator is all that is known, and enough.
    options = f"leak_check_at_exit=0:malloc_context_size=2:log_path={report}"
    return {**os.environ, "LD_PRELOAD": library.stdout.strip(), "PYTHONMALLOC": "malloc", "LSAN_OPTIONS": options}


def lost(folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Run pytest so: its exit status, what was lost of ours (LeakSanitizer's paragraphs), and what it printed."""
    report = folder / "lsan"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.helpers.lsan", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, env=environment(report), capture_output=True, text=True, check=False,
    )  # fmt: skip
    text = "".join(path.read_text() for path in folder.glob("lsan.*"))
    return done.returncode, [part for part in text.split("\n\n") if OURS.search(part)], done.stdout + done.stderr


def pytest_sessionfinish() -> None:
    gc.collect()
    look = ctypes.CDLL(None).__lsan_do_recoverable_leak_check
    print(f"LeakSanitizer has {'found something' if look() else 'found nothing'}", flush=True)
