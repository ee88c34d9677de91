/* Preloaded into a Python program: counts its calls of libc, and has some fail, come short, or be the thread's or the
 * process's last, as a file of rules says that a test writes while the program runs (shim.py).  Programs that it starts
 * are left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define RULES 16

struct rule {
	char call[24];   /* its name; "change": one that changes what is in the kernel or in a folder; "step": that, or one
	                    that somebody else may notice; "ask": one that the kernel may refuse, and not by the way of an
	                    event loop, which libuv ends the process for; not of other processes' files, of which there are
	                    so many today and so many tomorrow */
	char of[72];     /* a part of what the call is of (see describe); empty: whatever it is */
	uint64_t first, count; /* of such calls, from 1 */
	uint32_t chance; /* of 2^32 - 1: that such a call is struck */
	int32_t does;
	_Atomic(uint64_t) calls, hits;
	_Atomic(uint32_t) on;
	char last[72];   /* which call was struck last */
};

struct rules {
	_Atomic(int64_t) clock; /* nanoseconds that CLOCK_REALTIME is stepped by */
	uint32_t process;       /* the only one; 0: whichever */
	_Atomic(uint32_t) seed;
	struct rule rules[RULES];
};

enum { KILLED = -1, SHORT = -2, ENDED = -3 }; /* `does`; otherwise an errno, or 0 to count only */

static struct rules *rules;

/* What a call is of: a path, a descriptor, a socket's family; and two of its numbers. */
struct of {
	const char *path;
	int fd;
	int family; /* that is asked for */
	long a, b;
};

__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("CRAB_SHIM");
	char program[256] = "";
	ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
	const char *name = n > 0 ? strrchr(program, '/') : NULL;
	if (!path || !name || strncmp(name, "/python", 7))
		return;
	int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
	unsetenv("CRAB_SHIM");
	unsetenv("LD_PRELOAD");
	if (fd < 0)
		abort();
	long at = syscall(SYS_mmap, NULL, sizeof *rules, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	syscall(SYS_close, fd);
	if (at < 0 && at > -4096)
		abort();
	rules = (struct rules *)at;
}

static const char *family(int number)
{
	switch (number) {
	case AF_UNIX:
		return "unix";
	case AF_INET:
		return "inet";
	case AF_INET6:
		return "inet6";
	case AF_NETLINK:
		return "netlink";
	case AF_PACKET:
		return "packet";
	case 44:
		return "xdp";
	}
	return "socket";
}

static void describe(char *to, size_t room, struct of of)
{
	char path[64] = "", link[32];
	int domain = of.family;
	socklen_t len = sizeof domain;
	if (of.path)
		snprintf(to, room, "%s", of.path);
	else if (of.family)
		snprintf(to, room, "%s %ld %ld", family(of.family), of.a, of.b);
	else if (of.fd > 0 && !syscall(SYS_getsockopt, of.fd, SOL_SOCKET, SO_DOMAIN, &domain, &len))
		snprintf(to, room, "%s %ld %ld", family(domain), of.a, of.b);
	else if (of.fd > 0) {
		snprintf(link, sizeof link, "/proc/self/fd/%d", of.fd);
		long n = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
		path[n > 0 ? n : 0] = 0;
		snprintf(to, room, "%s %ld %ld", path, of.a, of.b);
	} else
		snprintf(to, room, "%ld %ld", of.a, of.b);
}

/* xorshift, of one state for all threads: which call gets which number is theirs. */
static uint32_t roll(void)
{
	uint32_t was = atomic_load(&rules->seed), now;
	do {
		now = was ? was : 1;
		now ^= now << 13;
		now ^= now >> 17;
		now ^= now << 5;
	} while (!atomic_compare_exchange_weak(&rules->seed, &was, now));
	return now;
}

/* Of another process, or network namespace: there are as many of these calls as there happen to be of those. */
static bool others(const char *path)
{
	return path && ((!strncmp(path, "/proc/", 6) && path[6] >= '0' && path[6] <= '9') || strstr(path, "/run/netns/"));
}

