"""A host program in a container, as Docker, podman and Kubernetes make them: it works, or is told the very flag.

The containers are real (`tests.surroundings`); in each one a program looks by `probe()` and tries by `create()`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from tests.surroundings import (
    DOCKER,
    FOR_NOBODY,
    KUBERNETES,
    PODMAN,
    PRIVILEGED,
    Surrounding,
    forbidding,
    run_inside,
)

pytestmark = pytest.mark.root

PRELUDE = """\
import json, os, subprocess, sys, time
import anyio, unisandbox
from unisandbox import Engine, Resources, Rootfs, SandboxError
from unisandbox.engine.choice import probe_all
from unisandbox.engine.registry import Registry

told = {}

def zombies_and_others():
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                text = open(f"/proc/{name}/stat").read()
            except OSError:
                continue
            found.append(text[text.index("(") : text.index(")") + 3])
    return sorted(found)

async def attempt(name, argv=("/bin/sh", "-c", "id -u; exit 7"), **options):
    try:
        with anyio.fail_after(60):
            async with Engine.open() as engine, engine.create(**options) as sandbox:
                done = await sandbox.run(list(argv))
                told[name] = [done.exit_code, done.text]
    except SandboxError as error:
        told[name] = [type(error).__name__, error.message, error.hint]
"""
LOOK = """
ATTEMPTS = {
    "limited": dict(isolation="runc"),
    "unlimited": dict(isolation="runc", resources=Resources.unlimited()),
    "userns=host": dict(isolation="runc", userns="host", resources=Resources.unlimited()),
    "wasm": dict(isolation="wasm", rootfs=Rootfs.dir("/tmp/w"), argv=["/m.wasm"]),
}

async def main(deep, *names):
    for probe in await probe_all(Registry(), deep=bool(deep)):
        told[f"probe {probe.backend}"] = [probe.available, probe.reason, probe.hint, probe.warnings]
    os.mkdir("/tmp/w")
    if "wasm" in names:
        import wasmtime
        with open("/tmp/w/m.wasm", "wb") as file:
            file.write(wasmtime.wat2wasm('(module (memory (export "memory") 1) (func (export "_start")))'))
    for name in names:
        await attempt(name, **ATTEMPTS[name])
    told["left"] = zombies_and_others() + os.listdir("/tmp") + [p for p in ["/run/unisandbox"] if os.path.exists(p)]
    print(json.dumps(told))

