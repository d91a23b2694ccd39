"""A process that is not ours is never signalled, also when it has got the number of one that was.

The numbers are given out again at once, in a pid namespace of the test's own: whoever writes N - 1 to
/proc/sys/kernel/ns_last_pid makes N the next one there. Source: proc(5), pid_namespaces(7).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests.programs import PRELUDE, program

from unisandbox.oci import calls

pytestmark = pytest.mark.root

HOST = """
async def main():
    engine = await Engine.open(sys.argv[1], policy=sys.argv[2])
    sandbox = await engine.create(name="w", resources=Resources(memory="64M"))
    process = await sandbox.exec(["sleep", "1000"])
    short = await sandbox.exec(["sh", "-c", "exit 5"])
    side = await sandbox.containers.add(argv=["sleep", "1000"], name="side")
    inits = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_init(int(pid))]
    sys.stdout.write(json.dumps({
        "host": os.getpid(), "keeper": engine._core.host.keeper.pid, "process": process.pid, "short": short.pid,
        "side": side.pid, "inits": inits,
    }) + "\\n")
    sys.stdout.flush()
    await anyio.sleep_forever()

def is_init(pid):
    try:
        return b"init" in open(f"/proc/{pid}/comm", "rb").read()
    except OSError:
        return False

anyio.run(main)
"""

# In a pid namespace of its own: start a host, kill what is asked for, let strangers take the numbers of the dead, and
# have another engine go over it all.
WORK = """
import subprocess
from pathlib import Path

POLICY, VICTIMS, HOST, PRELUDE, PLACE = sys.argv[1:]

def gone(pid):
    # We are PID 1 here: orphans are ours to reap.
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    return not os.path.exists(f"/proc/{pid}")

def take(pid):
    \"\"\"A stranger with this number, which must be free.\"\"\"
    for _ in range(200):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        stranger = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        if stranger.pid == pid:
            return stranger
        stranger.kill()
        stranger.wait()
    raise AssertionError(f"number {pid} was not to be had")

async def main():
    prelude = PRELUDE.replace("os.write(REPORT", "os.write(2")
    host = subprocess.Popen([sys.executable, "-c", prelude + HOST, PLACE, POLICY], stdout=subprocess.PIPE)
    pids = json.loads(host.stdout.readline())
    dead = [pids[name] for name in VICTIMS.split(",")]
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    host.wait()
    if "keeper" in VICTIMS or POLICY == "stop":
        dead += [pids["keeper"], pids["process"], pids["side"], *pids["inits"]]
    dead.append(pids["short"])
    with anyio.fail_after(20):
        while not all(gone(pid) for pid in dead):
            await anyio.sleep(0.01)
    dead = sorted(set(dead))
    strangers = [take(pid) for pid in dead]
    engine = await Engine.open(PLACE)
    found = [one.action for one in engine.recovery.sandboxes]
    exits = []
    for status in await engine.list():
        sandbox = await engine.get(status.id)
        for process in await sandbox.processes():
            await process.signal(signal.SIGTERM)
            await process.wait()
            await process.kill()
            exits.append([process.argv[-1], process.exit.reason, process.exit.code])
        side = await sandbox.containers.get("side")
        await side.signal(signal.SIGTERM)
        await side.kill()
        await sandbox.kill()
        await sandbox.remove()
    await engine.close()
    alive = [stranger.poll() is None for stranger in strangers]
    for stranger in strangers:
        stranger.kill()
        stranger.wait()
    tell(found=found, exits=exits, alive=alive, reused=dead)

anyio.run(main)
"""


@pytest.mark.parametrize(
    ("policy", "victims", "found"),
    [
        ("keep", "host", ["adopted"]),
        ("keep", "host,process", ["adopted"]),
        ("keep", "host,side", ["adopted"]),
        ("keep", "host,keeper", ["removed"]),
        ("stop", "host", ["removed"]),
    ],
)
def test_strangers_with_the_numbers_of_the_dead_live(
    tmp_path: Path, policy: str, victims: str, found: list[str]
) -> None:
    apart = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    with program(WORK, policy, victims, HOST, PRELUDE, str(tmp_path / "state"), wrapper=apart) as work:
        told = work.heard()
        assert work.finish()[0] == 0
    assert told["found"] == found
    assert told["alive"] == [True] * len(told["reused"])
    if found == ["adopted"]:
        exits = {argument: (reason, code) for argument, reason, code in told["exits"]}
        assert exits["exit 5"] == ("exited", 5)
        assert exits["1000"] == ("signaled", 128 + (9 if "process" in victims else 15))


# In a pid namespace of its own: the keeper of an open engine is killed, and a stranger has its number and a directory
# under each of its descriptors.
FILES = """
import subprocess
from pathlib import Path

