/* SPDX-License-Identifier: Apache-2.0
 *
 * init: the PID 1 of a container. It reaps, and it spawns what the host asks for. No libc, no allocation, no files.
 *
 * Started as   init         fd 3 = control socket (AF_UNIX SOCK_SEQPACKET), fd 4 may be its own ELF
 *          or  init first ROOT [groups]   reaps and does nothing else, as PID 1 of a new pid namespace that containers
 *                                share; see `begin` and `wait_only`. With a third word it keeps its groups
 *
 * One request is one packet on fd 3: `struct request` and file descriptors by SCM_RIGHTS, in this order:
 *   life   SOCK_SEQPACKET, ours until the process has ended: STARTED (with its pidfd) or FAILED, later ENDED. The child has
 *          it until its exec, and says FAILED here, too, before our ENDED: so whoever comes after a host that was killed
 *          can tell that a program has never run from one that has ended with the same status
 *   go     SOCK_SEQPACKET, the child's: one byte from the host says go, EOF says never mind (FAILED). The child answers with
 *          PLACED where it got `tasks`, TTY (with the master) where a terminal was asked for, and FAILED where a step failed. EOF says that exec
 *          has worked, since the fd is close-on-exec.
 *   spec   memfd: groups, rlimits, cwd, argv, env. Only the child reads it, so that nothing of variable size ever
 *          gets into PID 1.
 *   stdin, stdout, stderr   unless a terminal was asked for
 *   cgroup, tasks...   with FLAG_CGROUP: a cgroup2 directory in which the child is born, and `ntasks` open v1 files
 *          `tasks` into which it writes itself. Both are quick; a host that moves it by its pid waits 10 ms and more.
 *          So with `tasks` the child says PLACED on `go` when it has done so: STARTED may come before that.
 * A packet that is not a request is dropped with its fds: the host sees EOF on `life`.
 * EOF on fd 3 (all hosts are gone) ends init, and the kernel ends its pid namespace with it.
 *
 * What holds an attacker who is root inside: a program that its user may execute but not read makes the kernel give
 * the memory to the user namespace that owns the file (would_dump(), fs/exec.c), so CAP_SYS_PTRACE of an inner user
 * namespace does not reach PID 1, nor a child before its exec: no /proc/1/{mem,fd,exe,root,ns}, no ptrace, no
 * pidfd_getfd. Signals are ignored rather than blocked: the kernel queues blocked ones, ignored ones cost nothing.
 * What does not: having our user id he may lower our limits (prlimit) and our priority, and so slow or end his own
 * container; the host then sees EOF without ENDED, and never a status that was made up.
 *
 * With FLAG_MAIN the end of the process is the end of init, and so of its pid namespace.
 * With FLAG_DENY_CLONE3 the child is left without clone3, whose flags no seccomp filter can see; init needs it for
 * FLAG_CGROUP, so the container's filter has to let it through.
 * With FLAG_KEEP_GROUPS the child keeps the groups that init has: where setgroups is denied, since the user namespace of
 * an ordinary user has no id but his own.
 *
 * System calls used; a seccomp profile must allow them (clone3 only for FLAG_CGROUP):
 *   capset chdir clone clone3 close close_range dup3 execve exit_group getpid ioctl kill lseek mmap openat pidfd_open ppoll
 *   prctl prlimit64 read recvmsg rt_sigaction rt_sigprocmask sendmsg setfsuid setgroups setresgid setresuid
 *   setsid signalfd4 umask wait4 write
 * Before it is the PID 1 of a namespace of its own making: mount pivot_root setns umount2 unshare, too; then only
 * rt_sigtimedwait and wait4, which it sees to itself.
 */

#include "kernel.h"

/* ---- the protocol; src/unisandbox/host/init/protocol.py says the same ---- */
enum { MAGIC = 0x54494e55 /* "UNIT" */, VERSION = 2 };
enum { CONTROL = 3, SIGNALS = 4, MAX_FDS = 253 /* SCM_MAX_FD */, MAX_LIVE = 4096 };
enum { GO = 3, LIFE = 4, SPEC = 5 }; /* of the child */
enum { FLAG_TTY = 1, FLAG_NO_NEW_PRIVS = 2, FLAG_AMBIENT = 4, FLAG_MAIN = 8, FLAG_CGROUP = 16, FLAG_DENY_CLONE3 = 32,
	FLAG_KEEP_GROUPS = 64, FLAGS = 127 };
