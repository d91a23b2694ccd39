"""Wasm sandboxes of who may mount nothing and make no namespace: what is promised holds by other means, or is refused.

An ordinary user without subordinate ids is one; the containers in which root is another are in
`integration/test_inside_containers.py`.
"""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.plain_user import PlainUser, plain_user
from tests.wasm.sandboxes import make_root, tool, tree_of

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def user() -> Iterator[PlainUser]:
    with plain_user(single=True) as made:
        yield made


@pytest.fixture
def root(user: PlainUser, tmp_path: Path) -> Path:
    """A root directory and one that is mounted, below his own directory, but of root's."""
    place = Path(user.home, tmp_path.name)
    make_root(place / "root")
    (place / "root" / "tmp").mkdir()
    (place / "root" / "tmp" / "below").write_text("of the original")
    (place / "host" / "sub").mkdir(parents=True)
    (place / "host" / "f").write_text("of the host")
    for path in (place / "host", place / "host" / "sub"):
        path.chmod(0o777)
    return place


def run(user: PlainUser, place: Path, work: str) -> dict[str, object]:
    """Run it; his engines have left nothing."""
    body = "\n".join(f"    {line}" for line in work.strip("\n").splitlines())
    told = user.run(
        f"from unisandbox import FailedPreconditionError\nplace = Path({str(place)!r})\n"
        f"async with Engine.open() as engine:\n{body}\n"
        "tell(left=[p.name for p in Path('/var/tmp').glob('unisandbox-*.files')])"
    )
    assert told.pop("left") == []
    return told


def test_the_directory_is_copied_and_never_changed(user: PlainUser, root: Path) -> None:
    before = tree_of(root)

    told = run(user, root, """
async with engine.create(isolation="wasm", rootfs=place / "root") as s:
    tell(seven=(await s.run(["seven.wat"])).exit_code)
    await s.run(["store", "/etc/motd", "changed"], check=True)
    await s.run(["rm", "/bin/echo.wasm"], check=True)
    tell(motd=(await s.files.read("/etc/motd")).decode(), below=(await s.files.read("/tmp/below")).decode())
    tell(echo=await s.files.exists("/bin/echo.wasm"), kind=(await s.files.stat("/home")).kind)
async with engine.create(isolation="wasm", rootfs=place / "root") as s:
    tell(other=(await s.run(["cat", "/etc/motd"])).text)
""")  # fmt: skip

    assert told == {
        "seven": 7, "motd": "changed", "below": "of the original", "echo": False, "kind": "directory",
        "other": "hello from below\n",
    }  # fmt: skip
    assert tree_of(root) == before


def test_only_its_own_places_can_be_written_when_the_root_is_read_only(user: PlainUser, root: Path) -> None:
    told = run(user, root, """
async def refused(change):
    try:
        await change
    except FailedPreconditionError as error:
        return "Read-only" in error.message
async with engine.create(isolation="wasm", rootfs=Rootfs.dir(place / "root", readonly=True)) as s:
    for path in ("/etc/motd", "/new", "/bin/new"):
        done = await s.run(["store", path, "x"])
        tell(**{path: [done.exit_code != 0, await refused(s.files.write(path, b"x"))]})
    tell(tmp=(await s.run(["ls", "/tmp"])).text.split())
    for path in ("/tmp/x", "/run/x", "/home/x"):
        await s.run(["store", path, "inside"], check=True)
        tell(**{path: (await s.files.read(path)).decode()})
        await s.files.write(path, b"outside")
    tell(seen=(await s.run(["cat", "/tmp/x"])).text, listed=(await s.run(["ls", "/"])).text.split())
    tell(others=[await refused(s.files.mkdir("/d")), await refused(s.files.remove("/etc", recursive=True)),
                 await refused(s.files.rename("/etc/motd", "/tmp/motd")),
                 await refused(s.files.rename("/tmp/x", "/etc/x")),
                 await refused(s.files.upload(place / "host", "/etc/x"))])
    tell(motd=(await s.run(["cat", "/etc/motd"])).text)
""")  # fmt: skip

    for path in ("/etc/motd", "/new", "/bin/new"):
        assert told.pop(path) == [True, True], path
    for path in ("/tmp/x", "/run/x", "/home/x"):
        assert told.pop(path) == "inside"
    assert sorted(told.pop("listed")) == ["bin", "etc", "home", "run", "seven.wat", "tmp"]  # type: ignore[call-overload]
    assert told == {"tmp": [], "seen": "outside", "others": [True] * 5, "motd": "hello from below\n"}