PLACE, STATE = sys.argv[1], sys.argv[2] or None
STRANGER = \"\"\"
import os, sys, time
top = os.open(sys.argv[1], os.O_RDONLY)
for number in range(3, 64):
    if number != top:
        os.dup2(top, number)
os.mkdir("ready")
time.sleep(1000)
\"\"\"

def take(pid):
    for _ in range(200):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        stranger = subprocess.Popen([sys.executable, "-S", "-c", STRANGER, PLACE], start_new_session=True, cwd=PLACE)
        if stranger.pid == pid:
            return stranger
        stranger.kill()
        stranger.wait()
    raise AssertionError(f"number {pid} was not to be had")

def listed():
    return sorted(str(path) for path in Path(PLACE).rglob("*"))

async def main():
    engine = await Engine.open(STATE)
    sandbox = await engine.create()
    await sandbox.files.write("/tmp/a", b"1")
    await sandbox.run(["true"])
    keeper = engine._core.host.keeper.pid
    os.kill(keeper, signal.SIGKILL)
    with anyio.fail_after(20):
        while os.path.exists(f"/proc/{keeper}"):
            try:
                os.waitpid(-1, os.WNOHANG)  # we are PID 1 here: orphans are ours to reap
            except ChildProcessError:
                pass
            await anyio.sleep(0.01)
    for name in ("tmp", "root", "run"):
        os.mkdir(f"{PLACE}/{name}", 0o777)
        os.chmod(f"{PLACE}/{name}", 0o777)
    stranger = take(keeper)
    while not os.path.exists(f"{PLACE}/ready"):
        await anyio.sleep(0.01)
    before, words = listed(), []
    calls = {
        "write": lambda: sandbox.files.write("/tmp/evil", b"hello"),
        "read": lambda: sandbox.files.read("/ready"),
        "list": lambda: sandbox.files.list("/"),
        "metrics": sandbox.metrics,
        "run": lambda: sandbox.run(["true"]),
        "add": lambda: sandbox.containers.add(argv=["true"]),
        "create": engine.create,
    }
    for name, call in calls.items():
        try:
            await call()
            words.append(f"{name} worked")
        except SandboxError as error:
            words.append(type(error).__name__)
    try:
        netns = (await sandbox.status()).netns_path
    except SandboxError:
        netns = ""
    await engine.close()
    tell(words=words, netns=netns, same=listed() == before, lives=stranger.poll() is None)
    stranger.kill()
    stranger.wait()

anyio.run(main)
"""


@pytest.mark.parametrize("shared", [False, True])
def test_nothing_is_read_or_written_in_who_has_the_keepers_number(tmp_path: Path, shared: bool) -> None:
    apart = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    (tmp_path / "place").mkdir()
    state = str(tmp_path / "state") if shared else ""
    with program(FILES, str(tmp_path / "place"), state, wrapper=apart) as work:
        told = work.heard()
        assert work.finish()[0] == 0
    assert told == {"words": ["UnavailableError"] * 7, "netns": "", "same": True, "lives": True}


def test_a_call_that_is_killed_takes_no_stranger_along_that_has_got_the_number_of_a_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever was a child when the children were listed may have been ended and reaped before it is opened."""
    listed = calls.children
    with subprocess.Popen(["sleep", "60"]) as stranger, subprocess.Popen(["sleep", "60"], process_group=0) as call:
        looks = iter([[stranger.pid]])
        monkeypatch.setattr(calls, "children", lambda pid: listed(pid) + next(looks, []))
        pidfd = os.pidfd_open(call.pid)
        try:
            calls.kill_tree(call.pid, pidfd)
            assert call.wait(10) == -9
            assert stranger.poll() is None
            with open(f"/proc/{stranger.pid}/stat", encoding="ascii") as file:
                assert file.read().rpartition(")")[2].split()[0] == "S"
        finally:
            os.close(pidfd)
            stranger.kill()
