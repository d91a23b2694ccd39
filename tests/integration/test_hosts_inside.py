"""The host process may be anything: PID 1, a subreaper, one without stdio, with odd signals, limits and environment.

Each case is a Python process of its own in which a sandbox must work as ever, and which must stay as it was.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.programs import Options, program
from typing_extensions import Unpack

import unisandbox

pytestmark = pytest.mark.root

# Runs a sandbox on the loop that is named first, and looks at what the process itself was before and is after it.
WORK = """
from unisandbox.conformance.inventory import Inventory, settle

OWN = ("process", "mount", "namespace", "fd", "thread", "process state", "environment")

def listing():
    taken = Inventory.take()
    return Inventory({kind: taken.things[kind] for kind in OWN})

async def work():
    async with Engine.open() as engine, engine.create(resources=Resources(memory="64M")) as sandbox:
        done = await sandbox.run(["/bin/sh", "-c", "cat; exit 7"], input=b"in")
        assert (done.exit_code, done.stdout) == (7, b"in"), done
        assert (await sandbox.sh("kill -9 $$")).exit.signal == 9
        async with sandbox.exec(["cat"], stdin="pipe") as process:
            await process.stdin.send(b"x")
            assert await process.stdout.receive() == b"x"
            await process.stdin.aclose()
            assert (await process.wait()).code == 0
        await sandbox.files.write("/tmp/a", b"1")
        seen = await sandbox.run(["python3", "-c", INSIDE])
        assert seen.exit_code == 0, seen
        return json.loads(seen.stdout)

INSIDE = '''
import ctypes, json, os, signal, resource
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
def link(name):
    try: return os.readlink(f"/proc/self/fd/{name}")
    except OSError: return None
umask = os.umask(0)
libc = ctypes.CDLL(None)
IOPRIO_GET, GET_MEMPOLICY = {"x86_64": (252, 239), "aarch64": (31, 236)}[os.uname().machine]
memory = ctypes.c_int(-1)
libc.syscall(GET_MEMPOLICY, ctypes.byref(memory), 0, 0, 0, 0)
print(json.dumps({
    "environment": dict(os.environ),
    "fds": sorted(int(name) for name in os.listdir("/proc/self/fd") if link(name)),
    "blocked": status["SigBlk"].strip(), "ignored": status["SigIgn"].strip(),
    "umask": umask, "cwd": os.getcwd(), "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
    "maps": open("/proc/self/maps").read(),
    # Source: prctl(2), PR_GET_TIMERSLACK is 30 and PR_GET_THP_DISABLE 42.
    "attributes": [os.sched_getscheduler(0), os.getpriority(0, 0),
        libc.syscall(IOPRIO_GET, 1, 0), memory.value, libc.prctl(30), libc.prctl(42, 0, 0, 0, 0),
        libc.personality(ctypes.c_ulong(0xffffffff))],
    "cpus": len(os.sched_getaffinity(0)),
}))
'''

def whole(backend=None):
    inside = anyio.run(work, backend=backend or sys.argv[1])
    return inside

def checked(backend=None):
    whole(backend)  # modules are imported, and what the first use keeps for good is there
    before = listing()
    inside = whole(backend)
    left = [line for line in before.diff(listing()) and settle_own(before)]
    tell(inside=inside, left=left)

def settle_own(before):
    end = time.monotonic() + 3
    while (left := before.diff(listing())) and time.monotonic() < end:
        time.sleep(0.005)
    return left