/* Whether somebody else may notice it: it sends, writes, locks, lets others in.  Packets do not count, nor what wakes
 * another thread: of these there are more or fewer each time. */
static bool noticed(const char *call, const char *text)
{
	static const char *const calls[] = {"write", "send",   "sendto", "sendmsg", "sendmmsg",  "connect", "bind", "listen",
					    "chmod", "fchmod", "chown",  "flock",   "ftruncate", "accept4"};
	for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
		if (!strcmp(call, calls[i]))
			return strncmp(text, "xdp ", 4) && !strstr(text, "eventfd") && !strstr(text, "pipe:");
	return false;
}

/* What is to become of a call: 0, SHORT, or an errno. */
static int struck(const char *call, bool changes, struct of of)
{
	char text[sizeof rules->rules[0].of] = "";
	int does = 0, before = errno;
	if (!rules || (rules->process && rules->process != (uint32_t)syscall(SYS_getpid)))
		return 0;
	for (int i = 0; i < RULES; i++) {
		struct rule *r = &rules->rules[i];
		if (!atomic_load(&r->on))
			continue;
		bool asks = strncmp(call, "epoll", 5) && strcmp(call, "poll") && strcmp(call, "read") &&
			    strcmp(call, "write") && !others(of.path);
		bool step = !strcmp(r->call, "step");
		if (step && !changes && !text[0])
			describe(text, sizeof text, of);
		bool meant = !strcmp(r->call, call) || (asks && !strcmp(r->call, "ask")) ||
			     (changes && !strcmp(r->call, "change")) || (step && (changes || noticed(call, text)));
		if (!meant)
			continue;
		if (r->of[0]) {
			if (!text[0])
				describe(text, sizeof text, of);
			if (!strstr(text, r->of))
				continue;
		}
		uint64_t number = atomic_fetch_add(&r->calls, 1) + 1;
		if (does || !r->does || number < r->first || number - r->first >= r->count)
			continue;
		if (r->chance != UINT32_MAX && roll() > r->chance)
			continue;
		atomic_fetch_add(&r->hits, 1);
		if (!text[0])
			describe(text, sizeof text, of);
		snprintf(r->last, sizeof r->last, "%s %.50s", call, text);
		if (r->does == KILLED) {
			syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
			for (;;)
				pause(); /* other threads do not get on either */
		}
		if (r->does == ENDED)
			syscall(SYS_exit, 0); /* this thread, as by an oops in the kernel */
		does = r->does;
	}
	errno = before;
	return does;
}

