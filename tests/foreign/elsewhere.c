// For a program that is server and client at once: its clients dial from another network namespace, by another address.
//
// Preloaded into varnishtest, which runs in the servers' namespace and makes all sockets of its scenarios on 127.0.0.1,
// at any port.  Listeners are moved to 0.0.0.0 and to one port of a range; connections to such a port are made in
// CRABLB_NETNS (a path), to CRABLB_TO (an IPv4 address).  Other programs (those that it starts) are let alone.
//
// CRABLB_PORTS: a file that holds, as two native uint32_t, the first port and their number, and a third that counts
// those given so far, for all processes.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

static struct ports {
    uint32_t first, number;
    _Atomic uint32_t given;
} *ports;
static struct in_addr to;

static int (*real_bind)(int, const struct sockaddr *, socklen_t);
static int (*real_connect)(int, const struct sockaddr *, socklen_t);
static int (*real_getsockname)(int, struct sockaddr *, socklen_t *);

__attribute__((constructor)) static void start(void) {
    real_bind = dlsym(RTLD_NEXT, "bind");
    real_connect = dlsym(RTLD_NEXT, "connect");
    real_getsockname = dlsym(RTLD_NEXT, "getsockname");
    if (strcmp(program_invocation_short_name, "varnishtest"))
        return;
    int file = open(getenv("CRABLB_PORTS"), O_RDWR | O_CLOEXEC);
    void *shared = mmap(NULL, sizeof *ports, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared == MAP_FAILED || !inet_aton(getenv("CRABLB_TO"), &to))
        abort();
    ports = shared;
}

static int is_tcp(int fd, const struct sockaddr *address) {
    int type;
    socklen_t size = sizeof type;
    return ports && address->sa_family == AF_INET && !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) &&
           type == SOCK_STREAM;
}

static int is_given(const struct sockaddr_in *address) {
    return (uint32_t)ntohs(address->sin_port) - ports->first < ports->number;
}

int bind(int fd, const struct sockaddr *address, socklen_t size) {
    struct sockaddr_in moved;
    if (!is_tcp(fd, address))
        return real_bind(fd, address, size);
    memcpy(&moved, address, sizeof moved);
    if (moved.sin_addr.s_addr != htonl(INADDR_LOOPBACK) || moved.sin_port)
        return real_bind(fd, address, size);
    moved.sin_addr.s_addr = htonl(INADDR_ANY);
    for (uint32_t tries = 0; tries < ports->number; tries++) {
        moved.sin_port = htons(ports->first + atomic_fetch_add(&ports->given, 1) % ports->number);
        if (!real_bind(fd, (struct sockaddr *)&moved, sizeof moved))
            return 0;
        if (errno != EADDRINUSE)
            return -1;
    }
    return -1;
}

int getsockname(int fd, struct sockaddr *address, socklen_t *size) {
    int error = real_getsockname(fd, address, size);
    struct sockaddr_in *in = (struct sockaddr_in *)address;
    if (!error && is_tcp(fd, address) && in->sin_addr.s_addr == htonl(INADDR_ANY) && is_given(in))
        in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return error;
}

// A socket is of the namespace that its thread was in when it was made.  Descriptors are opened each time, as a scenario's
// process closes all that it has at its start.
static int made_there(void) {
    int here = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    int there = open(getenv("CRABLB_NETNS"), O_RDONLY | O_CLOEXEC), made = -1;
    if (here >= 0 && there >= 0 && !setns(there, CLONE_NEWNET)) {
        made = socket(AF_INET, SOCK_STREAM, 0);
        if (setns(here, CLONE_NEWNET))
            abort();
    }
    close(there);
    close(here);
    return made;
}

int connect(int fd, const struct sockaddr *address, socklen_t size) {
    struct sockaddr_in moved;
    if (!is_tcp(fd, address))
        return real_connect(fd, address, size);
    memcpy(&moved, address, sizeof moved);
    if (moved.sin_addr.s_addr != htonl(INADDR_LOOPBACK) || !is_given(&moved))
        return real_connect(fd, address, size);
    int made = made_there();
    if (made < 0)
        return -1;
    if (fcntl(made, F_SETFL, fcntl(fd, F_GETFL)) || dup2(made, fd) < 0) {
        close(made);
        return -1;
    }
    close(made);
    moved.sin_addr = to;
    return real_connect(fd, (struct sockaddr *)&moved, sizeof moved);
}
