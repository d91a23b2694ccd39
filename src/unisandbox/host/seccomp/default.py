"""Our default profile: what ordinary programs need, and no more of the kernel than that.

It stands beside the other walls (user namespace, capabilities, no new privileges), so a call that these make harmless
may be here all the same; what is denied is denied because it opens parts of the kernel that programs in a sandbox
rarely need and that attackers often use. Three answers: allowed; EPERM for what is known and denied; ENOSYS for what
is not known, so that programs fall back as on an older kernel. 32-bit programs (and x32) are killed by SIGSYS: their
system calls have other numbers, and a second list is a second place for mistakes.

Differences from Docker's default that a user may meet: io_uring, vmsplice, modify_ldt, NUMA placement (mbind,
set_mempolicy), and sockets of families other than unix, inet, inet6 and netlink are denied.
"""

from __future__ import annotations

import errno

from unisandbox.host.seccomp.profile import ArgumentTest, Profile, Rule

_FILES = """
    access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64
    fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock
    fremovexattr fsetxattr fstat fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr getxattrat
    file_getattr file_setattr ioctl lchown lgetxattr link linkat listxattr listxattrat llistxattr lremovexattr
    lseek lsetxattr lstat mkdir mkdirat mknod mknodat newfstatat open openat openat2 pread64 preadv preadv2
    pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv removexattr removexattrat rename renameat
    renameat2 rmdir sendfile setxattr setxattrat splice stat statfs statx symlink symlinkat sync sync_file_range
    sync_file_range2 syncfs tee truncate umask unlink unlinkat utime utimensat utimes write writev cachestat
    name_to_handle_at inotify_add_watch inotify_init inotify_init1 inotify_rm_watch memfd_create memfd_secret
    statmount listmount
"""
# mknod: FIFOs; devices need a capability that user namespaces do not give. chroot: see _PROCESSES. statmount and
# listmount read what /proc/self/mountinfo says anyway.

_WAITING = """
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd
    eventfd2 pipe pipe2 poll ppoll pselect6 select signalfd signalfd4
    alarm clock_adjtime clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep setitimer time
    timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime
    timerfd_settime adjtimex
    io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit
"""
# adjtimex and clock_adjtime also read the clock's state (ntp_gettime); setting needs CAP_SYS_TIME of the host.

_MEMORY = """
    brk madvise mincore mlock mlock2 mlockall mmap mprotect mremap mseal msync munlock munlockall munmap
    pkey_alloc pkey_free pkey_mprotect process_madvise process_mrelease remap_file_pages map_shadow_stack
    get_mempolicy membarrier rseq
"""

_PROCESSES = """
    arch_prctl capget capset chroot execve execveat exit exit_group fork futex futex_requeue futex_wait futex_waitv
    futex_wake get_robust_list get_thread_area getcpu getegid geteuid getgid getgroups getpgid getpgrp getpid getppid
    getpriority getrandom getresgid getresuid getrlimit getrusage getsid gettid getuid ioprio_get ioprio_set
    kill pause pidfd_getfd pidfd_open pidfd_send_signal prctl prlimit64 process_vm_readv process_vm_writev ptrace
    restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
    rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
    sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler sched_yield set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid setgroups
    setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setuid sigaltstack sysinfo tgkill times
    tkill uname vfork wait4 waitid
    landlock_add_rule landlock_create_ruleset landlock_restrict_self lsm_get_self_attr lsm_list_modules seccomp
"""
# ptrace and process_vm_*: debuggers and strace. Since Linux 4.8 a tracer cannot slip past the filter of the traced
# process, and the user namespace ends at the sandbox, so a tracer gains nothing that its target did not have.
# chroot: needs CAP_SYS_CHROOT, which is the caller's to give.

_TALKING = """
    accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg sendmmsg sendmsg
    sendto setsockopt shutdown socketpair
    mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd
    semctl semget semop semtimedop shmat shmctl shmdt shmget
"""

