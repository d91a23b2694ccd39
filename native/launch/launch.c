/* SPDX-License-Identifier: Apache-2.0
 *
 * launch: how the keeper starts a program without a fork of itself. No libc, no allocation, some microseconds of life.
 *
 * Started by posix_spawn as   launch N   where fd N is a memory file with `struct order` and what belongs to it.
 * Whatever the order names by number is open and inheritable. The order is mapped shared, so what is written into its
 * answer is there for the keeper whoever dies when: `pid` is written by the kernel before the process can run.
 *
 * With `cgroup` the program's process is our sibling (CLONE_PARENT: the keeper is its parent and reaps it), born in that
 * cgroup2 directory (CLONE_INTO_CGROUP: to move it there takes the kernel 8 to 15 ms). Where the kernel refuses that (v1,
 * before 5.7, an inner node, a seccomp filter), and without `cgroup`, the program's process is this one, which then
 * writes itself to every path.
 *
 * `ends` is the writing end of a pipe of which only we two have copies: its end says that the program runs, or that the
 * answer tells why it does not. The sibling uses our memory and we sleep until it has its own (CLONE_VM, CLONE_VFORK):
 * so no page table is copied, and the keeper wakes up once for the end of both.
 */

#include "kernel.h"

/* ---- the order; src/unisandbox/host/keeper/launches.py says the same ---- */
enum { MAGIC = 0x484e554c /* "LUNH" */, VERSION = 1, MAX_FDS = 253 /* SCM_MAX_FD */, LOST = 120 };
enum { STAGE_MOUNTS = 1, STAGE_FDS, STAGE_CGROUP, STAGE_CWD, STAGE_EXEC };
enum { UMASK = 022 };
struct order {
	u32 magic, version;
	/* The answer. `which` is the index of the path that failed. */
	int pid, stage, error, which;
	/* Our parent. A program that nobody waits for is not started. */
	int keeper;
	/* File descriptors; -1: none. `born` is the index of the path of `cgroup`. */
	int ends, mounts, cgroup, born;
	u32 nfds, npaths, argc, envc, has_nofile;
	struct rlimit nofile;
	/* `nfds` numbers, which become 0 to nfds - 1; then strings: cwd, paths, argv, env. */
	int fds[];
};
_Static_assert(sizeof(struct order) == 80, "the layout is part of the protocol");

static void fail(struct order *o, int stage, long error, int which)
{
	o->error = (int)-error;
	o->which = which;
	o->stage = stage;
	exit(LOST);
}

static long must(struct order *o, int stage, long result)
{
	if (result < 0)
		fail(o, stage, result, 0);
	return result;
}

/* Make the order's fds our 0 to n - 1, those of 0 to 2 that are missing /dev/null, and all else close-on-exec. */
static void place(struct order *o)
{
	static const char null[] = "/dev/null";
	int fds[MAX_FDS], n = o->nfds < 3 ? 3 : (int)o->nfds;
	for (int i = 0; i < n; i++)
		fds[i] = i < (int)o->nfds ? o->fds[i] : -1;
	/* Out of the way first: what one needs may lie where another one goes. */
	must(o, STAGE_FDS, CALL3(fcntl, o->ends, F_DUPFD_CLOEXEC, n));
	for (int i = 0; i < n; i++)
		if (fds[i] < 0)
			fds[i] = (int)must(o, STAGE_FDS, CALL4(openat, AT_FDCWD, null, O_RDWR | O_CLOEXEC, 0));
	for (int i = 0; i < n; i++)
		if (fds[i] < n)
			fds[i] = (int)must(o, STAGE_FDS, CALL3(fcntl, fds[i], F_DUPFD_CLOEXEC, n));
	for (int i = 0; i < n; i++)
		must(o, STAGE_FDS, CALL3(dup3, fds[i], i, 0));
	must(o, STAGE_FDS, CALL3(close_range, n, ~0u, CLOSE_RANGE_CLOEXEC));
}

static const char *after(const char *string)
{
	while (*string++)
		;
	return string;
}

