/* SPDX-License-Identifier: MIT */
/* Connect, request, response, close; or requests on connections that stay.  A client with exact percentiles, and a server.
 *
 *   crr load HOST PORT [OPTIONS]
 *     --mode crr|rr       a connection a request (default), or each on a connection that stays
 *     --connections N     so many at a time, each with one request at a time (closed loop; default 1)
 *     --rate R            instead: R requests a second at random (Poisson), however long answers take (open loop, crr)
 *     --bytes N           of a request, which comes back as it is (default 8)
 *     --get PATH          instead: HTTP/1.1 with Connection: close, until the server closes
 *     --seconds S         how long (default 1), after --warmup S (default 0.2) which does not count
 *     --samples N         or until there are so many, or SIGTERM
 *     --seed N
 *     --from ADDRESS      from this address of the machine, or by turns from as many as --addresses N says, this one and the next
 *     --mptcp             by MPTCP sockets
 *   crr serve PORT [OPTIONS]    echo
 *     --service US        one request after the other, each in so many microseconds
 *     --mptcp             by an MPTCP socket, which serves TCP's clients too
 *   crr percentiles                  of numbers from standard input, as `load` has them: for tests
 *
 * `load` prints JSON: times in microseconds, and of requests that failed how many for what.  In the open loop a request's time begins when it was due, not when its turn came, so
 * none is left out while others wait (Tene: "coordinated omission").  Times are counted in a histogram of 256 steps to each power
 * of two (as Tene's HDR histogram): a percentile is off by 0.4 % at most. */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif
#define MAX_BYTES (1 << 20)
#define MAX_CONNECTIONS 20000
#define GIVE_UP_NS 10000000000ull /* a request that takes so long has failed */

static void die(const char *what, const char *why)
{
    fprintf(stderr, "crr: %s: %s\n", what, why);
    exit(2);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- histogram ---- */

#define STEPS 256
#define PLACES (STEPS * 56)

struct histogram {
    uint64_t counts[PLACES], count, sum, max;
};

static uint32_t place_of(uint64_t value)
{
    if (value < STEPS)
        return (uint32_t)value;
    uint32_t shift = 63 - 8 - (uint32_t)__builtin_clzll(value);
    return (shift + 1) * STEPS + (uint32_t)(value >> shift) - STEPS;
}

/* The middle of what a place stands for. */
static double value_of(uint32_t place)
{
    if (place < STEPS)
        return place;
    uint32_t shift = place / STEPS - 1;
    return (double)((uint64_t)(STEPS + place % STEPS) << shift) + (double)((1ull << shift) - 1) / 2;
}

static void record(struct histogram *h, uint64_t value)
{
    uint32_t place = place_of(value);
    h->counts[place < PLACES ? place : PLACES - 1]++;
    h->count++;
    h->sum += value;
    h->max = value > h->max ? value : h->max;
}

/* The smallest value that a share q of all do not exceed. */
static double percentile(const struct histogram *h, double q)
{
    uint64_t wanted = (uint64_t)ceil(q * (double)h->count), seen = 0;
    for (uint32_t i = 0; i < PLACES; i++)
        if ((seen += h->counts[i]) >= wanted && seen)
            return value_of(i);
    return 0;
}

static void print_times(const struct histogram *h)
{
    printf("\"count\": %lu, \"p50\": %.3f, \"p99\": %.3f, \"p999\": %.3f, \"max\": %.3f, \"mean\": %.3f", h->count,
           percentile(h, 0.5) / 1e3, percentile(h, 0.99) / 1e3, percentile(h, 0.999) / 1e3, (double)h->max / 1e3,
           h->count ? (double)h->sum / (double)h->count / 1e3 : 0);
}

static int percentiles(void)
{
    static struct histogram h;
    unsigned long long value;
    while (scanf("%llu", &value) == 1)
        record(&h, value);
    printf("{");
    print_times(&h);
    return puts("}") < 0;
}

/* ---- server ---- */

static int listener(const char *port, bool mptcp)
{
    struct addrinfo hints = {.ai_flags = AI_PASSIVE, .ai_family = AF_INET6, .ai_socktype = SOCK_STREAM}, *found;
    int error = getaddrinfo(NULL, port, &hints, &found), on = 1, off = 0;
    if (error)
        die(port, gai_strerror(error));
    int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, mptcp ? IPPROTO_MPTCP : 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (fd < 0 || bind(fd, found->ai_addr, found->ai_addrlen) || listen(fd, 65535))
        die(port, strerror(errno));
    freeaddrinfo(found);
    puts("ready");
    fflush(stdout);
    return fd;
}

static bool write_all(int fd, const uint8_t *data, size_t n)
{
    for (ssize_t sent; n; data += sent, n -= (size_t)sent)
        if ((sent = send(fd, data, n, MSG_NOSIGNAL)) <= 0)
            return false;
    return true;
}

/* The kernel's accept queue is the line in which requests wait.  Who connects and says nothing does not hold it up. */
static void serve_one_by_one(int fd, uint64_t service_ns)
{
    static uint8_t data[65536];
    const struct timeval patience = {.tv_usec = 100000};
    for (;;) {
        int c = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
        if (c < 0)
            continue;
        setsockopt(c, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        ssize_t n = recv(c, data, sizeof data, 0);
        if (n > 0) {
            uint64_t end = now_ns() + service_ns;
            struct timespec until = {(time_t)(end / 1000000000u), (long)(end % 1000000000u)};
            while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL))
                ;
            write_all(c, data, (size_t)n);
        }
        close(c);
    }
}

