"""What users and hosts get wrong is one typed error with a helpful message; nothing is left, everything else works."""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from unisandbox import (
    BackendError,
    Dns,
    Engine,
    InvalidArgumentError,
    Mount,
    NotFoundError,
    Resources,
    Rootfs,
    Sandbox,
    SandboxError,
    Security,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.backends.runc import RuncBackend
from unisandbox.conformance.inventory import Inventory, settle
from unisandbox.engine.events import EventLog
from unisandbox.oci import features

pytestmark = [pytest.mark.anyio, pytest.mark.root]
SMALL = Resources(memory="64M")
Options = Mapping[str, Any]

# What is refused before anything is done: by a spec that cannot be made, or by the backend's look at it.
REFUSED: dict[str, tuple[Callable[[Path], Options], type[SandboxError], str]] = {
    "memory-0": (lambda _: {"resources": Resources(memory=0)}, InvalidArgumentError, "> 0"),
    "memory-negative": (lambda _: {"resources": Resources(memory=-1)}, InvalidArgumentError, "> 0"),
    "memory-words": (lambda _: {"resources": Resources(memory="lots")}, InvalidArgumentError, "'512M'"),
    "memory-fraction": (lambda _: {"resources": Resources(memory=1.5)}, InvalidArgumentError, "'512M'"),  # type: ignore[arg-type]
    "memory-2**70": (lambda _: {"resources": Resources(memory=2**70)}, InvalidArgumentError, r"2\*\*62"),
    "memory-of-400-digits": (lambda _: {"resources": Resources(memory="9" * 400 + "T")}, InvalidArgumentError, ""),
    "pids-0": (lambda _: {"resources": Resources(pids=0)}, InvalidArgumentError, "> 0"),
    "pids-1": (lambda _: {"resources": Resources(pids=1)}, InvalidArgumentError, "at least"),
    "pids-2**40": (lambda _: {"resources": Resources(pids=2**40)}, InvalidArgumentError, "at most|most"),
    "cpu-0": (lambda _: {"resources": Resources(cpu=0)}, InvalidArgumentError, "> 0"),
    "cpu-1e-9": (lambda _: {"resources": Resources(cpu=1e-9)}, InvalidArgumentError, "0.01"),
    "cpu-nan": (lambda _: {"resources": Resources(cpu=float("nan"))}, InvalidArgumentError, "nan"),
    "cpu-1e15": (lambda _: {"resources": Resources(cpu=1e15)}, InvalidArgumentError, "1,000,000"),
    "disk-1": (lambda _: {"resources": Resources(disk=1)}, InvalidArgumentError, "at least"),
    "swap-beyond-no-memory": (
        lambda _: {"resources": Resources(memory=None, swap="1G")},
        InvalidArgumentError,
        "swap is counted beyond memory, which is not limited",
    ),
    "nofile-2**40": (lambda _: {"resources": Resources(nofile=2**40)}, InvalidArgumentError, "nofile"),
    "mount-missing": (lambda _: {"mounts": [Mount.bind("/nope/x", "/data")]}, InvalidArgumentError, "/nope/x"),
    "mount-dotdot": (lambda p: {"mounts": [Mount.bind(p, "/data/../x")]}, InvalidArgumentError, r"'\.\.'"),
    "mount-relative": (lambda p: {"mounts": [Mount.bind(p, "data")]}, InvalidArgumentError, "absolute"),
    "mount-root": (lambda p: {"mounts": [Mount.bind(p, "/")]}, InvalidArgumentError, "rootfs"),
    "mount-root-otherwise": (lambda p: {"mounts": [Mount.bind(p, "//.")]}, InvalidArgumentError, "rootfs"),
    "mount-on-proc": (lambda p: {"mounts": [Mount.bind(p, "/proc")]}, InvalidArgumentError, "/proc"),
    "mount-in-proc": (lambda p: {"mounts": [Mount.bind(p, "//proc/sys")]}, InvalidArgumentError, "/proc"),
    "mount-on-sys": (lambda p: {"mounts": [Mount.bind(p, "/sys")]}, InvalidArgumentError, "/sys"),
    "mount-in-dev": (lambda p: {"mounts": [Mount.bind(p, "/dev/x")]}, InvalidArgumentError, "/dev"),
    "mount-twice": (
        lambda p: {"mounts": [Mount.bind(p, "/data"), Mount.bind(p, "/data")]},
        InvalidArgumentError,
        "same target",
    ),
    "mount-twice-otherwise": (
        lambda p: {"mounts": [Mount.bind(p, "/data"), Mount.bind(p, "/data/")]},
        InvalidArgumentError,
        "same target",
    ),
    "mount-nul": (lambda p: {"mounts": [Mount.bind(f"{p}\0", "/data")]}, InvalidArgumentError, ""),
    "mount-tmpfs-0": (lambda _: {"mounts": [Mount.tmpfs("/scratch", size=0)]}, InvalidArgumentError, "> 0"),
    "mount-as-docker": (lambda _: {"mounts": ["/a:/b"]}, InvalidArgumentError, "Mount"),
    "network-unknown": (lambda _: {"network": "bridge"}, InvalidArgumentError, "'none'"),
    "user-negative": (lambda _: {"user": -1}, InvalidArgumentError, "not valid"),
    "user-empty": (lambda _: {"user": ""}, InvalidArgumentError, "not valid"),
    "user-of-three-parts": (lambda _: {"user": "a:b:c"}, InvalidArgumentError, "not valid"),
    "env-equals": (lambda _: {"env": {"A=B": "c"}}, InvalidArgumentError, "'A=B'"),
    "env-nul": (lambda _: {"env": {"A": "c\0"}}, InvalidArgumentError, "'A'"),
    "env-number": (lambda _: {"env": {"A": 1}}, InvalidArgumentError, "text"),
    "env-surrogate": (lambda _: {"env": {"A": "\ud800"}}, InvalidArgumentError, "'A'"),
    "env-list": (lambda _: {"env": ["A=1"]}, InvalidArgumentError, "env"),
    "cwd-relative": (lambda _: {"cwd": "nope"}, InvalidArgumentError, "absolute"),
    "cwd-nul": (lambda _: {"cwd": "/a\0b"}, InvalidArgumentError, "NUL|absolute"),
    "isolation-unknown": (lambda _: {"isolation": "nosuch"}, InvalidArgumentError, "Installed backends: .*runc"),
    "isolation-path": (lambda _: {"isolation": "../x"}, InvalidArgumentError, "not valid"),
    "image": (lambda _: {"rootfs": "alpine"}, UnsupportedError, "unpack"),
    "rootfs-empty": (lambda _: {"rootfs": ""}, InvalidArgumentError, "'host'"),
    "rootfs-slash": (lambda _: {"rootfs": "/usr/.."}, InvalidArgumentError, "Rootfs.host"),
    "rootfs-missing": (lambda _: {"rootfs": "/nope/rootfs"}, InvalidArgumentError, "/nope/rootfs"),
    "rootfs-nul": (lambda _: {"rootfs": "/a\0b"}, InvalidArgumentError, ""),
    "annotations": (lambda _: {"annotations": {"a": "b"}}, UnsupportedError, "'a'"),
    "name-path": (lambda _: {"name": "../../etc"}, InvalidArgumentError, "1 to 76"),
    "name-newline": (lambda _: {"name": "a\n"}, InvalidArgumentError, "1 to 76"),
    "name-long": (lambda _: {"name": "a" * 77}, InvalidArgumentError, "1 to 76"),
    "hostname-long": (lambda _: {"hostname": "a" * 65}, InvalidArgumentError, "at most 64"),
    "sysctl-of-the-host": (
        lambda _: {"sysctls": {"kernel.core_pattern": "|/bin/x"}},
        InvalidArgumentError,
        "would change the host",
    ),
    "sysctl-path": (
        lambda _: {"sysctls": {"net.ipv4/../../kernel/core_pattern": "x"}},
        InvalidArgumentError,
        "not valid",
    ),
    "sysctl-two-lines": (lambda _: {"sysctls": {"net.ipv4.ip_forward": "1\n0"}}, InvalidArgumentError, "one line"),
    "sysctl-of-the-hosts-network": (
        lambda _: {"sysctls": {"net.ipv4.ip_forward": "1"}, "network": "host"},
        UnsupportedError,
        "not the sandbox's own",
    ),
    "dns": (lambda _: {"dns": Dns(servers=["a b\nc"])}, InvalidArgumentError, "resolv.conf"),
    "hosts": (lambda _: {"hosts": {"a": "1.1.1.1\n"}}, InvalidArgumentError, "not valid"),
    "capability-unknown": (
        lambda _: {"security": Security(capabilities=["CAP_NOPE"])},
        InvalidArgumentError,
        "CAP_NOPE",
    ),
    "seccomp-misspelt": (
        lambda _: {"security": Security(seccomp="defualt")},  # type: ignore[arg-type]
        InvalidArgumentError,
        "unconfined",
    ),
    "userns": (lambda _: {"userns": "shared"}, InvalidArgumentError, "'private'"),
}

# What only the attempt shows; it too leaves nothing.
FAILED: dict[str, tuple[Callable[[Path], Options], type[SandboxError], str]] = {
    "disk-2**60": (lambda _: {"resources": Resources(disk=2**60)}, InvalidArgumentError, "above what the file system"),
    "mount-below-usr": (lambda p: {"mounts": [Mount.bind(p, "/usr/mnt")]}, InvalidArgumentError, "/usr/mnt"),
    "mount-below-a-link": (lambda p: {"mounts": [Mount.bind(p, "/bin/foo")]}, InvalidArgumentError, "/bin/foo"),
    "directory-on-a-file": (lambda p: {"mounts": [Mount.bind(p, "/etc/passwd")]}, InvalidArgumentError, "/etc/passwd"),
    "file-on-a-directory": (lambda p: {"mounts": [Mount.bind(p / "file", "/usr")]}, InvalidArgumentError, "/usr"),
    "mount-long-name": (lambda p: {"mounts": [Mount.bind(p, "/data/" + "x" * 300)]}, InvalidArgumentError, "xxx"),
    "network-file": (lambda p: {"network": str(p / "file")}, InvalidArgumentError, "is no network namespace"),
    "network-uts": (lambda _: {"network": "/proc/self/ns/uts"}, InvalidArgumentError, "is no network namespace"),
    "network-missing": (lambda _: {"network": "/run/netns/nope"}, InvalidArgumentError, "No such file"),
    "network-directory": (lambda p: {"network": str(p)}, InvalidArgumentError, "is no network namespace"),
    "network-fifo": (lambda p: {"network": str(p / "fifo")}, InvalidArgumentError, "is no network namespace"),
    "network-of-the-host": (lambda _: {"network": "/proc/self/ns/net"}, InvalidArgumentError, "network='host'"),
    "rootfs-file": (lambda p: {"rootfs": p / "file"}, InvalidArgumentError, "Not a directory"),
    "sysctl-missing": (lambda _: {"sysctls": {"net.ipv4.nosuch": "1"}}, InvalidArgumentError, "net.ipv4.nosuch"),
    "sysctl-value": (lambda _: {"sysctls": {"net.ipv4.ip_forward": "banana"}}, InvalidArgumentError, "banana"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a file and a fifo in it."""
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


@asynccontextmanager
async def engine_with_a_sandbox() -> AsyncIterator[tuple[Engine, Callable[[], Awaitable[None]]]]:
    """An engine, and a check that nothing has changed since: the other sandbox works, new ones can be made."""
    async with Engine.open() as engine, engine.create(resources=SMALL) as other:
        await other.run(["true"])
        async with engine.create(resources=SMALL) as first:
            await first.run(["true"])
        before = Inventory.take()

        async def check() -> None:
            assert settle(before) == []
            assert [status.id for status in await engine.list()] == [other.id]
            assert (await other.sh("exit 4")).exit_code == 4
            async with engine.create(resources=SMALL) as fresh:
                assert (await fresh.run(["echo", "fine"])).text == "fine\n"

        yield engine, check


def speaks(error: SandboxError, words: str) -> None:
    """The message is one line for a person: no bare errno, no traceback, and it says `words`."""
    text = str(error)
    assert re.search(words, text), text
    assert "[Errno" not in text
    assert "Traceback" not in text
    assert len(error.message.splitlines()) == 1


@pytest.mark.parametrize("name", REFUSED)
async def test_a_bad_spec_is_refused_before_anything_is_done(name: str, place: Path) -> None:
    options, kind, words = REFUSED[name]
    async with engine_with_a_sandbox() as (engine, check):
        log = engine._core.events
        assert isinstance(log, EventLog)
        events = len(log._events)
        with pytest.raises(kind) as caught:
            async with engine.create(**options(place)) as sandbox:
                await sandbox.run(["true"])
        speaks(caught.value, words)
        told = [event.kind for event in list(log._events)[events:]]
        assert told == [], "it had begun"
        await check()


@pytest.mark.parametrize("name", FAILED)
async def test_what_cannot_be_made_leaves_nothing(name: str, place: Path) -> None:
    options, kind, words = FAILED[name]
    async with engine_with_a_sandbox() as (engine, check):
        with pytest.raises(kind) as caught:
            await engine.create(**options(place))
        speaks(caught.value, words)
        await check()


@pytest.mark.parametrize(
    "resources",
    [
        Resources(memory=2**60),
        Resources(memory="2M", disk="1M"),
        Resources(pids=3),
        Resources(cpu=0.01),
        Resources(disk="64K"),
        Resources(disk="1T"),
        Resources(core=2**60, swap=2**61),
        Resources.unlimited(),
    ],
    ids=repr,
)
async def test_extreme_limits_that_can_be_had_are_given(resources: Resources) -> None:
    async with Engine.open() as engine, engine.create(resources=resources) as sandbox:
        assert (await sandbox.run(["true"])).exit_code == 0


async def test_a_limit_that_nothing_can_run_in_is_the_programs_own_failure() -> None:
    """With one open file a program cannot load its libraries; that is what was asked for."""
    async with Engine.open() as engine, engine.create(resources=Resources(nofile=1)) as sandbox:
        done = await sandbox.run(["/bin/true"])
        assert (done.exit_code, b"shared libraries" in done.stderr) == (127, True)


RUNS: dict[str, tuple[Callable[[Sandbox], Awaitable[object]], int | None, str]] = {
    "no-words": (lambda sb: sb.run([]), None, "program's name"),
    "a-string": (lambda sb: sb.run("ls -l"), None, "list of words"),
    "empty-name": (lambda sb: sb.run([""]), None, "program's name"),
    "nul": (lambda sb: sb.run(["ls", "a\0"]), None, "NUL"),
    "surrogate": (lambda sb: sb.run(["ls", "\ud800"]), None, "ud800"),
    "a-number": (lambda sb: sb.run([1]), None, "text"),  # type: ignore[list-item]
    "missing": (lambda sb: sb.run(["nosuchprogram"]), 127, "no such program"),
    "directory": (lambda sb: sb.run(["/tmp"]), 126, "Permission denied"),
    "not-executable": (lambda sb: sb.run(["/etc/passwd"]), 126, "Permission denied"),
    "large-word": (lambda sb: sb.run(["echo", "x" * 200_000]), 126, "too large"),
    "large-argv": (lambda sb: sb.run(["echo", *["x" * 100_000] * 40]), 126, "too large"),
    "large-env": (lambda sb: sb.run(["true"], env={f"A{i}": "x" * 100_000 for i in range(40)}), 126, "too large"),
    "huge-word": (lambda sb: sb.run(["echo", "x" * (20 << 20)]), 126, "too large"),
    "many-words": (lambda sb: sb.run(["true", *["a"] * 300_000]), 126, "too large"),
    "cwd-missing": (lambda sb: sb.run(["true"], cwd="/nope"), 126, "directory '/nope'"),
    "cwd-file": (lambda sb: sb.run(["true"], cwd="/etc/passwd"), 126, "Not a directory"),
    "cwd-relative": (lambda sb: sb.run(["true"], cwd="nope"), None, "absolute"),
    "cwd-long": (lambda sb: sb.run(["true"], cwd="/" + "x" * 5000), 126, "too long"),
    "user-missing": (lambda sb: sb.run(["true"], user="nope"), None, "/etc/passwd"),
    "group-missing": (lambda sb: sb.run(["true"], user="root:nope"), None, "/etc/group"),
    "user-above": (lambda sb: sb.run(["true"], user=65536), None, "65535"),
    "user-2**64": (lambda sb: sb.run(["true"], user=2**64), None, "65535"),
    "timeout-0": (lambda sb: sb.run(["true"], timeout=0), None, "> 0"),
    "timeout-nan": (lambda sb: sb.run(["true"], timeout=float("nan")), None, "> 0"),
    "max-output": (lambda sb: sb.run(["true"], max_output=-1), None, ">= 0"),
    "path-empty": (lambda sb: sb.run(["true"], env={"PATH": ""}), 127, "PATH|no such program"),
    "sh-nul": (lambda sb: sb.sh("echo \0"), None, "NUL"),
    "exec-missing": (lambda sb: sb.exec(["nosuchprogram"], tty=True), 127, "no such program"),
    "add-missing": (lambda sb: sb.containers.add(argv=["nosuchprogram"]), 127, "no such program"),
    "add-name": (lambda sb: sb.containers.add(argv=["true"], name="../x"), None, "1 to 76"),
    "add-main": (lambda sb: sb.containers.add(argv=["true"], name="a" * 77), None, "1 to 76"),
}


@pytest.mark.parametrize("name", RUNS)
async def test_a_bad_run_is_a_clear_error_and_harms_nothing(name: str) -> None:
    call, exit_code, words = RUNS[name]
    async with Engine.open() as engine, engine.create(resources=Resources(memory="256M")) as sandbox:
        await sandbox.run(["true"])
        before = Inventory.take()
        with pytest.raises(InvalidArgumentError) as caught:
            await call(sandbox)
        speaks(caught.value, words)
        assert caught.value.exit_code == exit_code
        assert (await sandbox.run(["echo", "fine"])).text == "fine\n"
        with anyio.move_on_after(20):
            # The kernel frees the cgroup of an ended process late; the sandbox removes it with a later call.
            while settle(before, 0.1):
                await sandbox.run(["true"])
        assert settle(before) == []
        assert len((await sandbox.status()).containers) == 1


async def test_the_sandboxes_own_bad_directory_is_named() -> None:
    async with Engine.open() as engine, engine.create(resources=SMALL, cwd="/nope") as sandbox:
        with pytest.raises(InvalidArgumentError, match="'/nope'"):
            await sandbox.run(["true"])


# --- runtimes that are missing or broken; all of these are fakes ---


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the engine find one runtime and no other: a fake that does as told, or none at all."""
    from unisandbox.oci import features

    def arrange(text: str | None, name: str = "crun") -> None:
        monkeypatch.setattr(features, "_USUAL_PLACES", ())
        monkeypatch.setattr(features, "_known", {})
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        if text is not None:
            script(tmp_path / "bin" / name, f"export PATH=/usr/bin:/bin\n{text}")

    return arrange


VERSION = (
    'case "$*" in *--version*) echo "crun version 1.8.1"; echo "spec: 1.0.0"; echo "+SECCOMP +EBPF"; exit 0;; esac\n'
)
REAL = 'exec /usr/bin/crun "$@"\n'


async def fails(kind: type[SandboxError], words: str, within: float = 20.0) -> None:
    """A first create and run with the runtime that was arranged fail as said, and the engine closes clean."""
    async with Engine.open() as engine:
        begun = time.monotonic()
        with pytest.raises(kind) as caught:
            async with engine.create(resources=SMALL) as sandbox:
                await sandbox.run(["true"])
        assert time.monotonic() - begun < within
        assert re.search(words, str(caught.value)), str(caught.value)
        assert await engine.list() == []


async def test_no_runtime_at_all(only: Callable[..., None]) -> None:
    only(None)
    await fails(UnavailableError, r"no OCI runtime found \(looked for crun, runc, youki in PATH\).*apt install crun")


async def test_what_a_runtime_cannot_do_is_refused_before_anything_is_done(
    only: Callable[..., None], tmp_path: Path
) -> None:
    only(None)
    script(tmp_path / "bin" / "youki", 'echo "youki version: 0.7.0"')
    assert any("share_pid" in warning for warning in (await RuncBackend().probe()).warnings)
    async with Engine.open() as engine:
        with pytest.raises(UnsupportedError, match=r"share_pid .* youki cannot join the pid namespace"):
            await engine.create(share_pid=True)
        assert await engine.list() == []


async def test_a_runtime_without_seccomp_is_no_reason_to_run_without_a_filter(only: Callable[..., None]) -> None:
    only('case "$*" in *--version*) echo "crun version 1.8.1"; echo "+EBPF"; exit 0;; esac; exit 1')
    assert any("seccomp='default'" in warning for warning in (await RuncBackend().probe()).warnings)
    async with Engine.open() as engine:
        with pytest.raises(UnsupportedError, match=r"seccomp='default' .* built without seccomp"):
            await engine.create()
        assert await engine.list() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exit 3", "code 3"),
        ("echo hello", "not that of a known runtime"),
        ("head -c 100000 /dev/zero", "more than"),
        ("kill -9 $$", "signal 9"),
        ("printf '\\377\\376\\000'", "not that of a known runtime"),
    ],
)
async def test_a_runtime_that_does_not_know_its_version(only: Callable[..., None], text: str, words: str) -> None:
    only(text)
    await fails(UnavailableError, words)


@pytest.mark.parametrize("how", ["exec", "run", "launch", "add"])
async def test_what_fails_as_the_ttl_ends_in_its_middle_says_that(only: Callable[..., None], how: str) -> None:
    only(VERSION + '/usr/bin/crun "$@"; code=$?; case "$*" in *" create "*) sleep 4;; esac; exit $code')
    starts: dict[str, Callable[[Sandbox], Awaitable[object]]] = {
        "exec": lambda sandbox: sandbox.exec(["sleep", "1000"]),
        "run": lambda sandbox: sandbox.run(["sleep", "1000"]),
        "launch": lambda sandbox: sandbox.launch(["sleep", "1000"]),
        "add": lambda sandbox: sandbox.containers.add(argv=["sleep", "1000"]),
    }
    async with Engine.open() as engine:
        sandbox = await engine.create(ttl=2)
        with pytest.raises(NotFoundError, match=r"was removed: its ttl of 2 s is over"):
            await starts[how](sandbox)


async def test_a_runtime_that_hangs_at_its_version(only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_QUERY_SECONDS", 0.5)
    only("sleep 1000")
    await fails(UnavailableError, r"within 0\.5 s", within=20.0)


@pytest.mark.skipif(not os.path.exists("/usr/bin/crun"), reason="crun is not installed")
@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("echo no such luck >&2; exit 1", BackendError, "crun create .* failed"),
        ("kill -9 $$", BackendError, "crun create .* failed|signal"),
        ("exit 0", BackendError, "pid|said nothing"),
        ("head -c 1000000 /dev/zero >&2; exit 9", BackendError, "crun create .* failed"),
        (
            'for word; do case "$before" in --pid-file) echo garbage > "$word";; esac; before="$word"; done; exit 0',
            BackendError,
            "pid",
        ),
        (
            'for word; do case "$before" in --pid-file) echo 1 > "$word";; esac; before="$word"; done; exit 0',
            BackendError,
            "",
        ),
    ],
    ids=["fails", "dies", "does-nothing", "floods", "garbage-pid", "pid-1"],
)
async def test_a_runtime_that_cannot_create(
    only: Callable[..., None], text: str, kind: type[SandboxError], words: str
) -> None:
    only(f'{VERSION}case "$*" in *create*) {text};; esac\n{REAL}')
    await fails(kind, words)