enum { MAX_SPEC = 8 << 20, MAX_GROUPS = 65536, MAX_RLIMITS = 16, MAX_TASKS = 8 };
enum { STARTED = 1, ENDED = 2, FAILED = 3, TTY = 4, PLACED = 5 };
enum { STEP_TABLE = 1, STEP_CLONE, STEP_REPLY, STEP_FDS, STEP_SPEC, STEP_SETSID, STEP_TTY, STEP_RLIMITS, STEP_BOUNDING,
	STEP_GROUPS, STEP_GID, STEP_UID, STEP_CAPABILITIES, STEP_AMBIENT, STEP_NO_NEW_PRIVS, STEP_CWD, STEP_SIGNALS,
	STEP_EXEC, STEP_CGROUP, STEP_NAMESPACES, STEP_ROOT, STEP_GO };
struct request {
	u32 magic;
	u16 version, flags;
	u32 spec_size, ngroups, nrlimits, argc, envc;
	u32 uid, gid, umask;
	u16 rows, cols;
	u32 ntasks, reserved[2];
	u64 capabilities;
};
_Static_assert(sizeof(struct request) == 64 && sizeof(long) == 8, "the layout is part of the protocol");
struct answer { u32 kind; int a, b; };
struct spec_rlimit { u32 resource, reserved; struct rlimit limit; };

static struct live { int pid, life, ended, status, main; } live[MAX_LIVE];
static u32 live_count, unsent;
static int main_ended;
static u32 live_limit = MAX_LIVE;
static struct rlimit first_nofile;