anyio.run(main, *sys.argv[1:])
"""
WORKS = [7, "0\n"]
START = "Start this container with: "
READ_ONLY_CGROUPS = "resources.memory cannot be limited here: /sys/fs/cgroup is mounted read-only; "


@attrs.frozen
class Seen:
    """What the program in a container has seen."""

    told: dict[str, Any]

    def refused(self, hint: str, *reasons: str) -> None:
        """`probe` and `create` of the namespace backend say this remedy, and no other, and name these things."""
        available, reason, remedy, _ = self.told["probe runc"]
        assert (available, remedy) == (False, hint), self.told
        assert self.told["unlimited"][0] == "UnavailableError"
        assert self.told["unlimited"][2] == hint, self.told
        for word in reasons:
            assert word in reason, self.told
            assert word in self.told["unlimited"][1]

    def works(self, *names: str) -> None:
        """Sandboxes of these kinds ran a program; `probe` has said so, too."""
        assert self.told["probe runc"][0] is True, self.told
        for name in names:
            assert self.told[name] == WORKS, self.told


def look(surrounding: Surrounding, place: Path, *names: str, deep: bool = False) -> Seen:
    """Probe there, and try "unlimited" and what else is named; nothing is left."""
    return run(surrounding, place, LOOK, "deep" if deep else "", "unlimited", *names)


def run(surrounding: Surrounding, place: Path, code: str, *arguments: str) -> Seen:
    """Run the program there; it has left nothing."""
    done, out, err = run_inside(surrounding, place, PRELUDE + code, *arguments)
    assert (done, err) == (0, ""), (done, out, err)
    told = json.loads(out)
    assert told.pop("left") == ["w"], told
    return Seen(told)


def test_in_dockers_default_container_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    seen = look(DOCKER, tmp_path, "wasm", deep=True)

    seen.refused(
        f"{START}docker run --security-opt seccomp=unconfined --security-opt systempaths=unconfined",
        "(seccomp) forbids unshare",
        "/proc/acpi is masked",
        "root without CAP_SYS_ADMIN",
    )
    assert seen.told["wasm"] == [0, ""]
    available, _, _, warnings = seen.told["probe wasm"]
    assert available
    assert "(this process is root without CAP_SYS_ADMIN)" in warnings[0]
    assert warnings[0].endswith("To have them: start this container with: docker run --cap-add SYS_ADMIN")


WASM_LIVES = """
async def main():
    os.mkdir("/tmp/w")
    import wasmtime
    from importlib.resources import files
    tool = files("unisandbox.conformance").joinpath("guest/tool.wasm").read_bytes()
    for name in ("fill", "cat", "store"):
        with open(f"/tmp/w/{name}.wasm", "wb") as file:
            file.write(tool)
    os.mkdir("/tmp/data")
    with open("/tmp/data/f", "w") as file:
        file.write("of the host")
    mounts = [unisandbox.Mount.bind("/tmp/data", "/data")]
    async with Engine.open() as engine:
        for readonly in (False, True):
            rootfs = Rootfs.dir("/tmp/w", readonly=readonly)
            made = engine.create(isolation="wasm", rootfs=rootfs, mounts=mounts, resources=Resources(disk="4M"))
            async with made as sandbox:
                filled = await sandbox.run(["fill.wasm", "/tmp/x", str(16 << 20), "keep"])
                read = await sandbox.run(["cat.wasm", "/data/f"])
                changed = await sandbox.run(["store.wasm", "/data/f", "x"])
                told[f"filled {readonly}"] = filled.exit_code, (await sandbox.metrics()).disk_bytes <= 4 << 20
                told[f"read {readonly}"] = read.text, changed.exit_code
                await sandbox.files.remove("/tmp/x")
                await sandbox.files.write("/tmp/y", b"y")
                told[f"files {readonly}"] = [info.name for info in await sandbox.files.list("/tmp")]
    told["host"] = open("/tmp/data/f").read()
    subprocess.run(["rm", "-r", "/tmp/data"], check=True)
    told["left"] = [*zombies_and_others(), *os.listdir("/tmp"), *(p for p in os.listdir("/var/tmp") if ".files" in p)]
    print(json.dumps(told))

