"""What is said of an agent that is half in the kernel: that it starts, or that it is broken."""

from __future__ import annotations

from crablb.agent.base import Agent
from crablb.kernel import pins


class Half(Agent):
    role = "half"

    @classmethod
    def state(cls):
        return {"vips": ["tcp://10.0.0.100:80"], "cgroup": "/"}

    @classmethod
    def counters(cls):
        return {"seen": 1}

    @classmethod
    def _sync(cls, *, mend):
        return ["its pins are gone"]


def said():
    status = Half.status()
    return status["starting"], status["faults"], status["counters"]


def test_who_starts_is_not_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(pins, "RUN", tmp_path)
    broken = False, ["its pins are gone"], {"seen": 1}
    assert said() == broken
    with Half.owned():
        with Half._starting():
            assert said() == (True, [], {})
        assert said() == broken
    with Half._starting():  # nobody is at it any more
        assert said() == broken
    assert said() == broken