static void serve_all(int fd)
{
    static uint8_t data[MAX_BYTES];
    struct epoll_event events[256], event = {.events = EPOLLIN, .data.fd = fd};
    int poll = epoll_create1(EPOLL_CLOEXEC), on = 1;
    if (poll < 0 || epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event))
        die("epoll", strerror(errno));
    for (;;) {
        int n = epoll_wait(poll, events, 256, -1);
        for (int i = 0; i < n; i++) {
            int c = events[i].data.fd;
            if (c == fd) {
                c = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
                event = (struct epoll_event){.events = EPOLLIN, .data.fd = c};
                if (c < 0)
                    continue;
                setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                if (epoll_ctl(poll, EPOLL_CTL_ADD, c, &event))
                    close(c);
                continue;
            }
            ssize_t got = recv(c, data, sizeof data, MSG_DONTWAIT);
            if (got > 0 ? !write_all(c, data, (size_t)got) : got == 0 || errno != EAGAIN)
                close(c);
        }
    }
}

/* ---- client ---- */

struct connection {
    int fd; /* -1: none */
    uint64_t due;
    size_t sent, received;
    uint32_t next_free;
};

static struct {
    struct sockaddr_storage to, from;
    socklen_t to_len;
    uint32_t addresses;
    bool stays, http, mptcp;
    uint32_t connections;
    double rate, seconds, warmup;
    uint64_t samples, seed;
    size_t bytes;
    const uint8_t *request;
} opt = {.connections = 1, .seconds = 1, .warmup = 0.2, .samples = UINT64_MAX, .seed = 1, .bytes = 8, .addresses = 1};

static struct histogram times;
static uint64_t errors, moved, first_ns, last_ns;
/* By error number; those that are none: */
enum { CLOSED = 0, LATE = 134, CROWDED, MOST_ERRORS };
static uint64_t failures[MOST_ERRORS];
static volatile sig_atomic_t told;     /* to end */
static int epoll_fd;
static struct connection *connections;

/* Uniform in (0, 1]: xorshift64* (Vigna, 2016). */
static double uniform(void)
{
    opt.seed ^= opt.seed >> 12;
    opt.seed ^= opt.seed << 25;
    opt.seed ^= opt.seed >> 27;
    return (double)((opt.seed * 2685821657736338717ull >> 11) + 1) * 0x1p-53;
}

static void end(struct connection *c)
{
    if (c->fd >= 0)
        close(c->fd); /* epoll forgets it */
    c->fd = -1;
}

static void failed(int why)
{
    errors++;
    failures[why >= 0 && why < MOST_ERRORS ? why : LATE]++;
}

static void fail(struct connection *c, int why)
{
    if (c->due >= first_ns)
        failed(why);
    end(c);
}

/* Give the socket its own address, if there is a choice; its port it gets as it connects, as ever. */
static bool begin(int fd)
{
    static uint32_t turn;
    struct sockaddr_storage from = opt.from;
    int on = 1;
    if (!opt.from.ss_family)
        return true;
    uint8_t *address = from.ss_family == AF_INET ? (uint8_t *)&((struct sockaddr_in *)&from)->sin_addr
                                                 : (uint8_t *)&((struct sockaddr_in6 *)&from)->sin6_addr + 12;
    uint32_t last;
    memcpy(&last, address, 4);
    last = htonl(ntohl(last) + turn++ % opt.addresses);
    memcpy(address, &last, 4);
    return !setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on) &&
           !bind(fd, (const void *)&from, opt.to_len);
}

/* Send as much as goes; false: the connection is lost. */
static bool push(struct connection *c)
{
    while (c->sent < opt.bytes) {
        ssize_t n = send(c->fd, opt.request + c->sent, opt.bytes - c->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0)
            return errno == EAGAIN || errno == ENOTCONN || errno == EINPROGRESS;
        c->sent += (size_t)n;
    }
    return true;
}

