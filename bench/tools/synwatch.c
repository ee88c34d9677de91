/* SPDX-License-Identifier: MIT */
/* SYNs at one end of the load balancer's cable: how long each was with it, and which never came out again.
 *
 *   synwatch INTERFACE       the end of the cable that is not the load balancer's
 *
 * What the interface sends goes to the load balancer, what it receives comes from it; the same client's address, port and sequence
 * number: the same SYN, for nobody here changes these.  The kernel has stamped each when it passed, so neither this process's turn
 * nor its sender's is in the times.
 *
 * A line on standard input is answered by one of JSON: `in` and `out`, of which the difference is lost when nothing is on its way any
 * more; `missed` (by this program, whose other figures mean nothing then); since the last line, `longest`, the microseconds of that
 * which took longest, and `late`, how many took more than 5 ms.  A line with two times (nanoseconds since 1970) is answered by how
 * many SYNs were with it at some time between these and have come out since, of the last 262,144, and by their `longest`. */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define FRAME 256u
#define BLOCK (1u << 20)
#define BLOCKS 64u /* 262,144 SYNs, some seconds of them */
#define FRAMES (BLOCKS * (BLOCK / FRAME))
#define SLOTS (1u << 20)
#define LATE_NS 5000000
#define PASSED (1u << 18)

/* SYN without ACK, of IPv4 (whatever its options) or IPv6 (without extension headers). */
static struct sock_filter syns[] = {
    BPF_STMT(BPF_LD | BPF_H | BPF_ABS, 12),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ETH_P_IPV6, 5, 0),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ETH_P_IP, 0, 10),
    BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 23),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, IPPROTO_TCP, 0, 8),
    BPF_STMT(BPF_LDX | BPF_B | BPF_MSH, 14),
    BPF_JUMP(BPF_JMP | BPF_JA, 3, 0, 0),
    BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 20),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, IPPROTO_TCP, 0, 4),
    BPF_STMT(BPF_LDX | BPF_W | BPF_IMM, 40),
    BPF_STMT(BPF_LD | BPF_B | BPF_IND, 14 + 13),
    BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0x12),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0x02, 1, 0),
    BPF_STMT(BPF_RET | BPF_K, 0),
    BPF_STMT(BPF_RET | BPF_K, FRAME - 2 * TPACKET_ALIGNMENT - sizeof(struct tpacket2_hdr) - sizeof(struct sockaddr_ll)),
};

static void die(const char *what, const char *why)
{
    fprintf(stderr, "synwatch: %s: %s\n", what, why);
    exit(2);
}

/* ---- those that are with the load balancer ---- */

struct inside {
    uint64_t key; /* 0: none */
    uint64_t came;
};

static struct inside table[SLOTS]; /* open addressing, linear probing */
static uint64_t in, out, missed, longest, late;
static uint32_t count;
static struct passed {
    uint64_t came, left;
} passed[PASSED];

static struct inside *slot(uint64_t key)
{
    uint32_t i = (uint32_t)(key >> 32) % SLOTS;
    while (table[i].key && table[i].key != key)
        i = (i + 1) % SLOTS;
    return &table[i];
}

/* Those behind it in its run move up (Knuth, 6.4, algorithm R). */
static void forget(struct inside *gone)
{
    uint32_t hole = (uint32_t)(gone - table);
    for (uint32_t i = (hole + 1) % SLOTS; table[i].key; i = (i + 1) % SLOTS) {
        uint32_t home = (uint32_t)(table[i].key >> 32) % SLOTS;
        if ((i - home) % SLOTS < (i - hole) % SLOTS)
            continue;
        table[hole] = table[i];
        hole = i;
    }
    table[hole].key = 0;
}

/* A word more in a hash (Stafford's mix 13, as SplitMix64 has it). */
static uint64_t mixed(uint64_t hash, uint64_t word)
{
    hash ^= word + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    return hash ^ (hash >> 31);
}

