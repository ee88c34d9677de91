// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* Programs that know nothing of MPTCP get MPTCP sockets when they ask for TCP ones.
 *
 * An object of its own, because it needs a kernel with BTF and this hook (Linux 6.6), and the endpoint does not.  Source:
 * net/socket.c, update_socket_protocol(); tools/testing/selftests/bpf/progs/mptcpify.c. */
#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOCK_TYPE_MASK 0xf /* above it: SOCK_CLOEXEC, SOCK_NONBLOCK */
#define MPTCP 262

/* The few kernel fields that it reads; CO-RE finds them (libbpf, "BPF CO-RE"). */
struct net {
    __u64 net_cookie;
} __attribute__((preserve_access_index));

struct nsproxy {
    struct net *net_ns;
} __attribute__((preserve_access_index));

struct task_struct {
    struct nsproxy *nsproxy;
} __attribute__((preserve_access_index));

/* Whose sockets: those of this network namespace (its cookie), made by programs of this cgroup. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
} sockets_netns SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_CGROUP_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u32);
} sockets_cgroup SEC(".maps");

/* What it returns is the protocol that the socket gets. */
SEC("fmod_ret/update_socket_protocol")
int crab_sockets(__u64 *ctx)
{
    int family = ctx[0], type = ctx[1], protocol = ctx[2]; /* its arguments */
    if ((family != AF_INET && family != AF_INET6) || (type & SOCK_TYPE_MASK) != SOCK_STREAM)
        return protocol;
    if (protocol && protocol != IPPROTO_TCP)
        return protocol;
    __u32 zero = 0;
    __u64 *cookie = bpf_map_lookup_elem(&sockets_netns, &zero);
    struct task_struct *task = (struct task_struct *)bpf_get_current_task();
    if (!cookie || BPF_CORE_READ(task, nsproxy, net_ns, net_cookie) != *cookie)
        return protocol;
    return bpf_current_task_under_cgroup(&sockets_cgroup, 0) == 1 ? MPTCP : protocol;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