"""


@pytest.fixture(params=["asyncio", "trio"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(
    loop: str, code: str = "checked()", arguments: Sequence[str] = (), **options: Unpack[Options]
) -> dict[str, object]:
    """Do the work in a host process: what a program inside has seen."""
    with program(f"{WORK}\n{code}", loop, *arguments, **options) as host:
        told = host.heard()
        code_, out, err = host.finish()
        assert (code_, out, err) == (0, "", ""), (code_, out, err)
    assert told["left"] == [], told["left"]
    inside: dict[str, object] = told["inside"]
    assert inside["fds"] == [0, 1, 2]
    assert (inside["blocked"], inside["umask"], inside["cwd"]) == ("0" * 16, 0o022, "/")
    return inside


def test_an_ordinary_process(loop: str) -> None:
    run(loop)


def test_a_process_that_is_pid_1(loop: str) -> None:
    run(
        loop,
        "assert os.getpid() == 1\nchecked()",
        wrapper=["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"],
    )


def test_a_keeper_that_cannot_begin_is_no_zombie_of_a_pid_1(loop: str, tmp_path: Path) -> None:
    code = """
from unisandbox import UnavailableError
from unisandbox.host.keeper import Keeper

async def main():
    try:
        await Keeper.start(sys.argv[2] + "/s", workdir=sys.argv[2] + "/w", hide=["/no/such/directory"])
    except UnavailableError as error:
        return str(error)