@pytest.mark.skipif(not os.path.exists("/usr/bin/crun"), reason="crun is not installed")
async def test_a_runtime_that_breaks_harms_neither_engine_nor_others(only: Callable[..., None], tmp_path: Path) -> None:
    switch = tmp_path / "broken"
    only(f'{VERSION}test -e {switch} && case "$*" in *create*) echo broken >&2; exit 1;; esac\n{REAL}')
    async with engine_with_a_sandbox() as (engine, check):
        switch.write_text("")
        async with engine.create(resources=SMALL) as sandbox:
            with pytest.raises(BackendError, match="failed: exit code 1"):
                await sandbox.run(["true"])
            switch.unlink()
            assert (await sandbox.run(["true"])).exit_code == 0, "the same sandbox works once the runtime does"
        await check()


@pytest.mark.skipif(not os.path.exists("/usr/bin/crun"), reason="crun is not installed")
async def test_a_slow_create_can_be_cancelled_and_killed(only: Callable[..., None], tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    slow = tmp_path / "slow"
    only(f'{VERSION}test -e {slow} && case "$*" in *create*) echo $$ > {begun}; sleep 1000;; esac\n{REAL}')
    async with engine_with_a_sandbox() as (engine, check):
        slow.write_text("")
        async with engine.create(resources=SMALL) as sandbox:
            async with anyio.create_task_group() as group:
                group.start_soon(sandbox.run, ["true"])
                with anyio.fail_after(10):
                    while not (begun.exists() and begun.read_text().strip()):
                        await anyio.sleep(0.005)
                group.cancel_scope.cancel()
            begun.unlink()

            async def run_and_fail() -> None:
                with pytest.raises(SandboxError):
                    await sandbox.run(["true"])

            async with anyio.create_task_group() as group:
                group.start_soon(run_and_fail)
                with anyio.fail_after(10):
                    while not (begun.exists() and begun.read_text().strip()):
                        await anyio.sleep(0.005)
                os.kill(int(begun.read_text()), 9)
            slow.unlink()
            assert (await sandbox.run(["true"])).exit_code == 0
        await check()


async def test_an_unreadable_rootfs_option_is_not_taken_for_the_hosts() -> None:
    """No other rootfs than the one asked for, ever."""
    assert Rootfs.parse("host").kind == "host"
    assert Rootfs.parse("./host").kind == "dir"
    assert Rootfs.parse(Path("host")).kind == "dir"
    assert Rootfs.parse("HOST").kind == "image"


@pytest.mark.parametrize("name", [name for name in ("crun", "runc") if os.path.exists(f"/usr/bin/{name}")])
async def test_a_runtime_that_is_started_as_the_keeper_dies_is_ended(only: Callable[..., None], name: str) -> None:
    """The keeper can tell nobody about it any more."""
    only(f'case "$*" in *create*) kill -9 $PPID; exec sleep 86551;; esac\nexec /usr/bin/{name} "$@"', name)
    async with Engine.open() as engine:
        with pytest.raises(UnavailableError, match="keeper"):
            async with engine.create(resources=SMALL) as sandbox:
                await sandbox.run(["true"])