static void ask(struct connection *c, uint64_t due)
{
    c->due = due;
    c->sent = c->received = 0;
    if (c->fd < 0) {
        int on = 1;
        c->fd = socket(opt.to.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, opt.mptcp ? IPPROTO_MPTCP : 0);
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
        if (c->fd < 0)
            die("socket", strerror(errno));
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (!begin(c->fd) || (connect(c->fd, (const void *)&opt.to, opt.to_len) && errno != EINPROGRESS) ||
            epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event))
            fail(c, errno);
        return; /* it is sent when the connection is there */
    }
    if (!push(c))
        fail(c, errno);
}

static void answered(struct connection *c)
{
    uint64_t now = now_ns();
    if (c->due >= first_ns && times.count < opt.samples) {
        record(&times, now - c->due);
        moved += opt.bytes + c->received;
        last_ns = now;
    }
    if (!opt.stays)
        end(c);
}

/* Whether the request is done with: answered, or failed. */
static bool turn(struct connection *c, uint32_t events)
{
    static uint8_t data[65536];
    int error = 0;
    socklen_t size = sizeof error;
    if (events & EPOLLERR)
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    else if (!push(c))
        error = errno;
    if (events & EPOLLERR || error) {
        fail(c, error);
        return true;
    }
    for (;;) {
        ssize_t n = recv(c->fd, data, sizeof data, MSG_DONTWAIT);
        if (n > 0) {
            c->received += (size_t)n;
            if (opt.http || c->received < opt.bytes)
                continue;
        } else if (n < 0 && (errno == EAGAIN || errno == ENOTCONN)) {
            return false;
        } else if (n < 0 || !opt.http || !c->received) {
            fail(c, n < 0 ? errno : CLOSED);
            return true;
        }
        answered(c);
        return true;
    }
}

static double cpu_seconds(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)used.ru_utime.tv_sec + (double)used.ru_stime.tv_sec +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void tell(int number __attribute__((unused)))
{
    told = 1;
}

static void run(void)
{
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = tell}, NULL);
    uint64_t start = now_ns(), due = start, stop;
    struct epoll_event events[256];
    bool open_loop = opt.rate > 0;
    uint32_t places = open_loop ? MAX_CONNECTIONS : opt.connections, first_free = 0, busy = 0;
    connections = calloc(places, sizeof *connections);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct rlimit files;
    if (!connections || epoll_fd < 0 || getrlimit(RLIMIT_NOFILE, &files))
        die("start", strerror(errno));
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_cur < places + 16)
        places = (uint32_t)files.rlim_cur - 16;
    first_ns = last_ns = start + (uint64_t)(opt.warmup * 1e9);
    stop = first_ns + (uint64_t)(opt.seconds * 1e9);
    for (uint32_t i = 0; i < places; i++) {
        connections[i].fd = -1;
        connections[i].next_free = i + 1;
        if (!open_loop)
            ask(&connections[i], now_ns());
    }
    uint64_t looked = start;
    double cpu = -1;
    for (;;) {
        uint64_t now = now_ns();
        if (cpu < 0 && now >= first_ns)
            cpu = cpu_seconds();
        if (told && now < stop)
            stop = now > first_ns ? now : first_ns;
        bool over = now >= stop || times.count >= opt.samples;
        if (over && (!open_loop || !busy || now >= stop + GIVE_UP_NS))
            break;
        for (; open_loop && !over && due <= now; due += (uint64_t)(-log(uniform()) / opt.rate * 1e9)) {
            if (first_free == places) {
                failed(CROWDED);
                continue;
            }
            struct connection *c = &connections[first_free];
            ask(c, due);
            if (c->fd >= 0) {
                first_free = c->next_free;
                busy++;
            }
        }
        /* Not a millisecond early, not a millisecond late. */
        uint64_t next = open_loop && !over ? due : now + 10000000;
        struct timespec wait = {0, (long)(next > now ? (next - now < 10000000 ? next - now : 10000000) : 0)};
        int n = epoll_pwait2(epoll_fd, events, 256, &wait, NULL);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (c->fd < 0 || !turn(c, events[i].events))
                continue;
            if (open_loop) {
                c->next_free = first_free;
                first_free = (uint32_t)(c - connections);
                busy--;
            } else {
                ask(c, now_ns());
            }
        }
        if (!open_loop && now - looked > 100000000) { /* who failed to connect at once, or hangs */
            looked = now = now_ns();
            for (uint32_t i = 0; i < places; i++) {
                if (connections[i].fd >= 0 && now - connections[i].due > GIVE_UP_NS)
                    fail(&connections[i], LATE);
                if (connections[i].fd < 0)
                    ask(&connections[i], now);
            }
        }
    }
    for (; open_loop && busy; busy--)
        failed(LATE);
    double seconds = (double)((times.count >= opt.samples ? last_ns : stop) - first_ns) / 1e9;
    printf("{");
    print_times(&times);
    printf(", \"errors\": %lu, \"seconds\": %.6f, \"rate\": %.2f, \"bytes\": %lu, \"cpu\": %.4f, \"why\": {", errors, seconds,
           seconds > 0 ? (double)times.count / seconds : 0, moved, cpu_seconds() - (cpu < 0 ? 0 : cpu));
    const char *comma = "";
    for (int i = 0; i < MOST_ERRORS; i++)
        if (failures[i]) {
            const char *why = i == CLOSED    ? "closed without an answer"
                              : i == LATE    ? "no answer in time"
                              : i == CROWDED ? "too many at a time"
                                             : strerror(i);
            printf("%s\"%s\": %lu", comma, why, failures[i]);
            comma = ", ";
        }
    puts("}}");
}

