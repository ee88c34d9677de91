#!/bin/sh
# enter.sh ROOT COMMAND [ARGUMENT...]: run COMMAND in ROOT as on a machine of its own.  To be the first process of new mount,
# PID and cgroup namespaces, with which all that it mounts and starts ends.
set -eu
[ $$ = 1 ] || { echo "enter.sh: run this by unshare --mount --pid --cgroup --fork, or it mounts on the host" >&2; exit 1; }
root=$1
shift
# `ip netns exec` wants the root to be a mount, which a folder is not.
mount --bind "$root" "$root"
cd "$root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
mount --rbind /dev dev
mount -t tmpfs tmpfs run
pivot_root . mnt
cd /
umount -l /mnt
# Not exec: the first process has to take in orphans, as the shell does.
status=0
"$@" || status=$?
exit $status