def test_directories_of_the_host_are_there_as_was_asked(user: PlainUser, root: Path) -> None:
    before = tree_of(root / "host" / "f")

    told = run(user, root, """
place_link = Path(HOME) / "link"
place_link.symlink_to("/data/ro/f")
mounts = [Mount.bind(place / "host", "/data/ro"), Mount.bind(place / "host" / "sub", "/data/rw", readonly=False)]
for readonly in (False, True):
    rootfs = Rootfs.dir(place / "root", readonly=readonly)
    async with engine.create(isolation="wasm", rootfs=rootfs, mounts=mounts, resources=Resources(disk="4M")) as s:
        tell(**{f"read {readonly}": [(await s.run(["cat", "/data/ro/f"])).text,
                                     (await s.files.read("/data/ro/f")).decode(),
                                     (await s.run(["ls", "/data"])).text.split()]})
        done = await s.run(["store", "/data/ro/new", "x"])
        try:
            await s.files.write("/data/ro/new", b"x")
        except FailedPreconditionError as error:
            tell(**{f"refused {readonly}": [done.exit_code != 0, "Read-only" in error.message]})
        await s.run(["fill", f"/data/rw/large-{readonly}", str(8 << 20), "keep"], check=True)
        await s.files.write(f"/data/rw/outside-{readonly}", bytes(8 << 20))
        for gone in (s.files.remove("/data/ro"), s.files.remove("/data/rw", recursive=True),
                     s.files.rename("/data/ro", "/tmp/ro")):
            try:
                await gone
            except FailedPreconditionError:
                continue
            tell(gone=True)
        # A link leads where it leads for a guest, but not out.
        await s.files.upload(place_link, "/home/link")
        tell(**{f"link {readonly}": (await s.files.read("/home/link")).decode()})
tell(there=sorted(p.name for p in (place / "host" / "sub").iterdir()))
""")  # fmt: skip

    for readonly in (False, True):
        assert told.pop(f"read {readonly}") == ["of the host", "of the host", ["ro", "rw"]]
        assert told.pop(f"refused {readonly}") == [True, True]
        assert told.pop(f"link {readonly}") == "of the host"
    assert told == {"there": ["large-False", "large-True", "outside-False", "outside-True"]}
    assert tree_of(root / "host" / "f") == before


def test_what_takes_a_mount_is_refused_with_the_remedy(user: PlainUser, root: Path) -> None:
    told = run(user, root, """
from unisandbox.engine.registry import Registry
for name, mount in (("file", Mount.bind(place / "host" / "f", "/f")), ("tmpfs", Mount.tmpfs("/t"))):
    try:
        await engine.create(isolation="wasm", rootfs=place / "root", mounts=[mount])
    except UnsupportedError as error:
        tell(**{name: [error.capability, error.hint]})
tell(sandboxes=len(await engine.list()))
backend = Registry().get("wasm")
probe = await backend.probe()
tell(available=probe.available, warning=probe.warnings[0], notes=len(backend.capabilities.notes))
""")  # fmt: skip

    assert told["file"] == ["a mount of a single file", "Mount a directory, or: Run as root."]
    assert told["tmpfs"] == ["a mount of a tmpfs", "Mount a directory, or: Run as root."]
    assert (told["sandboxes"], told["available"]) == (0, True)
    assert "(this process is not root)" in str(told["warning"])
    assert told["notes"]