/* ---- arguments ---- */

static double number(const char *option, const char *text, double least, double most)
{
    char *rest, why[96];
    double n = text ? strtod(text, &rest) : 0;
    if (text && *text && !*rest && n >= least && n <= most)
        return n;
    snprintf(why, sizeof why, "a number from %g to %g was expected", least, most);
    die(option, why);
    return 0;
}

static int load(int argc, char **argv)
{
    static char get[1024];
    if (argc < 2)
        die("load", "HOST and PORT were expected");
    struct addrinfo hints = {.ai_flags = AI_NUMERICHOST, .ai_socktype = SOCK_STREAM}, *found;
    int error = getaddrinfo(argv[0], argv[1], &hints, &found);
    if (error)
        die(argv[0], gai_strerror(error));
    memcpy(&opt.to, found->ai_addr, opt.to_len = found->ai_addrlen);
    freeaddrinfo(found);
    for (int i = 2; i < argc; i += 2) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(name, "--mptcp")) {
            opt.mptcp = true;
            i--; /* it has no value */
        } else if (!strcmp(name, "--mode") && value && (!strcmp(value, "rr") || !strcmp(value, "crr")))
            opt.stays = !strcmp(value, "rr");
        else if (!strcmp(name, "--connections"))
            opt.connections = (uint32_t)number(name, value, 1, MAX_CONNECTIONS);
        else if (!strcmp(name, "--rate"))
            opt.rate = number(name, value, 0.1, 1e6);
        else if (!strcmp(name, "--bytes"))
            opt.bytes = (size_t)number(name, value, 1, MAX_BYTES);
        else if (!strcmp(name, "--seconds"))
            opt.seconds = number(name, value, 0.01, 600);
        else if (!strcmp(name, "--warmup"))
            opt.warmup = number(name, value, 0, 60);
        else if (!strcmp(name, "--samples"))
            opt.samples = (uint64_t)number(name, value, 1, 1e9);
        else if (!strcmp(name, "--addresses"))
            opt.addresses = (uint32_t)number(name, value, 1, 65536);
        else if (!strcmp(name, "--from") && value) {
            if ((error = getaddrinfo(value, NULL, &hints, &found)))
                die(value, gai_strerror(error));
            if (found->ai_family != opt.to.ss_family)
                die(value, "it is of another family than HOST");
            memcpy(&opt.from, found->ai_addr, found->ai_addrlen);
            freeaddrinfo(found);
        } else if (!strcmp(name, "--seed"))
            opt.seed = (uint64_t)number(name, value, 1, 1e15);
        else if (!strcmp(name, "--get") && value && strlen(value) < 900) {
            opt.http = true;
            snprintf(get, sizeof get, "GET %s HTTP/1.1\r\nHost: crr\r\nConnection: close\r\n\r\n", value);
        } else {
            die(name, "no such option, or its value is missing; see the top of crr.c");
        }
    }
    if (opt.rate > 0 && opt.stays)
        die("--rate", "it is for connections that do not stay");
    if (opt.http && opt.stays)
        die("--get", "it is for connections that do not stay");
    if (opt.http) {
        opt.request = (const uint8_t *)get;
        opt.bytes = strlen(get);
    } else {
        opt.request = calloc(opt.bytes, 1);
    }
    run();
    return 0;
}

static void serve(int argc, char **argv)
{
    bool mptcp = false;
    double service_us = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--mptcp"))
            mptcp = true;
        else if (!strcmp(argv[i], "--service"))
            service_us = number(argv[i], i + 1 < argc ? argv[i + 1] : NULL, 1, 1e7), i++;
        else
            die(argv[i], "no such option; see the top of crr.c");
    }
    int fd = listener(argv[0], mptcp);
    if (service_us > 0)
        serve_one_by_one(fd, (uint64_t)(service_us * 1e3));
    serve_all(fd);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "load"))
        return load(argc - 2, argv + 2);
    if (!strcmp(what, "percentiles") && argc == 2)
        return percentiles();
    if (!strcmp(what, "serve") && argc > 2)
        serve(argc - 2, argv + 2);
    die("usage", "load, serve or percentiles; see the top of crr.c");
}