anyio.run(main)
"""


@pytest.mark.parametrize("surrounding", [DOCKER, PODMAN, KUBERNETES], ids=["docker", "podman", "kubernetes"])
def test_wasm_sandboxes_hold_what_they_promise_in_a_container_that_may_do_nothing(
    tmp_path: Path, surrounding: Surrounding
) -> None:
    told = run(surrounding, tmp_path, WASM_LIVES).told

    for readonly in (False, True):
        assert told[f"filled {readonly}"] == [1, True]
        assert told[f"read {readonly}"] == ["of the host", 1]
        assert told[f"files {readonly}"] == ["y"]
    assert told["host"] == "of the host"


def test_with_these_flags_and_no_capability_more_sandboxes_run_without_limits(tmp_path: Path) -> None:
    seen = look(DOCKER.with_(seccomp=None, masked=(), read_only=()), tmp_path, "limited", "userns=host", deep=True)

    seen.works("unlimited")
    assert seen.told["limited"] == [
        "UnavailableError",
        f"{READ_ONLY_CGROUPS}start this container with: docker run --privileged",
        "Use resources=Resources.unlimited() (on the command line --unlimited).",
    ]
    kind, reason, hint = seen.told["userns=host"]
    assert kind == "UnsupportedError"
    assert "this process is root without CAP_SYS_ADMIN" in reason
    assert hint == "Leave it out, or start this container with: docker run --privileged."


def test_with_cgroups_that_may_be_written_they_are_limited_too(tmp_path: Path) -> None:
    look(DOCKER.with_(seccomp=None, masked=(), read_only=(), cgroups="rw"), tmp_path, "limited").works(
        "unlimited", "limited"
    )


def test_only_the_filter_is_named_when_only_the_filter_is_in_the_way(tmp_path: Path) -> None:
    seen = look(DOCKER.with_(masked=(), read_only=()), tmp_path)

    seen.refused(f"{START}docker run --security-opt seccomp=unconfined", "(seccomp) forbids unshare")


def test_a_filter_that_forbids_namespaces_but_not_the_call_is_named(tmp_path: Path) -> None:
    """As that of systemd's RestrictNamespaces."""
    test = {"index": 0, "value": 0x20000, "valueTwo": 0x20000, "op": "SCMP_CMP_MASKED_EQ"}
    rule = {"names": ["unshare"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [test]}
    seccomp = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    seen = look(PRIVILEGED.with_(seccomp=seccomp), tmp_path)

    seen.refused(f"{START}docker run --security-opt seccomp=unconfined", "(seccomp) forbids unshare")


@pytest.mark.parametrize("masked", [("/proc/keys",), ("/sys/firmware",)], ids=["proc", "sys"])
def test_only_masked_paths_are_named_when_only_they_are_in_the_way(tmp_path: Path, masked: tuple[str, ...]) -> None:
    """Also those in /sys: crun would give the sandbox this container's own /sys, without a word."""
    seen = look(DOCKER.with_(seccomp=None, masked=masked, read_only=()), tmp_path)

    seen.refused(f"{START}docker run --security-opt systempaths=unconfined", f"{masked[0]} is masked")


def test_with_the_capability_and_dockers_filter_wasm_runs_and_the_filter_is_named(tmp_path: Path) -> None:
    """With CAP_SYS_ADMIN the filter lets mounts and namespaces through, but neither keyrings nor pivot_root."""
    admin = DOCKER.with_(capabilities=[*(DOCKER.capabilities or ()), "SYS_ADMIN"], seccomp=forbidding(FOR_NOBODY))
    seen = look(admin.with_(masked=(), read_only=()), tmp_path, "wasm")

    seen.refused(f"{START}docker run --security-opt seccomp=unconfined", "(seccomp) forbids pivot_root")
    assert seen.told["wasm"] == [0, ""]


def test_where_only_keyrings_are_filtered_sandboxes_do_without(tmp_path: Path) -> None:
    surrounding = PRIVILEGED.with_(seccomp=forbidding([name for name in FOR_NOBODY if name != "pivot_root"]))

    look(surrounding, tmp_path, "limited", "userns=host").works("limited", "unlimited", "userns=host")


def test_in_a_privileged_container_all_works(tmp_path: Path) -> None:
    seen = look(PRIVILEGED, tmp_path, "limited", "userns=host", "wasm", deep=True)

    seen.works("limited", "unlimited", "userns=host")
    assert seen.told["wasm"] == [0, ""]


def test_root_with_all_capabilities_and_masked_paths_has_no_user_namespaces_but_the_hosts(tmp_path: Path) -> None:
    seen = look(PRIVILEGED.with_(masked=("/proc/keys",)), tmp_path, "limited", "userns=host")

    kind, reason, hint = seen.told["limited"]
    assert kind == "UnavailableError"
    assert "a user namespace of its own cannot be had: /proc/keys is masked" in reason
    assert hint.startswith(f"{START}docker run --security-opt systempaths=unconfined, or use userns='host'")
    assert seen.told["userns=host"] == WORKS


def test_root_with_all_capabilities_and_read_only_cgroups_has_sandboxes_without_limits(tmp_path: Path) -> None:
    seen = look(PRIVILEGED.with_(cgroups="ro"), tmp_path, "limited", "userns=host", "wasm")

    seen.works("unlimited")
    assert seen.told["limited"][1] == f"{READ_ONLY_CGROUPS}start this container with: docker run --privileged"
    assert "root that may write no cgroup" in seen.told["userns=host"][1]
    assert seen.told["wasm"] == [0, ""]


def test_without_the_capabilities_to_map_ids_they_are_named(tmp_path: Path) -> None:
    seen = look(DOCKER.with_(capabilities=(), seccomp=None, masked=(), read_only=()), tmp_path)

    seen.refused(
        f"{START}docker run --cap-add SETUID --cap-add SETGID --cap-add SETFCAP",
        "without CAP_SETGID, CAP_SETUID, CAP_SETFCAP no ids can be mapped",
    )


def test_in_podmans_container_of_a_user_its_own_words_are_used(tmp_path: Path) -> None:
    seen = look(PODMAN, tmp_path)

    seen.refused(
        f"{START}podman run --security-opt seccomp=unconfined --security-opt unmask=ALL",
        "root of a user namespace only",
        "(seccomp) forbids sethostname",
        "is masked",
    )


def test_root_of_podmans_user_namespace_has_sandboxes_in_one_below(tmp_path: Path) -> None:
    seen = look(PODMAN.with_(seccomp=None, masked=(), read_only=()), tmp_path, "userns=host")

    seen.works("unlimited")
    assert seen.told["userns=host"][2] == "Leave it out, or run as root of the host."


def test_a_user_namespace_with_too_few_ids_is_told(tmp_path: Path) -> None:
    seen = look(PODMAN.with_(seccomp=None, masked=(), read_only=(), rows=((0, 0, 1),)), tmp_path)

    available, reason, hint, _ = seen.told["probe runc"]
    assert not available
    assert "this user namespace has 1 uids, 1002 are needed" in reason
    assert "subordinate ids" in hint


def test_in_a_pod_only_the_masked_proc_is_named_in_the_words_of_kubernetes(tmp_path: Path) -> None:
    seen = look(KUBERNETES, tmp_path)

    seen.refused(
        f"{START}in the container's securityContext procMount: Unmasked (with hostUsers: false of the pod)",
        "/proc/acpi is masked",
    )


def test_in_a_pod_with_its_whole_proc_sandboxes_run(tmp_path: Path) -> None:
    seen = look(KUBERNETES.with_(masked=(), read_only=()), tmp_path, "limited")

    seen.works("unlimited")
    assert "start this container with: in the container's securityContext privileged: true" in seen.told["limited"][1]


def test_where_no_engine_is_seen_all_of_their_words_are_told(tmp_path: Path) -> None:
    seen = look(DOCKER.with_(marks=(), masked=(), read_only=()), tmp_path)

    hint = seen.told["unlimited"][2]
    assert hint == (
        "If a container is around this process, start it with: Docker: --security-opt seccomp=unconfined; podman:"
        " --security-opt seccomp=unconfined; Kubernetes: seccompProfile.type: Unconfined"
    )


OF_V2 = """
async def main():
    options = {"limited": Resources(memory="64M"), "unlimited": Resources.unlimited()}
    for name, resources in options.items():
        await attempt(name, isolation="runc", resources=resources)
    with open("/sys/fs/cgroup/cgroup.controllers") as file:
        told["controllers"] = file.read().split()
    with open("/proc/self/cgroup") as file:
        told["own"] = [line.strip() for line in file if line.startswith("0::")]
    with open("/sys/fs/cgroup/cgroup.procs") as file:
        told["at the top"] = file.read().split()
    told["cgroups"] = sorted(entry.name for entry in os.scandir("/sys/fs/cgroup") if entry.is_dir())
    told["left"] = ["w"]
    print(json.dumps(told))

anyio.run(main)
"""


def test_in_a_privileged_container_of_cgroup_v2_its_processes_make_room_for_limits(tmp_path: Path) -> None:
    """v2 gives no controllers to cgroups below one that holds processes, as the container's own does."""
    told = run(PRIVILEGED.with_(cgroups="v2"), tmp_path, OF_V2).told

    assert told["unlimited"] == WORKS, told
    assert (told["own"], told["at the top"], told["cgroups"]) == (["0::/unisandbox-host"], [], ["unisandbox-host"])
    if "memory" in told["controllers"]:
        assert told["limited"] == WORKS, told
    else:
        # The host has it in v1: no word of processes that are in the way.
        assert "/sys/fs/cgroup does not have the memory controller" in str(told["limited"]), told


KILLED = """
async def host(how):
    async with Engine.open("/tmp/state") as engine:
        async with engine.create(name=how, isolation="runc", resources=Resources.unlimited()) as sandbox:
            # It loses its parent and is left to the sandbox's init, or to nobody.
            await sandbox.sh("(setsid sleep 1000 &)")
            done = await sandbox.sh("exit 7")
            told = [done.exit_code]
            if how == "host-killed":
                os.kill(os.getpid(), 9)
            if how == "keeper-killed":
                os.kill(engine._core.host.keeper.pid, 9)
                try:
                    await sandbox.sh("true")
                except SandboxError as error:
                    told.append(type(error).__name__)
                os._exit(0)
    print(json.dumps(told))

if sys.argv[1:]:
    anyio.run(host, sys.argv[1])
else:
    # PID 1: it waits for the program that it was started for, and for nobody else.
    for how in ("host-killed", "keeper-killed", "neither"):
        begun = time.monotonic()
        code = open("/proc/self/cmdline").read().split("\\0")[2]
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True)
        told[how] = [done.returncode, done.stdout, done.stderr, time.monotonic() - begun]
    deadline = time.monotonic() + 20
    while (living := [one for one in zombies_and_others() if not one.endswith(" Z")]) and time.monotonic() < deadline:
        time.sleep(0.01)
    told["living"], told["left"] = living, ["w"]
    told["zombies"] = [one for one in zombies_and_others() if one.endswith(" Z")]
    print(json.dumps(told))
"""


@pytest.mark.parametrize(
    "surrounding", [PRIVILEGED, DOCKER.with_(seccomp=None, masked=(), read_only=())], ids=["privileged", "confined"]
)
def test_a_pid_1_that_reaps_nobody_keeps_no_engine_waiting(tmp_path: Path, surrounding: Surrounding) -> None:
    """What is dead and never reaped is dead: the next engine on the directory opens at once, and cleans up."""
    told = run(surrounding, tmp_path, KILLED).told

    assert told["host-killed"][0] == -9, told
    assert told["keeper-killed"][:2] == [0, ""], told
    assert told["neither"][:3] == [0, "[7]\n", ""], told
    assert told["living"] == [], told
    assert told["zombies"], "PID 1 reaps after all: nothing was tested"
    assert max(told[how][3] for how in ("host-killed", "keeper-killed", "neither")) < 30, told


COMPILING = """
async def host():
    async with Engine.open() as engine, engine.create(isolation="wasm", rootfs=Rootfs.dir("/tmp/w")) as sandbox:
        await sandbox.run(["/m.wasm"])

PROGRAM = b"/".join([b"wasm", b"compiler.py"])  # this text is on a command line, too

def compilers():
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdecimal() and PROGRAM in open(f"/proc/{name}/cmdline", "rb").read():
                found.append(int(name))
        except OSError:
            continue
    return found

def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return bool(condition())

if sys.argv[1:]:
    anyio.run(host)
else:
    import wasmtime
    os.mkdir("/tmp/w")
    one = "(func (result i32) " + "i32.const 7 " + "i32.const 3 i32.mul " * 2000 + ")"
    with open("/tmp/w/m.wasm", "wb") as file:
        file.write(wasmtime.wat2wasm('(module (func (export "_start"))' + one * 400 + ")"))
    code = open("/proc/self/cmdline").read().split("\\0")[2]
    child = subprocess.Popen([sys.executable, "-c", code, "host"])
    def at_work():
        try:
            return [pid for pid in compilers() if "libwasmtime" in open(f"/proc/{pid}/maps").read()]
        except OSError:
            return []

    told["began"] = within(60, at_work)
    pid = (at_work() or [0])[0]
    # As in a debugger it does not end by itself. (Stopped by a signal, it would get SIGHUP as an orphan.)
    import ctypes
    seize, interrupt = 0x4206, 0x4207
    told["held"] = [ctypes.CDLL(None).ptrace(request, pid, 0, 0) for request in (seize, interrupt)]
    child.kill()
    child.wait()
    told["ended"] = within(20, lambda: not compilers())
    told["left"] = ["w"]
    print(json.dumps(told))
"""


def test_a_compiler_without_a_cgroup_ends_with_its_host_program(tmp_path: Path) -> None:
    told = run(PRIVILEGED.with_(cgroups="ro"), tmp_path, COMPILING).told

    assert told == {"began": True, "held": [0, 0], "ended": True}