static void become(struct order *o)
{
	const char *cwd = (const char *)(o->fds + o->nfds), *p = after(cwd);
	if (o->mounts >= 0)
		must(o, STAGE_MOUNTS, CALL2(setns, o->mounts, CLONE_NEWNS));
	must(o, STAGE_FDS, CALL0(setsid));
	CALL1(umask, UMASK);
	place(o);
	for (int i = 0; i < (int)o->npaths; i++, p = after(p)) {
		if (i == o->born)
			continue;
		/* "0" is the writer himself: cgroup_attach_task, Documentation/admin-guide/cgroup-v1/cgroups.rst. */
		long fd = CALL4(openat, AT_FDCWD, p, O_WRONLY | O_CLOEXEC, 0), written = fd;
		if (fd >= 0) {
			written = CALL3(write, fd, "0", 1);
			close((int)fd);
		}
		if (written < 0)
			fail(o, STAGE_CGROUP, written, i);
	}
	must(o, STAGE_CWD, CALL1(chdir, cwd));
	u64 pointers = ((u64)o->argc + o->envc + 2) * sizeof(char *);
	long at = syscall6(NR_mmap, 0, (long)pointers, PROT_RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(o, STAGE_EXEC, at < 0 && at > -4096 ? at : 0);
	const char **argv = (const char **)at, **env = argv + o->argc + 1;
	for (u32 i = 0; i < o->argc; i++, p = after(p))
		argv[i] = p;
	for (u32 i = 0; i < o->envc; i++, p = after(p))
		env[i] = p;
	if (o->has_nofile)
		must(o, STAGE_EXEC, CALL4(prlimit64, 0, RLIMIT_NOFILE, &o->nofile, 0));
	must(o, STAGE_EXEC, default_signals());
	/* From here on it ends with the keeper, which may die before it can tell anybody about it. */
	must(o, STAGE_EXEC, CALL2(prctl, PR_SET_PDEATHSIG, SIGKILL));
	if (CALL0(getppid) != o->keeper)
		exit(LOST);
	fail(o, STAGE_EXEC, CALL3(execve, argv[0], argv, env), 0);
}

/* Whether as many strings as announced, and nothing else, end exactly where the memory file does. */
static int valid(const struct order *o, long size)
{
	const char *end = (const char *)o + size, *p = (const char *)(o->fds + o->nfds);
	u64 strings = 1 + (u64)o->npaths + o->argc + o->envc;
	if (o->magic != MAGIC || o->version != VERSION || o->nfds > MAX_FDS || !o->argc || p >= end || end[-1])
		return 0;
	for (; strings && p < end; strings--)
		p = after(p);
	return !strings && p == end;
}

void start(long *stack)
{
	const char *digit = (const char *)stack[2];
	int memory = 0;
	if (stack[0] != 2)
		exit(64);
	for (; *digit >= '0' && *digit <= '9'; digit++)
		memory = memory * 10 + (*digit - '0');
	long size = CALL3(lseek, memory, 0, SEEK_END);
	if (*digit || size < (long)sizeof(struct order))
		exit(64);
	long at = syscall6(NR_mmap, 0, size, PROT_RW, MAP_SHARED, memory, 0);
	if (at < 0 && at > -4096)
		exit(70);
	struct order *o = (struct order *)at;
	if (!valid(o, size))
		exit(64);
	if (o->cgroup >= 0) {
		/* The exit signal is ours, SIGCHLD: with CLONE_PARENT another one may not be given. */
		struct clone_args args = {CLONE_INTO_CGROUP | CLONE_PARENT | CLONE_VM | CLONE_VFORK | CLONE_PARENT_SETTID,
			0, 0, (u64)&o->pid, 0, 0, 0, 0, 0, 0, (u64)o->cgroup};
		long pid = inline_syscall6(NR_clone3, (long)&args, sizeof args, 0, 0, 0, 0);
		if (pid > 0)
			exit(0); /* on a stack that was the sibling's meanwhile: nothing may be read from it */
		if (pid == 0)
			become(o);
		o->born = -1;
	}
	o->pid = (int)CALL0(getpid);
	become(o);
}