error = anyio.run(main, backend=sys.argv[1])
try:
    tell(error=error, child=os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    tell(error=error, child=None)
"""
    wrapper = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with program(code, loop, str(tmp_path), wrapper=wrapper) as host:
        told = host.heard()
        assert host.finish() == (0, "", "")
    assert "could not begin" in told["error"]
    assert told["child"] is None


def test_a_subreaper_keeps_no_zombies(loop: str) -> None:
    def become_subreaper() -> None:
        # Source: prctl(2), PR_SET_CHILD_SUBREAPER is 36; it is kept over an exec.
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)

    run(loop, before_exec=become_subreaper)


def test_ignored_sigchld(loop: str) -> None:
    inside = run(loop, "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nchecked()")
    assert not int(str(inside["ignored"]), 16) & 1 << signal.SIGCHLD - 1


def test_a_handler_that_reaps_every_child(loop: str) -> None:
    run(
        loop,
        """
def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
signal.signal(signal.SIGCHLD, reap)
checked()
""",
    )


def test_few_file_descriptors(loop: str) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    inside = run(loop, before_exec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, most)))
    assert inside["nofile"] == [4096, 4096]


@pytest.mark.parametrize("soft", [600, 1024])
def test_the_default_number_of_open_files_is_what_the_host_process_may_have(loop: str, soft: int) -> None:
    """Only a number that somebody has asked for can be too large."""
    code = """
from unisandbox import InvalidArgumentError

async def ask(files):
    try:
        async with Engine.open() as engine, engine.create(resources=Resources(nofile=files)) as sandbox:
            return (await sandbox.sh("ulimit -n")).text.strip()
    except InvalidArgumentError as error:
        return str(error)

asked = {str(files): anyio.run(ask, files, backend=sys.argv[1]) for files in (512, 4095, 5000)}
tell(inside=whole(), left=[], asked=asked)
"""
    few = resource.RLIMIT_NOFILE, (soft, 1024)
    with program(f"{WORK}\n{code}", loop, before_exec=lambda: resource.setrlimit(*few)) as host:
        told = host.heard()
        assert host.finish() == (0, "", "")
    most = told["inside"]["nofile"][1]
    assert most in {1024, 4096}, most  # the latter where root may raise it for the keeper
    assert told["inside"]["nofile"] == [most, most]
    assert told["asked"]["512"] == "512"
    for files in ("4095", "5000"):
        assert told["asked"][files] == files if int(files) <= most else f"at most {most}, " in told["asked"][files]


def test_a_hard_limit_of_descriptors_that_is_too_low_is_named(loop: str) -> None:
    code = """
from unisandbox import SandboxError
try:
    tell(error="", inside=whole())
except SandboxError as error:
    tell(error=f"{type(error).__name__}: {error}")
"""
    few = resource.RLIMIT_NOFILE, (64, 64)
    with program(f"{WORK}\n{code}", loop, before_exec=lambda: resource.setrlimit(*few)) as host:
        told = host.heard()
        assert host.finish() == (0, "", "")
    # Refused by the keeper, unless root may raise it for the keeper.
    assert "open files" in told["error"] or told["inside"]["nofile"] == [4096, 4096], told


@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_closed_standard_streams(loop: str, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    run(loop, before_exec=close)


def test_a_strict_umask(loop: str) -> None:
    run(loop, before_exec=lambda: os.umask(0o077))


def test_an_open_umask(loop: str) -> None:
    run(loop, before_exec=lambda: os.umask(0))


def test_a_removed_working_directory(loop: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    # The listing of what a process is has its working directory in it, so it is not taken here.
    run(loop, "os.rmdir(sys.argv[2])\ntell(inside=whole(), left=[])", cwd=str(gone), arguments=(str(gone),))


def test_all_signals_blocked(loop: str) -> None:
    run(loop, before_exec=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))


@pytest.mark.parametrize("policy", [os.SCHED_BATCH, os.SCHED_IDLE], ids=["SCHED_BATCH", "SCHED_IDLE"])
def test_what_the_host_process_runs_under_is_inherited_by_nobody(loop: str, policy: int) -> None:
    libc = ctypes.CDLL(None)
    ioprio_set, set_mempolicy = {"x86_64": (251, 238), "aarch64": (30, 237)}[os.uname().machine]

    def be_odd() -> None:
        os.nice(5)
        os.sched_setscheduler(0, policy, os.sched_param(0))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        libc.syscall(ioprio_set, 1, 0, 3 << 13)  # IOPRIO_CLASS_IDLE
        libc.syscall(set_mempolicy, 2, ctypes.byref(ctypes.c_ulong(1)), 64)  # MPOL_BIND, node 0
        libc.prctl(29, 500_000, 0, 0, 0)  # PR_SET_TIMERSLACK
        libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
        libc.personality(0x0240000)  # ADDR_NO_RANDOMIZE, ADDR_COMPAT_LAYOUT

    inside = run(loop, "tell(inside=whole(), left=[])", before_exec=be_odd)
    assert inside["attributes"] == [os.SCHED_OTHER, 0, 0, 0, 50_000, 0, 0]
    assert int(str(inside["cpus"])) >= len(os.sched_getaffinity(0))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the personality of a 32-bit program has a name of its own")
def test_a_keeper_begins_under_the_personality_of_a_32_bit_program(loop: str, tmp_path: Path) -> None:
    code = """
from unisandbox.host.keeper import Keeper

async def main():
    keeper = await Keeper.start(sys.argv[2] + "/s", workdir=sys.argv[2] + "/w")
    await keeper.close()

anyio.run(main, backend=sys.argv[1])
"""
    with program(code, loop, str(tmp_path), wrapper=["setarch", "linux32"]) as host:
        assert host.finish() == (0, "", "")


def test_a_loop_in_another_thread(loop: str) -> None:
    run(
        loop,
        """
raised = []
def body():
    try:
        checked()
    except BaseException as error:
        raised.append(error)
thread = threading.Thread(target=body, name="the loop's")
thread.start()
thread.join()
if raised:
    raise raised[0]
""",
    )


def test_two_loops_in_two_threads_at_once(loop: str) -> None:
    run(
        loop,
        """
results = []
threads = [threading.Thread(target=lambda: results.append(whole())) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(results) == 2
tell(inside=results[0], left=[])
""",
    )


def test_what_the_host_process_has_open_is_inherited_by_nobody(loop: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    fds = [os.open(secret, os.O_RDONLY) for _ in range(3)]
    try:
        run(
            loop,
            """
from tests.keepers import files_of

async def keepers_files():
    async with Engine.open() as engine, engine.create() as sandbox:
        async with sandbox.exec(["sleep", "100"]) as process:
            pids = [engine._core.host.keeper.pid, process.pid]
            return [name for pid in pids for name in files_of(pid)]
names = anyio.run(keepers_files, backend=sys.argv[1])
assert len(names) > 10 and not [name for name in names if "secret" in name], names
checked()
""",
            pass_fds=fds,
        )
    finally:
        for fd in fds:
            os.close(fd)


def test_the_environment_of_the_host_process_stays_outside(loop: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("")
    (tmp_path / "json.py").write_text("raise RuntimeError('a stranger on the path')")
    env = {
        "PYTHONWARNINGS": "error",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONOPTIMIZE": "",
        "PYTHONSTARTUP": "/nonexistent.py",
        "PYTHONHASHSEED": "7",
        "PYTHONUTF8": "0",
        "LC_ALL": "C",
        "LD_LIBRARY_PATH": "/nonexistent",
        "SECRET_TOKEN": "s3cret",
        "TMPDIR": str(tmp_path),
        "XDG_RUNTIME_DIR": "/nonexistent",
    }
    inside = run(loop, env=env)
    environment = inside["environment"]
    assert isinstance(environment, dict)
    assert not set(environment) & set(env), environment


def test_the_keeper_leaves_compiled_modules_where_the_host_process_does(loop: str, tmp_path: Path) -> None:
    env = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    run(loop, "tell(inside=whole(), left=[])", env=env)
    assert any(tmp_path.rglob("keeper/server.*.pyc"))  # which the keeper alone imports


def test_the_keeper_leaves_no_compiled_modules_where_the_host_process_leaves_none(loop: str, tmp_path: Path) -> None:
    package = Path(unisandbox.__path__[0])
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "assert unisandbox.__path__ == [sys.argv[2]]\ntell(inside=whole(), left=[])"
    env = {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}", "PYTHONDONTWRITEBYTECODE": "1"}
    run(loop, code, env=env, arguments=[str(tmp_path / package.name)])
    assert not any(tmp_path.rglob("*.pyc"))


def test_modules_beside_the_keeper_are_not_imported_by_it(loop: str, tmp_path: Path) -> None:
    """PYTHONPATH and the working directory are the host program's: its modules must not run in the keeper."""
    for name in ("select", "signal", "fcntl", "base64", "usercustomize", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(
            "import os\nif os.getppid() == 1 or 'server' in __import__('sys').argv: os._exit(99)"
        )
    run(
        loop,
        "sys.path.remove('')\nos.chdir(sys.argv[2])\nos.environ['PYTHONPATH'] = sys.argv[2]\nchecked()",
        arguments=(str(tmp_path),),
    )


def preloadable() -> str:
    """A library that every process can load and none has by itself."""
    for path in ("/lib/x86_64-linux-gnu/libBrokenLocale.so.1", "/lib/aarch64-linux-gnu/libBrokenLocale.so.1"):
        if os.path.exists(path):
            return path
    pytest.skip("glibc's libBrokenLocale.so.1 is not here")


def test_a_preloaded_library_stays_outside(loop: str) -> None:
    library = preloadable()
    inside = run(
        loop, "assert 'libBrokenLocale' in open('/proc/self/maps').read()\nchecked()", env={"LD_PRELOAD": library}
    )
    assert "libBrokenLocale" not in str(inside["maps"])


def test_optimised_python(loop: str) -> None:
    """Asserts are removed with -O: nothing may rest on them."""
    run(loop, "assert not __debug__\nwhole()\ntell(inside=whole(), left=[])", env={"PYTHONOPTIMIZE": "2"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_the_whole_process_group_does_not_end_the_keeper_first(number: signal.Signals) -> None:
    """Ctrl-C in a terminal reaches everybody in the group: cleaning needs the keeper, so it is not in the group."""
    with program(
        """
stop = []
signal.signal(int(sys.argv[1]), lambda *_: stop.append(1))
async def main():
    async with Engine.open() as engine, engine.create() as sandbox:
        await sandbox.run(["true"])
        tell(ready=True)
        while not stop:
            await anyio.sleep(0.01)
        done = await sandbox.run(["echo", "still here"])
        tell(out=done.text)
anyio.run(main)
""",
        str(int(number)),
        before_exec=os.setpgrp,
    ) as host:
        host.heard()
        os.killpg(host.pid, number)
        assert host.heard() == {"out": "still here\n"}
        assert host.finish()[0] == 0
