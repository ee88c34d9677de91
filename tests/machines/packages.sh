# What is done in a root (packages.py): functions for sh -eu, in the folder with the packages.

# A network namespace with an interface, which nobody else has: /run is this root's alone.
network() {
    ip netns add packages
    ip -n packages link add eth0 type veth peer eth1
    ip -n packages link set eth0 up
    ip -n packages link set eth1 up
    ip -n packages addr add 10.0.0.2/24 dev eth0
}

# Its network, and the root's own /sys, where pins are.
there() { nsenter --net=/run/netns/packages "$@"; }

# Serve, in the background, as $daemon.
serve() {
    # Not by there(), whose shell would be what is killed.
    nsenter --net=/run/netns/packages "$1" serve --iface eth0 --service tcp://10.0.0.100:80=10.0.0.11 > serve.log 2>&1 &
    daemon=$!
    tries=0
    while :; do
        status=0
        there "$1" status --iface eth0 > status.log 2>&1 || status=$?
        [ $status -gt 1 ] || break # 1: it serves, and says that its backend does not answer
        tries=$((tries + 1))
        [ $tries -lt 60 ] || { cat serve.log status.log; exit 1; }
        sleep 1
    done
}

# Of a command that must fail: a ! in front of it would not end the shell.
no() {
    if "$@"; then
        echo "this should have failed: $*"
        exit 1
    fi
}

xdp() { ip -n packages -d link show eth0 | grep xdp; }

# All that a compiler, or a library that is not inside, would be: nothing of it is here.
bare() {
    for program in gcc cc clang; do
        no command -v $program
    done
}

installed() {
    bare
    apt-get install -qq --no-install-recommends "$LOWER"
    expected=$(dpkg-deb -f "$LOWER" Version)
    case $(crablb --version) in
        "crablb ${expected%%[~+]*}"*) ;;
        *) crablb --version; exit 1 ;;
    esac
    # Nothing was started, nothing is the administrator's to keep, nothing is compiled at each start.
    [ -z "$(dpkg-query -W -f '${Conffiles}' crablb)" ]
    [ -d /etc/crablb ]
    [ -n "$(find /usr/lib/crablb -name '*.pyc')" ]
    [ -z "$(dpkg --verify crablb)" ]
    [ -f /usr/share/man/man1/crablb-serve.1.gz ]
    [ -f /usr/share/bash-completion/completions/crablb ]
    ls /lib/systemd/system/crablb.service /lib/systemd/system/crablb-agent-server.service \
        /lib/systemd/system/crablb-agent-client.service
    [ -z "$(find /etc -name '*crablb*.service')" ]
    /usr/lib/crablb/bin/python3 -m crablb --version
}

served() {
    network
    serve crablb
    there crablb doctor --iface eth0 || true
    kill $daemon
    wait $daemon
    [ ! -e /sys/fs/bpf/crablb ]
    ip netns del packages
}

demo() { "$1" demo; }

without_xdp() {
    network
    status=0
    there python3 /root/without_xdp.py "$1" serve --iface eth0 --service tcp://10.0.0.100:80=10.0.0.11 2> said || status=$?
    cat said
    [ $status = 2 ]
    [ "$(cat said)" = "crablb: this kernel has no AF_XDP; it needs CONFIG_XDP_SOCKETS=y" ]
    no xdp
    [ ! -e /sys/fs/bpf/crablb ]
}

# With a stand-in for systemd that notes what is asked of it: an upgrade ends nothing, and has the daemon taken over.
upgraded() {
    network
    serve crablb
    mkdir -p /run/systemd/system
    printf '#!/bin/sh\necho "$@" >> /run/asked\n' > /usr/bin/systemctl
    chmod +x /usr/bin/systemctl
    # Not in /usr/local, where apt has no maintainer script look.
    : > /run/asked
    apt-get install -qq --no-install-recommends "$HIGHER"
    rm /usr/bin/systemctl
    cat /run/asked
    grep -qx 'reload crablb.service' /run/asked
    no grep 'stop.*crablb\|restart.*crablb.service' /run/asked
    grep -q 'try-restart.*crablb-agent-server.service' /run/asked
    grep -q 'try-restart.*crablb-agent-client.service' /run/asked
    [ "$(crablb --version)" = "crablb 99.0.0" ]
    [ -z "$(dpkg --verify crablb)" ]
    # The old one serves on, and the new one's commands may ask it.
    there crablb services --iface eth0
    kill -0 $daemon
    kill $daemon
    wait $daemon
    echo "# mine" > /etc/crablb/lb.toml
    ls /var/lib/crablb
}

# A daemon that was killed has left its program in the kernel, and without crablb nobody could take it out.
removed() {
    network
    serve crablb
    kill -9 $daemon
    wait $daemon || true
    xdp
    there apt-get remove -qq crablb
    no xdp
    [ ! -e /sys/fs/bpf/crablb ]
    [ ! -e /usr/lib/crablb ]
    no command -v crablb
    # What was configured and made at run time stays until it is purged.
    [ "$(cat /etc/crablb/lb.toml)" = "# mine" ]
    ls /var/lib/crablb
}

purged() {
    apt-get purge -qq crablb
    # What was not there before is the administrator's.
    [ "$(cat /etc/crablb/lb.toml)" = "# mine" ]
    rm -r /etc/crablb
    [ ! -e /var/lib/crablb ]
}

wheel() {
    apt-get update -qq
    bare
    apt-get install -qq --no-install-recommends python3-venv
    # Without what brings libbpf, which is not to be needed: iproute2, and Debian 12's nginx, which needs that.
    python3 -m venv venv
    ./venv/bin/pip install -q "$1"
    [ -z "$(find / -xdev -name 'libbpf.so*')" ]
    bare
    ./venv/bin/crablb --version
    ./venv/bin/python -c 'import crablb; from crablb.kernel import bpf; crablb.LoadBalancer, bpf.Object'
    [ -f venv/share/man/man1/crablb-serve.1.gz ]
    [ -f venv/share/bash-completion/completions/crablb ]
    [ -f venv/share/crablb/crablb.service ]
    apt-get install -qq --no-install-recommends iproute2 nftables ethtool procps nginx-light curl tcpdump
}