def test_a_container_has_a_copy_of_its_own_in_the_same_disk(user: PlainUser, root: Path) -> None:
    told = run(user, root, """
async with engine.create(isolation="wasm", rootfs=place / "root", resources=Resources(disk="6M")) as s:
    for name in ("one", "two"):
        async with s.containers.add(rootfs=place / "root", argv=["store", "/tmp/mine", name], name=name) as c:
            tell(**{name: (await c.wait()).code})
            before = (await s.metrics()).disk_bytes
        tell(**{f"{name} gone": before - (await s.metrics()).disk_bytes > 4096})
    await s.containers.add(rootfs=place / "root", argv=["sleep", "60"], name="three")
    done = await s.run(["fill", "/tmp/x", str(6 << 20), "keep"])
    tell(filled=done.exit_code, used=(await s.metrics()).disk_bytes, mine=await s.files.exists("/tmp/mine"))
""")  # fmt: skip

    assert (told["one"], told["two"], told["one gone"], told["two gone"]) == (0, 0, True, True)
    assert (told["filled"], told["mine"]) == (1, False)
    assert 4 << 20 < told["used"] <= 6 << 20  # type: ignore[operator]


def test_a_directory_that_is_larger_than_the_disk_is_refused(user: PlainUser, root: Path) -> None:
    (root / "root" / "large").write_bytes(tool() * 100)

    told = run(user, root, """
for limit in ("64K", "1M"):
    try:
        await engine.create(isolation="wasm", rootfs=place / "root", resources=Resources(disk=limit))
    except FailedPreconditionError as error:
        tell(**{limit: "larger than its disk limit" in error.message})
tell(sandboxes=len(await engine.list()))
""")  # fmt: skip

    assert told == {"64K": True, "1M": True, "sandboxes": 0}


def test_nothing_is_left_when_he_is_killed(user: PlainUser, root: Path) -> None:
    process = user.start(f"""
async with Engine.open() as engine:
    async with engine.create(isolation="wasm", rootfs=Path({str(root)!r}) / "root") as s:
        await s.exec(["sleep", "1000"])
        tell(there=[str(p) for p in Path("/var/tmp").glob("unisandbox-*.files")], keeper=engine._core.host.keeper.pid)
        await anyio.sleep_forever()
""")
    with process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        (there,) = told["there"]
        keeper = os.pidfd_open(told["keeper"])
        process.kill()
    try:
        assert select.select([keeper], [], [], 30.0)[0], "the keeper goes on"
    finally:
        os.close(keeper)
    assert not Path(there).exists()


def test_the_next_engine_removes_what_a_machine_that_failed_has_left(user: PlainUser, root: Path) -> None:
    """Host process and keeper are killed at once; of one sandbox there is no record any more."""
    process = user.start(f"""
async with Engine.open(Path(HOME) / "state") as engine:
    for name in ("a", "b"):
        await engine.create(name=name, isolation="wasm", rootfs=Path({str(root)!r}) / "root")
    tell(keeper=engine._core.host.keeper.pid)
    await anyio.sleep_forever()
""")
    state = user.home / "state"
    with process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert len(list(state.glob("*.files"))) == 2
        os.kill(told["keeper"], signal.SIGKILL)
        process.kill()
    assert len(list(state.glob("*.files"))) == 2
    next(iter((state / "sandboxes").iterdir())).unlink()

    told = user.run('async with Engine.open(Path(HOME) / "state") as engine:\n    tell(left=len(await engine.list()))')

    assert (told["left"], list(state.glob("*.files"))) == (0, [])


@pytest.mark.timeout(1800)
def test_the_contract_holds_for_him(user: PlainUser, pytestconfig: pytest.Config) -> None:
    """The conformance tests: with --long all of them, else those of files, where mounts are made otherwise."""
    names = ["unisandbox.conformance"]
    if not pytestconfig.getoption("--long"):
        names = [f"unisandbox.conformance.test_{name}" for name in ("files_bounds", "limits")]
    done = user.pytest("--backend", "wasm", "-k", "not trio", "--pyargs", *names, timeout=1700)

    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    assert " passed" in done.stdout
