"""Signals that are waited for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crablb.kernel.signals import caught
from tests.helpers.processes import ROOT, answer, until

AWAITED = {signal.SIGUSR1, signal.SIGRTMIN}


@pytest.fixture(autouse=True)
def blocked():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("number", sorted(AWAITED))
def test_one_that_comes(number):
    signal.pthread_kill(threading.get_ident(), number)
    assert caught(AWAITED, 60) == number


def test_none_that_comes():
    assert caught(AWAITED, 0.01) == 0
    assert caught(AWAITED, 0) == 0


def test_a_process_that_was_stopped_until_its_time_was_over():
    """It has been told nothing; what it is told meanwhile it hears."""
    code = """
import signal
from crablb.kernel.signals import caught
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print("ready", flush=True)
while True:
    print(caught({signal.SIGUSR1}, 0.2), flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert answer(child) == "ready"
        heard = []
        for told in (False, True):
            assert answer(child) == "0"
            child.send_signal(signal.SIGSTOP)
            until(lambda: Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
            time.sleep(0.4)  # what it waits for is over
            if told:
                child.send_signal(signal.SIGUSR1)
            child.send_signal(signal.SIGCONT)
            heard += [answer(child) for _ in range(3)]
        assert set(heard) == {"0", str(int(signal.SIGUSR1))}
    finally:
        child.kill()
        child.communicate()
