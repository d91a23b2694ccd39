"""The compiled filter holds against what it is meant for, and ordinary programs do not notice it.

Every attack is tried twice: with the filter it must fail as promised, without it the kernel must do more than that.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unisandbox.host.seccomp import DEFAULT, compile_bpf

X86 = platform.machine() == "x86_64"

# Runs as a program of its own: optionally loads the filter from a file, then does what its arguments say.
LOADER = r"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def load(path):
    program = open(path, "rb").read()
    buffer = ctypes.create_string_buffer(program, len(program))
    class Fprog(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
    fprog = Fprog(len(program) // 8, ctypes.addressof(buffer))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(fprog)) == 0, os.strerror(ctypes.get_errno())
def call(number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(a if isinstance(a, bytes) else ctypes.c_uint64(a & (1 << 64) - 1)
                                                   if isinstance(a, int) else a for a in args))
    return ctypes.get_errno() if result == -1 else 0
if sys.argv[1]:
    load(sys.argv[1])
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seccomp") / "filter"
    path.write_bytes(compile_bpf(DEFAULT))
    return path


def _python(filter_path: Path | None, code: str, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-I", "-c", LOADER + code, str(filter_path or ""), *args]
    return subprocess.run(argv, capture_output=True, text=True, check=check, timeout=60)


def _answer(filter_path: Path | None, code: str) -> int:
    """The errno that `code` leaves in `answer` (0: it worked)."""
    done = _python(filter_path, code + "\nprint(answer)", check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97

ATTACKS = {
    # name: (what is tried, the promised answer)
    "a key in the host's keyring": ("answer = call(248, b'user', b'x', b'y', 1, -2)", EPERM),
    "reading a keyring": ("answer = call(250, 0, -2, 0)", EPERM),
    "a user namespace by unshare": ("answer = call(272, 0x10000000)", EPERM),
    "a user namespace by unshare, high bits set": ("answer = call(272, 0x110000000)", EPERM),
    "a time namespace by unshare": ("answer = call(272, 0x80)", EPERM),
    "a user namespace by clone": (
        "answer = call(56, 0x10000000 | 17, 0, 0, 0, 0)\nif os.getpid() != me: os._exit(0)",
        EPERM,
    ),
    "a mount": ("answer = call(272, 0x20000) or call(165, b'tmpfs', b'/mnt', b'tmpfs', 0, 0)", EPERM),
    "a mount context": ("answer = call(430, b'tmpfs', 0)", EPERM),
    "another's namespace": ("answer = call(308, os.open('/proc/self/ns/net', os.O_RDONLY), 0)", EPERM),
    "a bpf map": ("answer = call(321, 0, bytes([2, 0, 0, 0]) + bytes([4, 0, 0, 0]) * 3 + bytes(60), 76)", EPERM),
    "io_uring": ("answer = call(425, 1, bytes(120))", EPERM),
    "a userfaultfd": ("answer = call(323, 1)", EPERM),
    "a file by its handle": ("answer = call(304, -100, bytes(8), 0)", EPERM),
    "comparing the kernel's objects": ("answer = call(312, me, me, 0, 1, 1)", EPERM),
    "watching all files": ("answer = call(300, 0, 0)", EPERM),
    "the kernel's log": ("answer = call(103, 10, 0, 0)", EPERM),
    "a local descriptor table": ("answer = call(154, 0, bytes(64), 64)", EPERM),
    "splicing one's pages": ("r, w = os.pipe(); answer = call(278, w, 0, 0, 0)", EPERM),
    "a NUMA policy": ("answer = call(238, 0, 0, 0)", EPERM),
    "sockets to the hypervisor": ("answer = call(41, 40, 1, 0)", EAFNOSUPPORT),
    "the kernel's ciphers": ("answer = call(41, 38, 5, 0)", EAFNOSUPPORT),
    "raw packets": ("answer = call(41, 17, 3, 0)", EAFNOSUPPORT),
    "raw packets, high bits set": ("answer = call(41, 17 | 1 << 32, 3, 0)", EAFNOSUPPORT),
    "readable is executable": ("answer = call(135, 0x0400000)", ENOSYS),
}
ALSO_REFUSED_BY_THIS_KERNEL = {
    # Not every kernel has these families: nothing is shown by their refusal where it is the kernel's own.
    "sockets to the hypervisor",
    "the kernel's ciphers",
    "watching all files",
}
PREPARE = "me = os.getpid()\n"


@pytest.mark.root
@pytest.mark.skipif(not X86, reason="the numbers of these system calls are those of x86_64")
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_fails_with_the_filter_and_gets_further_without(program: Path, attack: str) -> None:
    code, promised = ATTACKS[attack]
    assert _answer(program, PREPARE + code) == promised
    bare = _answer(None, PREPARE + code)
    if attack not in ALSO_REFUSED_BY_THIS_KERNEL:
        assert bare != promised


def test_clone3_is_unknown_so_that_libraries_fall_back(program: Path) -> None:
    assert _answer(program, "answer = call(435, bytes(88), 88)") == ENOSYS
    assert _answer(None, "answer = call(435, (0xffff).to_bytes(8, 'little') + bytes(80), 88)") != ENOSYS


def test_calls_of_the_future_are_unknown_and_not_forbidden(program: Path) -> None:
    for number in (9999, 700, 0x3FFFFFFF):
        assert _answer(program, f"answer = call({number})") == ENOSYS


def test_every_denied_call_is_denied(program: Path) -> None:
    library = ctypes.CDLL("libseccomp.so.2")
    numbers = {}
    for rule in DEFAULT.rules:
        if rule.errno == EPERM and not rule.tests:
            for name in rule.names:
                number = library.seccomp_syscall_resolve_name(name.encode())
                numbers[name] = number if number >= 0 else DEFAULT.numbers.get(name, -1)
    code = (
        "import json\nnumbers = json.loads(sys.argv[2])\n"
        "print(json.dumps({name: call(n, -1, -1, -1, -1, -1, -1) for name, n in numbers.items()}))"
    )
    present = {name: number for name, number in numbers.items() if number >= 0}
    answers = json.loads(_python(program, code, json.dumps(present)).stdout)
    assert len(answers) > 50
    assert set(answers.values()) == {EPERM}


@pytest.mark.skipif(not X86, reason="other ABIs of x86_64")
def test_other_abis_are_killed(program: Path) -> None:
    x32 = "answer = call(0x40000000 + 39)\nprint('alive')"
    assert _python(program, x32, check=False).returncode == -signal.SIGSYS
    # mov eax, 20 (getpid of i386); int 0x80; ret
    i386 = (
        "import mmap\npage = mmap.mmap(-1, 4096, prot=7)\npage.write(bytes.fromhex('b814000000cd80c3'))\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(address)() == os.getpid())"
    )
    assert _python(program, i386, check=False).returncode == -signal.SIGSYS
    assert _python(None, x32, check=False).returncode == 0
    bare = _python(None, i386, check=False)
    assert bare.stdout == "True\n" or bare.returncode == -signal.SIGSEGV  # a kernel without 32-bit emulation


PROGRAMS = {
    "python": [
        "python3",
        "-c",
        "import asyncio, ctypes, multiprocessing, os, socket, sqlite3, ssl, subprocess, tempfile, threading, time\n"
        "t = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(8)]\n"
        "[x.start() for x in t]; [x.join() for x in t]\n"
        "assert subprocess.run(['sh', '-c', 'exit 3']).returncode == 3\n"
        "with multiprocessing.Pool(2) as p: assert p.map(abs, [-1, -2]) == [1, 2]\n"
        "a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'\n"
        "s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname()).close(); s.close()\n"
        "db = sqlite3.connect(tempfile.mktemp()); db.execute('create table t(x)'); db.commit(); db.close()\n"
        "async def f(): assert await (await asyncio.create_subprocess_exec('true')).wait() == 0\n"
        "asyncio.run(f()); os.memfd_create('x'); print('fine')",
    ],
    "bash": ["bash", "-c", "set -e; x=$(seq 100 | sort -r | head -1); [ $x = 99 ]; (sleep 0.01 & wait); echo fine"],
    "git": [
        "sh",
        "-c",
        "git init -q . && echo a > a && git add a && git -c user.name=a -c user.email=a@b commit -qm a && git gc -q "
        "&& git clone -q . copy && git log --oneline | wc -l | grep -q 1 && echo fine",
    ],
    "gcc": ["sh", "-c", "echo 'int main(){return 7;}' > a.c && gcc -O2 -pipe a.c -o a; ./a; [ $? = 7 ] && echo fine"],
    "tar": [
        "sh",
        "-c",
        "mkdir d && seq 9999 > d/f && tar czf d.tgz d && rm -r d && tar xzf d.tgz && [ -s d/f ] && echo fine",
    ],
    "strace": ["sh", "-c", "strace -f -o trace sh -c 'true; true' && grep -q execve trace && echo fine"],
    "gdb": ["sh", "-c", "gdb -q -batch -ex run -ex 'print 42' /bin/true 2>&1 | grep -q '= 42' && echo fine"],
    "perl": ["perl", "-e", "my $p = fork; exit 0 unless $p; waitpid $p, 0; print qq(fine\n)"],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_ordinary_programs_run(program: Path, tmp_path: Path, name: str) -> None:
    argv = PROGRAMS[name]
    if not shutil.which(name if name != "python" else "python3"):
        pytest.skip(f"{name} is not installed")
    code = "os.chdir(sys.argv[2])\nos.execvp(sys.argv[3], sys.argv[3:])"
    done = _python(program, code, str(tmp_path), *argv, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["fine"]), done.stderr
    assert done.stderr == ""


def test_the_filter_is_really_loaded(program: Path) -> None:
    code = "print(open('/proc/self/status').read())"
    assert "Seccomp:\t2" in _python(program, code).stdout
    assert os.path.getsize(program) > 1000