#define OF(...) ((struct of){__VA_ARGS__})
#define REAL(type, name, parameters)                                                    \
	static type(*real) parameters;                                                  \
	if (!real)                                                                      \
		real = (type(*) parameters)dlsym(RTLD_NEXT, #name)

/* A call that fails with -1. */
#define WRAP(changes, type, name, parameters, of, ...)                                  \
	type name parameters                                                            \
	{                                                                               \
		REAL(type, name, parameters);                                           \
		int error = struck(#name, changes, of);                                 \
		if (error > 0) {                                                        \
			errno = error;                                                  \
			return (type)-1;                                                \
		}                                                                       \
		return real(__VA_ARGS__);                                               \
	}

/* The same, of `n` bytes or messages, that may come short. */
#define WRAP_SHORT(type, name, n, parameters, of, ...)                                  \
	type name parameters                                                            \
	{                                                                               \
		REAL(type, name, parameters);                                           \
		int error = struck(#name, false, of);                                   \
		if (error > 0) {                                                        \
			errno = error;                                                  \
			return (type)-1;                                                \
		}                                                                       \
		if (error == SHORT)                                                     \
			n = n > 1 ? n / 2 : n;                                          \
		return real(__VA_ARGS__);                                               \
	}

/* ---- folders ---- */

WRAP(true, int, unlink, (const char *path), OF(path), path)
WRAP(true, int, unlinkat, (int folder, const char *path, int flags), OF(path), folder, path, flags)
WRAP(true, int, rmdir, (const char *path), OF(path), path)
WRAP(true, int, mkdir, (const char *path, mode_t mode), OF(path), path, mode)
WRAP(true, int, mkdirat, (int folder, const char *path, mode_t mode), OF(path), folder, path, mode)
WRAP(true, int, symlink, (const char *target, const char *path), OF(path), target, path)
WRAP(true, int, link, (const char *target, const char *path), OF(path), target, path)
WRAP(true, int, rename, (const char *from, const char *to), OF(to), from, to)
WRAP(true, int, renameat, (int from_folder, const char *from, int to_folder, const char *to), OF(to), from_folder, from,
     to_folder, to)
WRAP(false, int, chmod, (const char *path, mode_t mode), OF(path), path, mode)
WRAP(false, int, chown, (const char *path, uid_t user, gid_t group), OF(path), path, user, group)
WRAP(false, int, fchmod, (int fd, mode_t mode), OF(.fd = fd), fd, mode)
WRAP(false, int, fsync, (int fd), OF(.fd = fd), fd)
WRAP(false, int, ftruncate, (int fd, off_t size), OF(.fd = fd), fd, size)
WRAP(false, int, flock, (int fd, int how), OF(.fd = fd), fd, how)
WRAP(false, int, memfd_create, (const char *name, unsigned flags), OF(name), name, flags)

#define OPEN(name)                                                                      \
	int name(const char *path, int flags, ...)                                      \
	{                                                                               \
		REAL(int, name, (const char *, int, ...));                              \
		va_list list;                                                           \
		va_start(list, flags);                                                  \
		mode_t mode = va_arg(list, mode_t);                                     \
		va_end(list);                                                           \
		int error = struck("open", flags & (O_CREAT | O_TRUNC), OF(path));      \
		if (error > 0) {                                                        \
			errno = error;                                                  \
			return -1;                                                      \
		}                                                                       \
		return real(path, flags, mode);                                         \
	}
OPEN(open)
OPEN(open64)

/* ---- descriptors ---- */

WRAP_SHORT(ssize_t, read, n, (int fd, void *to, size_t n), OF(.fd = fd), fd, to, n)
WRAP_SHORT(ssize_t, write, n, (int fd, const void *from, size_t n), OF(.fd = fd), fd, from, n)
WRAP(false, int, eventfd, (unsigned value, int flags), OF(0), value, flags)
WRAP(false, int, pipe2, (int fds[2], int flags), OF(0), fds, flags)
WRAP(false, int, epoll_create1, (int flags), OF(0), flags)
WRAP(false, int, epoll_ctl, (int epoll, int how, int fd, struct epoll_event *event), OF(.fd = fd), epoll, how, fd, event)
WRAP(false, int, epoll_wait, (int epoll, struct epoll_event *events, int most, int ms), OF(0), epoll, events, most, ms)
WRAP(false, int, epoll_pwait, (int epoll, struct epoll_event *events, int most, int ms, const sigset_t *mask), OF(0),
     epoll, events, most, ms, mask)
WRAP(false, int, poll, (struct pollfd *fds, nfds_t n, int ms), OF(.fd = n ? fds[0].fd : 0), fds, n, ms)

int ioctl(int fd, unsigned long request, ...)
{
	REAL(int, ioctl, (int, unsigned long, ...));
	va_list list;
	va_start(list, request);
	void *argument = va_arg(list, void *);
	va_end(list);
	int error = struck("ioctl", false, OF(.fd = fd, .a = (long)request));
	if (error > 0) {
		errno = error;
		return -1;
	}
	return real(fd, request, argument);
}

/* ---- sockets ---- */

WRAP(false, int, socket, (int family, int type, int protocol), OF(.family = family, .a = type & 0xff, .b = protocol), family,
     type, protocol)
WRAP(false, int, socketpair, (int family, int type, int protocol, int fds[2]), OF(.family = family), family, type, protocol, fds)
WRAP(false, int, bind, (int fd, const struct sockaddr *address, socklen_t len), OF(.fd = fd), fd, address, len)
WRAP(false, int, listen, (int fd, int backlog), OF(.fd = fd), fd, backlog)
WRAP(false, int, connect, (int fd, const struct sockaddr *address, socklen_t len), OF(.fd = fd), fd, address, len)
WRAP(false, int, accept4, (int fd, struct sockaddr *address, socklen_t *len, int flags), OF(.fd = fd), fd, address, len, flags)
WRAP(false, int, setsockopt, (int fd, int level, int option, const void *value, socklen_t len),
     OF(.fd = fd, .a = level, .b = option), fd, level, option, value, len)
WRAP(false, int, getsockopt, (int fd, int level, int option, void *value, socklen_t *len),
     OF(.fd = fd, .a = level, .b = option), fd, level, option, value, len)
WRAP_SHORT(ssize_t, send, n, (int fd, const void *from, size_t n, int flags), OF(.fd = fd), fd, from, n, flags)
WRAP_SHORT(ssize_t, sendto, n, (int fd, const void *from, size_t n, int flags, const struct sockaddr *to, socklen_t len),
	   OF(.fd = fd), fd, from, n, flags, to, len)
WRAP(false, ssize_t, sendmsg, (int fd, const struct msghdr *message, int flags), OF(.fd = fd), fd, message, flags)
WRAP_SHORT(int, sendmmsg, n, (int fd, struct mmsghdr *messages, unsigned n, int flags), OF(.fd = fd), fd, messages, n, flags)
WRAP_SHORT(ssize_t, recv, n, (int fd, void *to, size_t n, int flags), OF(.fd = fd), fd, to, n, flags)
WRAP_SHORT(ssize_t, recvfrom, n, (int fd, void *to, size_t n, int flags, struct sockaddr *from, socklen_t *len), OF(.fd = fd),
	   fd, to, n, flags, from, len)
WRAP(false, ssize_t, recvmsg, (int fd, struct msghdr *message, int flags), OF(.fd = fd), fd, message, flags)

/* ---- memory, threads, and the rest ---- */

#define MMAP(name)                                                                      \
	void *name(void *at, size_t len, int prot, int flags, int fd, off_t offset)     \
	{                                                                               \
		REAL(void *, name, (void *, size_t, int, int, int, off_t));             \
		int error = struck("mmap", false, OF(.path = fd < 0 ? "anonymous" : NULL, .fd = fd)); \
		if (error > 0) {                                                        \
			errno = error;                                                  \
			return MAP_FAILED;                                              \
		}                                                                       \
		return real(at, len, prot, flags, fd, offset);                          \
	}
MMAP(mmap)
MMAP(mmap64)

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *argument)
{
	REAL(int, pthread_create, (pthread_t *, const pthread_attr_t *, void *(*)(void *), void *));
	int error = struck("pthread_create", false, OF(0));
	return error > 0 ? error : real(thread, how, run, argument);
}

/* libbpf calls bpf(2) by it: `bpf COMMAND`. */
long syscall(long number, ...)
{
	REAL(long, syscall, (long, ...));
	va_list list;
	long a[6];

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	if (number == SYS_bpf) {
		char text[24];
		snprintf(text, sizeof text, "command %ld.", a[0]);
		int error = struck("bpf", true, OF(text));
		if (error > 0) {
			errno = error;
			return -1;
		}
	}
	return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int clock_gettime(clockid_t clock, struct timespec *to)
{
	REAL(int, clock_gettime, (clockid_t, struct timespec *));
	int rc = real(clock, to);
	if (rc || !rules || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE))
		return rc;
	int64_t step = atomic_load(&rules->clock);
	int64_t ns = to->tv_nsec + step % 1000000000;
	to->tv_sec += step / 1000000000 + (ns >= 1000000000) - (ns < 0);
	to->tv_nsec = (ns + 1000000000) % 1000000000;
	return rc;
}
