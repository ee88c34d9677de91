/* Preloaded: kills the process before its crab_kill_at'th call that changes what is in the kernel or in a folder. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

long crab_calls, crab_kill_at; /* 0: never */

static void count(void)
{
	if (++crab_calls == crab_kill_at)
		kill(getpid(), SIGKILL);
}

#define WRAP(type, name, parameters, ...)                                    \
	type name parameters                                                 \
	{                                                                    \
		static type(*real) parameters;                               \
		if (!real)                                                   \
			real = (type(*) parameters)dlsym(RTLD_NEXT, #name);  \
		count();                                                     \
		return real(__VA_ARGS__);                                    \
	}

WRAP(int, unlink, (const char *path), path)
WRAP(int, unlinkat, (int folder, const char *path, int flags), folder, path, flags)
WRAP(int, rmdir, (const char *path), path)
WRAP(int, mkdir, (const char *path, mode_t mode), path, mode)
WRAP(int, mkdirat, (int folder, const char *path, mode_t mode), folder, path, mode)
WRAP(int, symlink, (const char *target, const char *path), target, path)
WRAP(int, rename, (const char *from, const char *to), from, to)
WRAP(int, renameat, (int from_folder, const char *from, int to_folder, const char *to), from_folder, from, to_folder, to)

/* libbpf calls bpf(2) by it. */
long syscall(long number, ...)
{
	static long (*real)(long, ...);
	va_list list;
	long a[6];

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	if (!real)
		real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
	if (number == SYS_bpf)
		count();
	return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
