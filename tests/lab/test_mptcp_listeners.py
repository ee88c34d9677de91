"""``agent server --mptcp-listeners``: programs that know nothing of MPTCP listen by it, where the kernel allows it."""

from __future__ import annotations

from pathlib import Path

from crablb.agent import sockets
from crablb.kernel import bpf
from crablb.lab.demo import VIPS
from tests.helpers.mptcp import Ends, prepare_client
from tests.helpers.world import agent_status, command

VIP_OPTIONS = ("--vip", VIPS[0])


def test_programs_listen_by_mptcp(make_world, capfd):
    world = make_world(servers=2, offload=False)
    one, other = world.lab.servers
    arguments = ("agent", "server", *VIP_OPTIONS, "--detach", "--cgroup", str(one.cgroup), "--mptcp-listeners")
    command(one, *arguments, expected=2)
    assert "--mptcp-listeners: of use with --mptcp only" in capfd.readouterr().err
    if refused := sockets.problems():
        command(one, *arguments, "--mptcp", expected=2)
        said = capfd.readouterr().err
        assert refused[0] in said
        assert "Traceback" not in said
        assert "start programs by: mptcpize run" in refused[0]
        assert agent_status(one) == {}
        assert one.run("ip", "mptcp", "endpoint").stdout == ""
        return
    command(one, *arguments, "--mptcp")
    prepare_client(world.lab.client)
    ends = Ends(world)
    ends.servers(protocol="tcp")
    for server, multipath in ((one, True), (other, False)):  # no program of another node's is concerned
        held = ends.hold(server.ip4)
        assert held.tell("about")["mptcp_there"] is multipath
        assert held.tell("up", 100000)
    # What is lost is told and mended; what goes with the agent is gone.
    (Path(one.pins) / "server" / sockets.LINK).unlink()
    assert "MPTCP sockets is not attached" in agent_status(one, 1)["server"]["faults"][0]
    assert "mended; it was: the program that gives programs MPTCP sockets" in command(one, "agent", "repair")
    command(one, "agent", "remove", "server", "--now")
    ends.servers(port=81, protocol="tcp")
    assert not ends.hold(one.ip4, port=81).tell("about")["mptcp_there"]
    assert not any(program.name == sockets.PROGRAM for program in bpf.programs())