_DENIED = """
    add_key keyctl request_key
    bpf perf_event_open lookup_dcookie kcmp
    io_uring_enter io_uring_register io_uring_setup
    userfaultfd vmsplice
    mount umount umount2 pivot_root move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick mount_setattr
    setns open_by_handle_at fanotify_init fanotify_mark
    mbind set_mempolicy set_mempolicy_home_node migrate_pages move_pages
    modify_ldt iopl ioperm
    init_module finit_module delete_module create_module get_kernel_syms query_module kexec_load kexec_file_load
    reboot swapon swapoff acct quotactl quotactl_fd nfsservctl sethostname setdomainname settimeofday clock_settime
    syslog vhangup sysfs _sysctl uselib ustat lsm_set_self_attr vserver afs_syscall getpmsg putpmsg security tuxcall
    rtas pciconfig_iobase pciconfig_read pciconfig_write
"""
# One line, one reason: keyrings are not namespaced. The kernel's own machinery. io_uring: many of the kernel's local
# privilege escalations since 2020, and it passes by this very filter. userfaultfd and vmsplice: they make races in the
# kernel easy to win. Mounts and namespaces are the host's work. Placement on NUMA nodes is shared with other sandboxes.
# Segments and ports of x86. Modules and other kernels. The administration of a machine. Never-implemented
# calls, ENOSYS in any case.

_NEW_NAMESPACES = {
    "clone": 0x7E020000,  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
    "unshare": 0x7E020080,  # and CLONE_NEWTIME, whose bit is part of clone's exit signal
}

_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK
_PERSONALITIES = (
    0xFFFFFFFF,  # asks for the present one
    0,  # PER_LINUX
    0x0008,  # PER_LINUX32: `uname -m` says i686 (setarch)
    0x20000,  # UNAME26
    0x20008,
    0x40000,  # ADDR_NO_RANDOMIZE: debuggers, Lisp systems; a program weakens only itself
)

_NUMBERS = {
    "cachestat": 451, "fchmodat2": 452, "map_shadow_stack": 453, "futex_wake": 454, "futex_wait": 455,
    "futex_requeue": 456, "statmount": 457, "listmount": 458, "lsm_get_self_attr": 459, "lsm_set_self_attr": 460,
    "lsm_list_modules": 461, "mseal": 462, "setxattrat": 463, "getxattrat": 464, "listxattrat": 465,
    "removexattrat": 466, "open_tree_attr": 467, "file_getattr": 468, "file_setattr": 469,
    "set_mempolicy_home_node": 450, "futex_waitv": 449, "process_mrelease": 448, "quotactl_fd": 443,
    "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446, "epoll_pwait2": 441,
    "mount_setattr": 442,
}  # fmt: skip
# Source: scripts/syscall.tbl of Linux 6.17.


def _namespace_rules(name: str, mask: int) -> list[Rule]:
    """Allowed without any of the flags; EPERM with each. (Two answers to one call must not overlap: see profile.py.)"""
    rules = [Rule((name,), tests=(ArgumentTest(0, "MASKED_EQ", mask, 0),))]
    bits = [1 << bit for bit in range(32) if mask >> bit & 1]
    return rules + [Rule((name,), errno.EPERM, (ArgumentTest(0, "MASKED_EQ", bit, bit),)) for bit in bits]


def _socket_rules() -> list[Rule]:
    """Some families; for all others the error that a kernel without them gives."""
    allowed = [Rule(("socket",), tests=(ArgumentTest(0, "EQ", family),)) for family in _FAMILIES]
    top = max(_FAMILIES)
    denied = [ArgumentTest(0, "EQ", family) for family in range(top) if family not in _FAMILIES]
    denied.append(ArgumentTest(0, "GT", top))
    return allowed + [Rule(("socket",), errno.EAFNOSUPPORT, (test,)) for test in denied]


def _rules(*, clone3: bool) -> tuple[Rule, ...]:
    rules = [Rule(tuple(group.split())) for group in (_FILES, _WAITING, _MEMORY, _PROCESSES, _TALKING)]
    rules.append(Rule(tuple(_DENIED.split()), errno.EPERM))
    # Its flags lie in memory, where a filter cannot look. The C libraries fall back to clone(2).
    rules.append(Rule(("clone3",), 0 if clone3 else errno.ENOSYS))
    for name, mask in _NEW_NAMESPACES.items():
        rules += _namespace_rules(name, mask)
    rules += _socket_rules()
    rules += [Rule(("personality",), tests=(ArgumentTest(0, "EQ", value),)) for value in _PERSONALITIES]
    return tuple(rules)


DEFAULT = Profile("default", _rules(clone3=False), errno.ENOSYS, _NUMBERS)
"""What every process gets unless its spec says otherwise."""

INIT = Profile("init", _rules(clone3=True), errno.ENOSYS, _NUMBERS)
"""The same for a container's init, which starts processes in their cgroups by clone3; it takes clone3 from each."""
