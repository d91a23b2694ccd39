"""What a guest reaches by names: its own tree and nothing else, whatever it or somebody outside does meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import pytest
from tests.wasm.sandboxes import make_root

from unisandbox import Engine, InvalidArgumentError, Mount, Resources, Sandbox
from unisandbox.backends.wasm.tree import Layer, Sources, TreeMaker

pytestmark = [pytest.mark.anyio, pytest.mark.root]

HIDDEN = "of the host"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text(HIDDEN)
    return tmp_path / "outside"


async def _fails_to_read(sandbox: Sandbox, *paths: str) -> None:
    for path in paths:
        done = await sandbox.run(["cat", path])
        assert done.exit_code != 0, path
        assert HIDDEN not in done.text, path


async def test_links_and_dots_of_the_root_do_not_lead_out(wasm: Engine, tmp_path: Path, outside: Path) -> None:
    root = make_root(tmp_path / "root")
    (root / "absolute").symlink_to(outside / "secret")
    (root / "up").symlink_to("../" * 30 + str(outside).lstrip("/"))
    (root / "dots").symlink_to("..")
    async with wasm.create(isolation="wasm", rootfs=root) as sandbox:
        up = "/.." * 30
        await _fails_to_read(sandbox, "/absolute", "/up/secret", "/dots/outside/secret", f"{up}{outside}/secret")
        await _fails_to_read(sandbox, f"..{up}{outside}/secret", "/proc/self/environ", "/proc/1/root/etc/passwd")
        # The same names as programs, and from outside.
        for name in ("/absolute", f"{up}{outside}/secret"):
            with pytest.raises(InvalidArgumentError):
                await sandbox.run([name])


async def test_links_that_a_guest_makes_do_not_lead_out(wasm: Engine, tmp_path: Path, outside: Path) -> None:
    root = make_root(tmp_path / "root")
    mounts = [Mount.bind(tmp_path / "root" / "etc", "/rw", readonly=False)]
    async with wasm.create(isolation="wasm", rootfs=root, mounts=mounts) as sandbox:
        for place in ("/tmp", "/rw", "/home"):
            for number, target in enumerate((f"{outside}/secret", "../../../../../../../../etc/shadow", "/etc/shadow")):
                await sandbox.run(["ln", target, f"{place}/l{number}"])  # WASI refuses some of them itself
                await _fails_to_read(sandbox, f"{place}/l{number}")


async def test_a_mount_is_no_way_into_what_lies_beside_it(wasm: Engine, tmp_path: Path, outside: Path) -> None:
    root = make_root(tmp_path / "root")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "link").symlink_to("../outside/secret")
    async with wasm.create(isolation="wasm", rootfs=root, mounts=[Mount.bind(shared, "/m", readonly=False)]) as sandbox:
        await _fails_to_read(sandbox, "/m/link", "/m/../outside/secret", "/m/../../outside/secret")
        # A guest's link may lie on the host then; nothing of ours follows it there.
        await sandbox.run(["ln", "../outside/secret", "/m/mine"])
        await _fails_to_read(sandbox, "/m/mine")
    assert (outside / "secret").read_text() == HIDDEN


async def test_a_readonly_mount_stays_so_whatever_is_renamed(wasm: Engine, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    given, writable = tmp_path / "given", tmp_path / "writable"
    for directory in (given, writable):
        directory.mkdir()
    (given / "f").write_text("given")
    mounts = [Mount.bind(given, "/given"), Mount.bind(writable, "/writable", readonly=False)]
    async with wasm.create(isolation="wasm", rootfs=root, mounts=mounts) as sandbox:
        # One guest swaps a link between the two while others write through it.
        async with sandbox.exec(["swap", "given", "writable", "/way"]) as swapping:
            for _ in range(40):
                await sandbox.run(["store", "/way/f", "changed"])
                await sandbox.run(["rm", "/way/f"])
                await sandbox.run(["mv", "/way/f", "/tmp/f"])
                assert swapping.exit is None
    assert (given / "f").read_text() == "given"
    assert sorted(os.listdir(given)) == ["f"]


async def test_sandboxes_do_not_see_each_other(wasm: Engine, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    async with (
        wasm.create(isolation="wasm", rootfs=root) as one,
        wasm.create(isolation="wasm", rootfs=root) as other,
    ):
        for place in ("/tmp/x", "/home/x", "/run/x", "/x"):
            await one.run(["store", place, HIDDEN])
            await _fails_to_read(other, place)
            assert (await one.run(["cat", place])).text == HIDDEN


async def test_a_guest_has_its_streams_and_no_other_descriptor(wasm: Engine, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    with (tmp_path / "open").open("w") as mine:
        os.set_inheritable(mine.fileno(), True)
        async with wasm.create(isolation="wasm", rootfs=root) as sandbox:
            assert (await sandbox.run(["fds"])).text.split() == ["0", "1", "2"]


async def test_a_program_is_only_what_is_in_the_root(wasm: Engine, tmp_path: Path, outside: Path) -> None:
    root = make_root(tmp_path / "root")
    os.link(root / "bin" / "true.wasm", outside / "true.wasm")
    (root / "bin" / "far.wasm").symlink_to(outside / "true.wasm")
    os.mkfifo(root / "bin" / "fifo.wasm")
    (root / "bin" / "inside.wat").symlink_to("/seven.wat")
    async with wasm.create(isolation="wasm", rootfs=root) as sandbox:
        with pytest.raises(InvalidArgumentError) as caught:
            await sandbox.run(["far"])
        assert caught.value.exit_code == 127
        with anyio.fail_after(10), pytest.raises(InvalidArgumentError) as caught:
            await sandbox.run(["fifo"])
        assert caught.value.exit_code == 126
        # An absolute link is meant within the root.
        assert (await sandbox.run(["inside.wat"])).exit_code == 7


async def test_a_program_that_a_guest_changes_is_another_one(wasm: Engine, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    async with wasm.create(isolation="wasm", rootfs=root) as sandbox:
        assert (await sandbox.run(["seven.wat"])).exit_code == 7
        text = (await sandbox.files.read("/seven.wat")).replace(b"i32.const 7", b"i32.const 8")
        await sandbox.files.write("/seven.wat", text)
        assert (await sandbox.run(["seven.wat"])).exit_code == 8
        async with wasm.create(isolation="wasm", rootfs=root) as other:
            assert (await other.run(["seven.wat"])).exit_code == 7


async def test_sources_are_what_they_were_when_the_sandbox_was_asked_for(wasm: Engine, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    with pytest.raises(InvalidArgumentError):
        await wasm.create(isolation="wasm", rootfs=tmp_path / "missing")
    with pytest.raises(InvalidArgumentError):
        await wasm.create(isolation="wasm", rootfs=root, mounts=[Mount.bind("/dev/null", "/n")])
    with pytest.raises(InvalidArgumentError):
        await wasm.create(isolation="wasm", rootfs=root, mounts=[Mount.bind("/usr", "/etc/motd")])
    assert await wasm.list() == []


async def test_trees_made_by_the_keeper_are_the_same(wasm: Engine, tmp_path: Path) -> None:
    """On kernels before 6.15 all are, and on any kernel those with a layer on a disk."""
    root = make_root(tmp_path / "root")
    host = wasm._core.host  # no public way leads to a kernel that cannot
    maker = TreeMaker(host, detached=False)
    layer = Layer.of(Resources())
    for readonly in (False, True):
        sources = Sources.open(str(root), [], "x")
        tree = await maker.make("aaaaaaaaaa", "x", layer, "", sources, mounts=[], readonly=readonly)
        above = await maker.make(
            "aaaaaaaaaa", "x", layer, "", sources, mounts=[], readonly=readonly, above=tree, name="c"
        )
        for made in (tree, above):
            place = Path(f"/proc/self/fd/{made.root}")
            assert (place / "etc" / "motd").read_text() == "hello from below\n"
            (place / "tmp" / "x").write_text("1")
            if readonly:
                with pytest.raises(OSError, match="Read-only"):
                    (place / "x").write_text("1")
            else:
                (place / "x").write_text("1")
        assert (root / "x").exists() is False
        await maker.free(above)
        await maker.free(tree)
        maker.sweep("aaaaaaaaaa")
        sources.close()