/* Send an answer, with one fd unless it is negative. Never blocks. */
static long answer(int to, u32 kind, int a, int b, int fd)
{
	struct answer body = {kind, a, b};
	struct { struct cmsghdr head; int fd; u32 pad; } control = {{sizeof(struct cmsghdr) + sizeof(int), SOL_SOCKET, SCM_RIGHTS}, fd, 0};
	struct iovec iov = {&body, sizeof body};
	struct msghdr message = {0, 0, &iov, 1, fd < 0 ? 0 : &control, fd < 0 ? 0 : sizeof control, 0};
	return CALL3(sendmsg, to, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* ---- the child: everything between clone and execve ---- */
static void fail_on(int go, int life, int step, long error)
{
	answer(go, FAILED, step, (int)-error, -1);
	answer(life, FAILED, step, (int)-error, -1); /* whoever reads `go` may be about to be killed */
	exit(127);
}

static void fail(int step, long error)
{
	fail_on(GO, LIFE, step, error);
}

static long must(int step, long result)
{
	if (result < 0)
		fail(step, result);
	return result;
}

static void child_tty(const struct request *r)
{
	static const char ptmx[] = "/dev/ptmx";
	struct winsize size = {r->rows, r->cols, 0, 0};
	int unlocked = 0;
	/* devpts gives a new terminal to the fsuid of its opener, so that the user can open /dev/tty. */
	CALL1(setfsuid, r->uid);
	int master = (int)must(STEP_TTY, CALL4(openat, AT_FDCWD, ptmx, O_RDWR | O_NOCTTY | O_CLOEXEC, 0));
	CALL1(setfsuid, 0);
	must(STEP_TTY, CALL3(ioctl, master, TIOCSPTLCK, &unlocked));
	int slave = (int)must(STEP_TTY, CALL3(ioctl, master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC));
	must(STEP_TTY, CALL3(ioctl, slave, TIOCSWINSZ, &size));
	must(STEP_TTY, CALL3(ioctl, slave, TIOCSCTTY, 0));
	must(STEP_TTY, answer(GO, TTY, 0, 0, master));
	for (int i = 0; i < 3; i++)
		must(STEP_TTY, CALL3(dup3, slave, i, 0));
	must(STEP_TTY, CALL3(close_range, SPEC, ~0u, 0));
}

/* Leave no more than these to whatever is executed from now on; or an errno. */
static long bound(u64 capabilities)
{
	for (int cap = 0; cap < 64; cap++) {
		long has = CALL2(prctl, PR_CAPBSET_READ, cap);
		if (has < 0)
			break; /* past the kernel's last capability */
		long error = has && !(capabilities >> cap & 1) ? CALL2(prctl, PR_CAPBSET_DROP, cap) : 0;
		if (error < 0)
			return error;
	}
	return 0;
}

static void child_credentials(const struct request *r, const u32 *groups)
{
	must(STEP_BOUNDING, bound(r->capabilities));
	must(STEP_CAPABILITIES, CALL2(prctl, PR_SET_KEEPCAPS, 1));
	if (!(r->flags & FLAG_KEEP_GROUPS))
		must(STEP_GROUPS, CALL2(setgroups, r->ngroups, groups));
	must(STEP_GID, CALL3(setresgid, r->gid, r->gid, r->gid));
	must(STEP_UID, CALL3(setresuid, r->uid, r->uid, r->uid));
	struct cap_header head = {CAP_VERSION_3, 0};
	struct cap_data data[2];
	for (int i = 0; i < 2; i++) {
		/* A user who is not root has none after exec, so let chdir and exec be judged without them too. */
		u32 wanted = r->uid && !(r->flags & FLAG_AMBIENT) ? 0 : (u32)(r->capabilities >> (32 * i));
		data[i].permitted = data[i].effective = wanted;
		data[i].inheritable = r->flags & FLAG_AMBIENT ? wanted : 0;
	}
	must(STEP_CAPABILITIES, CALL2(capset, &head, data));
	must(STEP_UID, CALL2(prctl, PR_SET_DUMPABLE, 0)); /* with fs.suid_dumpable=1 other ids have made it 1 */
	must(STEP_AMBIENT, CALL2(prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL));
	if (r->flags & FLAG_AMBIENT)
		for (int cap = 0; cap < 64; cap++)
			if (r->capabilities >> cap & 1)
				must(STEP_AMBIENT, CALL3(prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap));
}

/* seccomp(2): filters add up, and the strictest answer counts. */
static void child_without_clone3(void)
{
	static const struct sock_filter filter[] = {
		{BPF_LD_W_ABS, 0, 0, 0}, /* offsetof(struct seccomp_data, nr) */
		{BPF_JEQ_K, 0, 1, NR_clone3},
		{BPF_RET_K, 0, 0, SECCOMP_RET_ENOSYS},
		{BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW},
	};
	const struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
	must(STEP_NO_NEW_PRIVS, CALL5(prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0));
}

/* execvpe(3), without its shell for files that are no programs. */
static long child_exec(char **argv, char **env)
{
	static char path[4096];
	const char *dirs = "/bin:/usr/bin";
	long refused = 0;
	for (char *p = argv[0]; *p; p++)
		if (*p == '/')
			return CALL3(execve, argv[0], argv, env);
	if (!argv[0][0])
		return -ENOENT;
	for (char **e = env; *e; e++)
		if ((*e)[0] == 'P' && (*e)[1] == 'A' && (*e)[2] == 'T' && (*e)[3] == 'H' && (*e)[4] == '=') {
			dirs = *e + 5;
			break;
		}
	for (;;) {
		u32 n = 0;
		while (*dirs && *dirs != ':' && n < sizeof path - 1)
			path[n++] = *dirs++;
		if (n)
			path[n++] = '/';
		for (char *p = argv[0]; *p && n < sizeof path; p++)
			path[n++] = *p;
		long error = -ENAMETOOLONG;
		if (n < sizeof path && (!*dirs || *dirs == ':')) {
			path[n] = 0;
			error = CALL3(execve, path, argv, env);
		}
		if (error == -EACCES)
			refused = error;
		else if (error != -ENOENT && error != -ENOTDIR && error != -ENAMETOOLONG)
			return error;
		while (*dirs && *dirs != ':')
			dirs++;
		if (!*dirs++)
			return refused ? refused : -ENOENT;
	}
}

/* fds 0-2 are in place (or will be the terminal), and the three of the child's own. */
static void child(const struct request *r)
{
	u8 byte;
	long n;
	while ((n = CALL3(read, GO, &byte, 1)) == -EINTR)
		;
	if (n != 1)
		fail(STEP_GO, -ECANCELED);

	u64 rlimits_at = ((u64)r->ngroups * sizeof(u32) + 7) & ~7ul;
	u64 strings_at = rlimits_at + (u64)r->nrlimits * sizeof(struct spec_rlimit);
	u64 pointers = ((u64)r->argc + r->envc + 2) * sizeof(char *);
	if (must(STEP_SPEC, CALL3(lseek, SPEC, 0, SEEK_END)) != (long)r->spec_size || strings_at >= r->spec_size)
		fail(STEP_SPEC, -EINVAL);
	long at = syscall6(NR_mmap, 0, r->spec_size, PROT_RW, MAP_PRIVATE, SPEC, 0);
	must(STEP_SPEC, at < 0 && at > -4096 ? at : 0);
	char *spec = (char *)at;
	at = syscall6(NR_mmap, 0, (long)pointers, PROT_RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(STEP_SPEC, at < 0 && at > -4096 ? at : 0);
	char **argv = (char **)at, **env = argv + r->argc + 1;
	close(SPEC);

	char *cwd = spec + strings_at, *p = cwd, *end = spec + r->spec_size;
	if (end[-1])
		fail(STEP_SPEC, -EINVAL);
	for (u64 i = 0; i <= (u64)r->argc + r->envc; i++) {
		if (p >= end)
			fail(STEP_SPEC, -EINVAL);
		if (i > r->argc)
			env[i - r->argc - 1] = p;
		else if (i)
			argv[i - 1] = p;
		while (*p++)
			;
	}
	if (p != end)
		fail(STEP_SPEC, -EINVAL);

	must(STEP_SETSID, CALL0(setsid));
	if (r->flags & FLAG_TTY)
		child_tty(r);
	must(STEP_RLIMITS, CALL4(prlimit64, 0, RLIMIT_NOFILE, &first_nofile, 0));
	struct spec_rlimit *limits = (struct spec_rlimit *)(spec + rlimits_at);
	for (u32 i = 0; i < r->nrlimits; i++)
		must(STEP_RLIMITS, CALL4(prlimit64, 0, limits[i].resource, &limits[i].limit, 0));
	CALL1(umask, r->umask);
	child_credentials(r, (u32 *)spec);
	if (r->flags & FLAG_NO_NEW_PRIVS)
		must(STEP_NO_NEW_PRIVS, CALL5(prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	if (r->flags & FLAG_DENY_CLONE3)
		child_without_clone3();
	must(STEP_CWD, CALL1(chdir, cwd));
	must(STEP_SIGNALS, default_signals());
	fail(STEP_EXEC, child_exec(argv, env));
}

/* ---- PID 1 ---- */
static void forget(struct live *l)
{
	close(l->life);
	unsent -= (u32)l->ended;
	main_ended |= l->main;
	*l = live[--live_count];
}

/* Tell the host that a process has ended. A `life` that takes nothing now is tried again by the main loop. */
static int tell(struct live *l)
{
	long sent = answer(l->life, ENDED, l->status, 0, -1);
	if (sent == -EAGAIN || sent == -ENOMEM || sent == -EINTR)
		return 0;
	forget(l); /* told, or nobody is left to tell */
	return 1;
}

/* Reap what has ended. At most 256 at once: whoever makes zombies must not keep the host waiting. True if done. */
static int reap(void)
{
	for (int budget = 256; budget; budget--) {
		int status;
		long pid = CALL4(wait4, -1, &status, WNOHANG | WALL, 0);
		if (pid <= 0)
			return 1;
		for (u32 i = 0; i < live_count; i++)
			if (live[i].pid == pid && !live[i].ended) {
				live[i].ended = 1;
				live[i].status = status;
				unsent++;
				tell(&live[i]);
				break;
			}
	}
	return 0;
}

static int base_fds(const struct request *r)
{
	return r->flags & FLAG_TTY ? 3 : 6;
}

static int valid(const struct request *r, long size, int nfds)
{
	return size == sizeof *r && r->magic == MAGIC && r->version == VERSION && !(r->flags & ~FLAGS) &&
	       r->ntasks <= (r->flags & FLAG_CGROUP ? MAX_TASKS : 0) &&
	       nfds == base_fds(r) + (r->flags & FLAG_CGROUP ? 1 + (int)r->ntasks : 0) && r->spec_size && r->spec_size <= MAX_SPEC &&
	       r->ngroups <= MAX_GROUPS && r->nrlimits <= MAX_RLIMITS && r->argc && r->argc <= r->spec_size &&
	       r->envc <= r->spec_size && r->umask <= 0777 && !(r->reserved[0] | r->reserved[1]) &&
	       !(r->flags & FLAG_KEEP_GROUPS && r->ngroups) && r->uid != ~0u && r->gid != ~0u; /* -1 would mean "as it is" to setresuid: root */
}

static void spawn(const struct request *r, const int *fds)
{
	int life = fds[0];
	if (live_count >= live_limit) {
		answer(life, FAILED, STEP_TABLE, EAGAIN, -1);
		close(life);
		return;
	}
	const int *cgroup = fds + base_fds(r);
	struct clone_args args = {CLONE_INTO_CGROUP, 0, 0, 0, SIGCHLD, 0, 0, 0, 0, 0, (u64)*cgroup};
	long pid = r->flags & FLAG_CGROUP ? CALL2(clone3, &args, sizeof args) : CALL5(clone, SIGCHLD, 0, 0, 0, 0);
	if (pid == 0) {
		/* What came by SCM_RIGHTS lies above 4, so no order of these can overwrite one that is still needed; with `spec`
		 * that could be, so it comes last.
		 * From here on the child holds nothing of init's: no control socket, no life of another process. */
		long bad = CALL3(dup3, fds[1], GO, O_CLOEXEC);
		if (bad >= 0)
			bad = CALL3(dup3, life, LIFE, O_CLOEXEC);
		if (bad < 0) /* his limit was lowered just now: what has these numbers is init's */
			fail_on(fds[1], life, STEP_FDS, bad);
		for (int i = 0; i < 3 && bad >= 0 && !(r->flags & FLAG_TTY); i++)
			bad = CALL3(dup3, fds[3 + i], i, 0);
		for (u32 i = 1; i <= r->ntasks && bad >= 0; i++) /* "0" is the writer himself */
			must(STEP_CGROUP, CALL3(write, cgroup[i], "0", 1));
		if (r->ntasks && bad >= 0)
			bad = answer(GO, PLACED, 0, 0, -1);
		if (bad >= 0 && fds[2] != SPEC)
			bad = CALL3(dup3, fds[2], SPEC, O_CLOEXEC);
		if (bad >= 0)
			bad = CALL3(close_range, SPEC + 1, ~0u, 0);
		must(STEP_FDS, bad);
		child(r);
	}
	if (pid < 0) {
		answer(life, FAILED, STEP_CLONE, (int)-pid, -1);
		close(life);
		return;
	}
	/* Not reaped yet, so this pid is still its. (No CLONE_PIDFD: qemu-user, which tests aarch64, does not know it.) */
	long pidfd = CALL2(pidfd_open, pid, 0);
	long sent = pidfd < 0 ? pidfd : answer(life, STARTED, (int)pid, 0, (int)pidfd);
	if (pidfd >= 0)
		close((int)pidfd);
	if (sent < 0) {
		CALL2(kill, pid, SIGKILL);
		answer(life, FAILED, STEP_REPLY, (int)-sent, -1);
		close(life);
		return;
	}
	live[live_count++] = (struct live){(int)pid, life, 0, 0, r->flags & FLAG_MAIN};
}

/* Use all the descriptors that the hard limit gives: there is one `life` per process. Root inside has our user id,
 * so the kernel lets it lower our limits: what it lowers softly is raised again here. Returns what there is. */
static u64 take_descriptors(struct rlimit *was)
{
	CALL4(prlimit64, 0, RLIMIT_NOFILE, 0, was);
	struct rlimit all = {was->hard, was->hard};
	if (was->soft < was->hard)
		CALL4(prlimit64, 0, RLIMIT_NOFILE, &all, 0);
	return was->hard;
}

/* One packet. False when all hosts are gone. */
static int receive(int hung_up)
{
	static union { struct request request; u8 bytes[sizeof(struct request) + 1]; } body;
	static u64 control[(sizeof(struct cmsghdr) + MAX_FDS * sizeof(int) + 7) / 8 + 8];
	struct iovec iov = {&body, sizeof body};
	struct msghdr message = {0, 0, &iov, 1, control, sizeof control, 0};
	int fds[MAX_FDS], nfds = 0;
	long size = CALL3(recvmsg, CONTROL, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (size == -EAGAIN || size == -EINTR || size == -ENOMEM || size == -ECONNRESET)
		return 1;
	if (size < 0)
		return 0;
	for (u64 at = 0; at + sizeof(struct cmsghdr) <= message.controllen;) {
		struct cmsghdr *c = (struct cmsghdr *)((u8 *)control + at);
		if (c->len < sizeof *c || c->len > message.controllen - at)
			break;
		if (c->level == SOL_SOCKET && c->type == SCM_RIGHTS)
			for (u64 i = 0; i < (c->len - sizeof *c) / sizeof(int) && nfds < MAX_FDS; i++)
				fds[nfds++] = ((int *)(c + 1))[i];
		at += (c->len + 7) & ~7ul;
	}
	int kept = 0;
	struct rlimit was;
	if (message.flags & MSG_CTRUNC)
		take_descriptors(&was);
	else if (!(message.flags & MSG_TRUNC) && valid(&body.request, size, nfds)) {
		spawn(&body.request, fds);
		kept = 1; /* `life` is spawn's */
	}
	for (int i = kept; i < nfds; i++)
		close(fds[i]);
	return size > 0 || nfds || !hung_up;
}

static void serve(void)
{
	struct pollfd polled[2] = {{CONTROL, POLLIN | POLLRDHUP, 0}, {SIGNALS, POLLIN, 0}};
	int reaped = 1;
	while (!main_ended) {
		struct timespec now = {0, 0}, soon = {0, 100000000};
		struct timespec *wait = !reaped ? &now : unsent ? &soon : 0;
		if (CALL5(ppoll, polled, 2, wait, 0, 8) < 0) {
			/* EINVAL when even two fds are over the limit. If it cannot be raised somebody inside wants the end
			 * of the container, and gets it; to go on would be to spin. */
			struct rlimit was;
			if (take_descriptors(&was) < 2)
				return;
			continue;
		}
		if (unsent)
			for (u32 i = 0; i < live_count;)
				i += !(live[i].ended && tell(&live[i]));
		if (!reaped || polled[1].revents) {
			static u8 info[128]; /* struct signalfd_siginfo */
			if (polled[1].revents)
				CALL3(read, SIGNALS, info, sizeof info);
			reaped = reap();
		}
		if (polled[0].revents &&
		    !receive(polled[0].revents & (POLLHUP | POLLRDHUP | POLLERR | POLLNVAL)))
			return;
	}
}

/* ---- the first process of a pid namespace that containers share ---- */
static void said(int step, long value)
{
	int body[2] = {step, (int)value};
	CALL3(write, 1, body, sizeof body);
	exit(value > 0 ? 0 : 70);
}

static void need(int step, long result)
{
	if (result < 0)
		said(step, result);
}

/* Joins the namespaces that are open as 4, 5 ... (a user namespace comes last), takes the directory `root` for all that
 * it will ever see, gives up every privilege, and makes the namespace. Returns in its PID 1, a child of our own parent;
 * that one's pid, or the step that failed with its errno, is said on fd 1.
 *
 * The mount namespace is its own and has nothing but `root`: with a mere chroot, who may look through /proc/1/root could
 * go up from there. */
static void begin(const char *root, int keep_groups)
{
	static const struct cap_data none[2];
	struct cap_header head = {CAP_VERSION_3, 0};
	long joined = 0;
	if (!keep_groups)
		need(STEP_GROUPS, CALL2(setgroups, 0, 0));
	for (int fd = 4; joined >= 0; fd++)
		joined = CALL2(setns, fd, 0);
	need(STEP_NAMESPACES, joined == -EBADF ? 0 : joined);
	need(STEP_GID, CALL3(setresgid, 0, 0, 0));
	need(STEP_UID, CALL3(setresuid, 0, 0, 0));
	need(STEP_NAMESPACES, CALL1(unshare, CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWCGROUP));
	need(STEP_ROOT, CALL5(mount, 0, "/", 0, MS_REC | MS_SLAVE, 0));
	/* What came from a more privileged namespace cannot be moved; a mount of our own can. */
	need(STEP_ROOT, CALL5(mount, root, root, 0, MS_BIND | MS_REC, 0));
	need(STEP_CWD, CALL1(chdir, root));
	need(STEP_ROOT, CALL2(pivot_root, ".", "."));
	need(STEP_ROOT, CALL2(umount2, ".", MNT_DETACH));
	need(STEP_ROOT, CALL1(chdir, "/"));
	need(STEP_BOUNDING, bound(0));
	need(STEP_CAPABILITIES, CALL2(prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL));
	need(STEP_CAPABILITIES, CALL2(capset, &head, none));
	need(STEP_NO_NEW_PRIVS, CALL5(prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	long pid = CALL5(clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
	if (pid)
		said(STEP_CLONE, pid);
}

/* Reaps to its end. It asks the kernel for nothing else from here on, and is ended if anybody makes it. */
static void wait_only(const u64 *chld)
{
	static const struct sock_filter filter[] = {
		{BPF_LD_W_ABS, 0, 0, 4}, /* offsetof(struct seccomp_data, arch) */
		{BPF_JEQ_K, 0, 3, AUDIT_ARCH},
		{BPF_LD_W_ABS, 0, 0, 0}, /* offsetof(struct seccomp_data, nr) */
		{BPF_JEQ_K, 2, 0, NR_rt_sigtimedwait},
		{BPF_JEQ_K, 1, 0, NR_wait4},
		{BPF_RET_K, 0, 0, SECCOMP_RET_KILL_PROCESS},
		{BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW},
	};
	const struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
	if (CALL5(prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) < 0)
		exit(70);
	for (;;) {
		CALL4(rt_sigtimedwait, chld, 0, 0, sizeof *chld);
		while (!reap())
			;
	}
}

void start(long *stack)
{
	char **argv = (char **)(stack + 1);
	u64 chld = 1ul << (SIGCHLD - 1);
	struct kernel_sigaction ignore = {SIG_IGN, 0, 0, 0}, normal = {SIG_DFL, 0, 0, 0};
	int first = stack[0] >= 3 && argv[1][0] == 'f';
	if (stack[0] > 1 && !first)
		exit(64);
	if (first) {
		begin(argv[2], stack[0] > 3);
		/* Whoever shares the namespace may read our command line: a path of the host is nobody's business. */
		for (char *c = argv[2]; *c; c++)
			*c = 0;
	}
	/* After the change of ids, which would undo it. */
	if (CALL2(prctl, PR_SET_DUMPABLE, 0) < 0)
		exit(70);
	if (CALL3(close_range, first ? 0 : CONTROL + 1, ~0u, 0) < 0)
		exit(70);
	/* The parent is the keeper by now. Without it nobody reaps us nor finds us: what runs here ends with it, and
	 * whoever waits on a `life` hears of it at once. */
	CALL2(prctl, PR_SET_PDEATHSIG, SIGKILL);
	CALL2(prctl, PR_SET_NAME, "init");
	/* Where it is not PID 1 (shared pid namespace) the orphans of its container are its too. */
	CALL2(prctl, PR_SET_CHILD_SUBREAPER, 1);
	for (int n = 1; n <= NSIG; n++)
		if (n != SIGKILL && n != SIGSTOP)
			CALL4(rt_sigaction, n, n == SIGCHLD ? &normal : &ignore, 0, sizeof chld);
	CALL4(rt_sigprocmask, SIG_SETMASK, &chld, 0, sizeof chld);
	if (first)
		wait_only(&chld);
	if (CALL4(signalfd4, -1, &chld, sizeof chld, O_CLOEXEC | 04000 /* SFD_NONBLOCK */) != SIGNALS)
		exit(70);
	for (int i = 0; i < 3; i++) /* taken, so that nothing received lands there; no path is opened for it */
		if (CALL3(dup3, SIGNALS, i, O_CLOEXEC) < 0)
			exit(70);
	u64 descriptors = take_descriptors(&first_nofile); /* each child gets the first soft limit back */
	if (descriptors < MAX_LIVE + 32)
		live_limit = descriptors > 64 ? (u32)descriptors - 32 : 16;
	serve();
	if (CALL0(getpid) != 1) /* nobody else ends them then */
		for (u32 i = 0; i < live_count; i++)
			if (!live[i].ended)
				CALL2(kill, live[i].pid, SIGKILL);
	exit(0);
}
