/* SPDX-License-Identifier: Apache-2.0
 *
 * What the small programs share: their first instruction, system calls without a libc, and the kernel's words for them.
 * A program has one source file, includes this once and defines `start`, which gets the first stack (argc, argv, env)
 * and never returns.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#if defined(__x86_64__)
static const u32 AUDIT_ARCH = 0xc000003e;
enum { NR_read = 0, NR_write = 1, NR_close = 3, NR_lseek = 8, NR_mmap = 9, NR_rt_sigaction = 13, NR_rt_sigprocmask = 14,
	NR_ioctl = 16, NR_getpid = 39, NR_fcntl = 72, NR_getppid = 110, NR_setns = 308, NR_sendmsg = 46, NR_recvmsg = 47, NR_clone = 56, NR_execve = 59, NR_wait4 = 61,
	NR_kill = 62, NR_chdir = 80, NR_umask = 95, NR_setsid = 112, NR_setgroups = 116, NR_setresuid = 117,
	NR_setresgid = 119, NR_setfsuid = 122, NR_capset = 126, NR_rt_sigtimedwait = 128,
	NR_prctl = 157, NR_exit_group = 231, NR_openat = 257, NR_ppoll = 271, NR_signalfd4 = 289, NR_dup3 = 292,
	NR_prlimit64 = 302, NR_pidfd_open = 434, NR_clone3 = 435, NR_close_range = 436,
	NR_pivot_root = 155, NR_mount = 165, NR_umount2 = 166, NR_unshare = 272 };
static inline __attribute__((always_inline)) long inline_syscall6(long n, long a, long b, long c, long d, long e, long f)
{
	long ret;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	__asm__ volatile("syscall" : "=a"(ret) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
}
__asm__(".text\n.global _start\n_start:\n\txor %ebp,%ebp\n\tmov %rsp,%rdi\n\tand $-16,%rsp\n\tcall start\n\thlt\n");
#elif defined(__aarch64__)
static const u32 AUDIT_ARCH = 0xc00000b7;
enum { NR_read = 63, NR_write = 64, NR_close = 57, NR_lseek = 62, NR_mmap = 222, NR_rt_sigaction = 134, NR_rt_sigprocmask = 135,
	NR_ioctl = 29, NR_getpid = 172, NR_fcntl = 25, NR_getppid = 173, NR_setns = 268, NR_sendmsg = 211, NR_recvmsg = 212, NR_clone = 220, NR_execve = 221,
	NR_wait4 = 260, NR_kill = 129, NR_chdir = 49, NR_umask = 166, NR_setsid = 157, NR_setgroups = 159,
	NR_setresuid = 147, NR_setresgid = 149, NR_setfsuid = 151, NR_capset = 91,
	NR_rt_sigtimedwait = 137, NR_prctl = 167, NR_exit_group = 94, NR_openat = 56, NR_ppoll = 73, NR_signalfd4 = 74,
	NR_dup3 = 24, NR_prlimit64 = 261, NR_pidfd_open = 434,
	NR_clone3 = 435, NR_close_range = 436,
	NR_umount2 = 39, NR_mount = 40, NR_pivot_root = 41, NR_unshare = 97 };
static inline __attribute__((always_inline)) long inline_syscall6(long n, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
}
__asm__(".text\n.global _start\n_start:\n\tmov x29,#0\n\tmov x30,#0\n\tmov x0,sp\n\tbl start\n\tbrk #0\n");
#else
#error "only x86_64 and aarch64 are known here"
#endif

/* Inline where two processes return from one call on one stack (vfork): the first would overwrite the other's way back. */
static __attribute__((noinline)) long syscall6(long n, long a, long b, long c, long d, long e, long f)
{
	return inline_syscall6(n, a, b, c, d, e, f);
}

#define CALL5(n, a, b, c, d, e) syscall6(NR_##n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)
#define CALL4(n, a, b, c, d) CALL5(n, a, b, c, d, 0)
#define CALL3(n, a, b, c) CALL5(n, a, b, c, 0, 0)
#define CALL2(n, a, b) CALL5(n, a, b, 0, 0, 0)
#define CALL1(n, a) CALL5(n, a, 0, 0, 0, 0)
#define CALL0(n) CALL5(n, 0, 0, 0, 0, 0)

/* gcc may call this one also in freestanding code. */
void *memset(void *to, int byte, u64 size)
{
	volatile u8 *p = to;
	while (size--)
		*p++ = (u8)byte;
	return to;
}

/* ---- the kernel's words (include/uapi/linux, asm-generic) ---- */
enum { ENOENT = 2, EINTR = 4, EBADF = 9, EAGAIN = 11, ENOMEM = 12, EACCES = 13, ENOTDIR = 20, EINVAL = 22, ENAMETOOLONG = 36,
	ECONNRESET = 104, ECANCELED = 125 };