static void saw(const uint8_t *frame, bool leaves_for_it, uint64_t now)
{
    bool v6 = frame[12] == 0x86;
    const uint8_t *tcp = frame + 14 + (v6 ? 40 : (frame[14] & 15) * 4);
    uint64_t words[3] = {0};
    memcpy(words, frame + 14 + (v6 ? 8 : 12), v6 ? 16 : 4);
    memcpy(&words[2], tcp, 2);
    memcpy((uint8_t *)&words[2] + 4, tcp + 4, 4);
    uint64_t key = 0;
    for (int i = 0; i < 3; i++)
        key = mixed(key, words[i]);
    key = key ? key : 1;
    struct inside *at = slot(key);
    if (leaves_for_it) {
        in++;
        if (at->key) /* its sender tries again: the first one is lost, as a rule */
            at->came = now;
        else if (++count > SLOTS / 2)
            die("too many SYNs", "half a million came to the load balancer and did not come out again");
        else
            *at = (struct inside){key, now};
        return;
    }
    out++;
    if (!at->key)
        return;
    uint64_t took = now > at->came ? now - at->came : 0;
    passed[out % PASSED] = (struct passed){at->came, now};
    longest = took > longest ? took : longest;
    late += took > LATE_NS;
    forget(at);
    count--;
}

/* ---- the interface ---- */

static uint8_t *ring;

static int opened(const char *name)
{
    int version = TPACKET_V2, fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
    struct sock_fprog filter = {sizeof syns / sizeof *syns, syns};
    struct tpacket_req wanted = {BLOCK, BLOCKS, FRAME, FRAMES};
    struct sockaddr_ll where = {AF_PACKET, htons(ETH_P_ALL), (int)if_nametoindex(name), 0, 0, 0, {0}};
    if (!where.sll_ifindex || fd < 0 || setsockopt(fd, SOL_PACKET, PACKET_VERSION, &version, sizeof version) ||
        setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter) ||
        setsockopt(fd, SOL_PACKET, PACKET_RX_RING, &wanted, sizeof wanted) ||
        (ring = mmap(NULL, (size_t)BLOCK * BLOCKS, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) == MAP_FAILED ||
        bind(fd, (struct sockaddr *)&where, sizeof where))
        die(name, strerror(errno));
    return fd;
}

/* All that have passed by now. */
static void look(int fd)
{
    static uint32_t next;
    for (;; next = (next + 1) % FRAMES) {
        uint8_t *frame = ring + (size_t)next * FRAME;
        struct tpacket2_hdr *head = (void *)frame;
        if (!(__atomic_load_n(&head->tp_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
            break;
        const struct sockaddr_ll *from = (void *)(frame + TPACKET_ALIGN(sizeof *head));
        uint64_t now = head->tp_sec * 1000000000ull + head->tp_nsec;
        saw(frame + head->tp_mac, from->sll_pkttype == PACKET_OUTGOING, now);
        __atomic_store_n(&head->tp_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
    }
    struct tpacket_stats stats;
    socklen_t size = sizeof stats;
    if (!getsockopt(fd, SOL_PACKET, PACKET_STATISTICS, &stats, &size)) /* since the last time */
        missed += stats.tp_drops;
}

static void tell_between(uint64_t from, uint64_t to)
{
    uint64_t n = 0, most = 0;
    for (struct passed *p = passed; p < passed + PASSED; p++)
        if (p->came < to && p->left > from) {
            n++;
            most = p->left - p->came > most ? p->left - p->came : most;
        }
    printf("{\"count\": %lu, \"longest\": %.1f, \"missed\": %lu}\n", n, (double)most / 1e3, missed);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    char line[256];
    ssize_t length;
    uint64_t from, to;
    if (argc != 2)
        die("usage", "synwatch INTERFACE");
    int fd = opened(argv[1]);
    puts("ready");
    fflush(stdout);
    struct pollfd input = {STDIN_FILENO, POLLIN, 0};
    for (;;) {
        int asked = poll(&input, 1, 50); /* a small part of what the ring holds */
        look(fd);
        if (asked <= 0)
            continue;
        if ((length = read(STDIN_FILENO, line, sizeof line - 1)) <= 0)
            return 0;
        line[length] = 0;
        if (sscanf(line, "%lu %lu", &from, &to) == 2) {
            tell_between(from, to);
            continue;
        }
        printf("{\"in\": %lu, \"out\": %lu, \"missed\": %lu, \"longest\": %.1f, \"late\": %lu}\n", in, out, missed,
               (double)longest / 1e3, late);
        fflush(stdout);
        longest = late = 0;
    }
}