enum { POLLIN = 1, POLLERR = 8, POLLHUP = 16, POLLNVAL = 32, POLLRDHUP = 0x2000 };
enum { SOL_SOCKET = 1, SCM_RIGHTS = 1, MSG_CTRUNC = 8, MSG_TRUNC = 0x20, MSG_DONTWAIT = 0x40, MSG_NOSIGNAL = 0x4000,
	MSG_CMSG_CLOEXEC = 0x40000000 };
enum { O_WRONLY = 1, O_RDWR = 2, O_NOCTTY = 0400, O_CLOEXEC = 02000000, AT_FDCWD = -100, SEEK_END = 2, F_DUPFD_CLOEXEC = 1030,
	CLOSE_RANGE_CLOEXEC = 4 };
enum { WNOHANG = 1, WALL = 0x40000000 };
enum { SIGKILL = 9, SIGCHLD = 17, SIGSTOP = 19, NSIG = 64, SIG_BLOCK = 0, SIG_SETMASK = 2 };
enum { PR_SET_PDEATHSIG = 1, PR_SET_DUMPABLE = 4, PR_SET_KEEPCAPS = 8, PR_SET_NAME = 15, PR_SET_SECCOMP = 22, PR_CAPBSET_READ = 23, PR_CAPBSET_DROP = 24,
	PR_SET_CHILD_SUBREAPER = 36, PR_SET_NO_NEW_PRIVS = 38, PR_CAP_AMBIENT = 47, PR_CAP_AMBIENT_RAISE = 2,
	PR_CAP_AMBIENT_CLEAR_ALL = 4 };
enum { TIOCSPTLCK = 0x40045431, TIOCGPTPEER = 0x5441, TIOCSCTTY = 0x540e, TIOCSWINSZ = 0x5414 };
enum { PROT_RW = 3, MAP_SHARED = 1, MAP_PRIVATE = 2, MAP_ANONYMOUS = 0x20, RLIMIT_NOFILE = 7, CAP_VERSION_3 = 0x20080522 };
struct pollfd { int fd; u16 events, revents; };
struct timespec { long sec, nsec; };
struct iovec { void *base; u64 len; };
struct msghdr { void *name; u32 namelen; struct iovec *iov; u64 iovlen; void *control; u64 controllen; u32 flags; };
struct cmsghdr { u64 len; int level, type; };
struct rlimit { u64 soft, hard; };
struct kernel_sigaction { u64 handler, flags, restorer, mask; };
struct cap_header { u32 version; int pid; };
struct cap_data { u32 effective, permitted, inheritable; };
struct winsize { u16 rows, cols, xpixel, ypixel; };
struct clone_args { u64 flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size,
	cgroup; };
struct sock_filter { u16 code; u8 jt, jf; u32 k; };
struct sock_fprog { u16 len; const struct sock_filter *filter; };
enum { BPF_LD_W_ABS = 0x20, BPF_JEQ_K = 0x15, BPF_RET_K = 0x06, SECCOMP_MODE_FILTER = 2 };
static const u32 SECCOMP_RET_ALLOW = 0x7fff0000, SECCOMP_RET_ENOSYS = 0x00050000 | 38, SECCOMP_RET_KILL_PROCESS = 0x80000000;
enum { CLONE_VM = 0x100, CLONE_VFORK = 0x4000, CLONE_PARENT = 0x8000, CLONE_NEWNS = 0x20000, CLONE_PARENT_SETTID = 0x100000,
	CLONE_NEWCGROUP = 0x2000000, CLONE_NEWPID = 0x20000000 };
enum { MS_BIND = 1 << 12, MS_REC = 1 << 14, MS_SLAVE = 1 << 19, MNT_DETACH = 2 };
static const u64 CLONE_INTO_CGROUP = 0x200000000ul;
static const u64 SIG_IGN = 1, SIG_DFL = 0;

static void close(int fd)
{
	CALL1(close, fd);
}

static void exit(int code)
{
	for (;;)
		CALL1(exit_group, code);
}

/* What exec would keep of our signals: ignored ones and the mask. Everything as a new process expects it; or an errno. */
static long default_signals(void)
{
	struct kernel_sigaction normal = {SIG_DFL, 0, 0, 0};
	u64 none = 0;
	for (int n = 1; n <= NSIG; n++)
		if (n != SIGKILL && n != SIGSTOP) {
			long error = CALL4(rt_sigaction, n, &normal, 0, sizeof none);
			if (error < 0)
				return error;
		}
	return CALL4(rt_sigprocmask, SIG_SETMASK, &none, 0, sizeof none);
}
