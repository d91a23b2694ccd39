"""Files of sandboxes of an ordinary user, and the clerk that works with those of his other ids."""

from __future__ import annotations

import stat

from tests.plain_user import PlainUser


def test_what_belongs_to_other_ids_inside_is_of_his_subordinate_ids_outside(user: PlainUser) -> None:
    user.run(
        """
        work = Path(HOME, "shared")
        work.mkdir()
        mounts = [Mount.bind(str(work), "/mnt", readonly=False)]
        async with Engine.open() as engine, engine.create(resources=FREE, mounts=mounts) as sandbox:
            done = await sandbox.sh("touch /mnt/root /mnt/other && chown 5:6 /mnt/other")
            assert done.exit_code == 0, done.stderr
        """
    )

    root, other = ((user.home / "shared" / name).stat() for name in ("root", "other"))
    assert (root.st_uid, root.st_gid) == (user.uid, user.gid)
    assert (other.st_uid, other.st_gid) == (user.subordinate + 4, user.subordinate + 5)
    assert stat.S_ISREG(other.st_mode)


def test_files_of_other_users_inside_are_worked_with_as_their_root_would(user: PlainUser) -> None:
    told = user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            await sandbox.sh("umask 077; mkdir -p ~/d; echo his > ~/d/f; chmod 0 ~/d/f", user="1000", check=True)
            home = "/home/user"
            tell(read=(await sandbox.files.read(f"{home}/d/f")).decode())
            await sandbox.files.write(f"{home}/d/f", "new")
            info = await sandbox.files.stat(f"{home}/d/f")
            tell(kept=[info.uid, info.gid, info.mode])
            await sandbox.files.write(f"{home}/roots", b"bytes \\xff")
            tell(made=(await sandbox.files.stat(f"{home}/roots")).uid)
            tell(listed=[info.name for info in await sandbox.files.list(home)])
            await sandbox.files.rename(f"{home}/roots", f"{home}/d/moved")
            os.chdir(HOME)
            await sandbox.files.download(f"{home}/d", "got")
            tell(got=sorted(os.listdir("got")), mode=os.stat("got/f").st_mode & 0o777, owner=os.stat("got/f").st_uid)
            await sandbox.files.remove(f"{home}/d", recursive=True)
            tell(left=await sandbox.files.exists(f"{home}/d"))
            try:
                await sandbox.files.read("/nowhere")
            except NotFoundError as error:
                tell(error=str(error))
        """
    )

    assert (told["read"], told["kept"], told["made"]) == ("his\n", [1000, 1000, 0], 0)
    assert (told["listed"], told["got"], told["left"]) == (["d", "roots"], ["f", "moved"], False)
    assert (told["mode"], told["owner"]) == (0, user.uid)
    assert told["error"] == "'/nowhere' does not exist"


def test_files_have_the_rights_of_root_inside_and_no_more(user: PlainUser) -> None:
    told = user.run(
        """
        async def tried(attempt):
            try:
                return ["done", await attempt]
            except FailedPreconditionError as error:
                return ["refused", error.message]

        for name, capabilities in (("usual", Security().capabilities), ("none", frozenset())):
            security = Security(capabilities=capabilities)
            async with Engine.open() as engine, engine.create(resources=FREE, security=security) as sandbox:
                await sandbox.sh("umask 077; mkdir ~/d; echo his > ~/d/f", user="1000", check=True)
                tell(**{
                    name: {
                        "inside": (await sandbox.run(["cat", "/home/user/d/f"])).exit_code,
                        "read": await tried(sandbox.files.exists("/home/user/d/f")),
                        "write": await tried(sandbox.files.write("/home/user/d/f", b"ours")),
                        "own": await tried(sandbox.files.write("/tmp/f", b"ours")),
                    }
                })
        """
    )

    usual, none = told["usual"], told["none"]
    assert (usual["inside"], usual["read"], usual["write"], usual["own"]) == (0, ["done", True], *[["done", None]] * 2)
    assert none["inside"] != 0
    assert (none["read"][0], none["write"][0], none["own"][0]) == ("refused", "refused", "done")


CLERKS = """
        def clerks():
            found = []
            for entry in os.scandir("/proc"):
                if entry.name.isdecimal():
                    try:
                        if b"clerking" in Path(entry.path, "cmdline").read_bytes():
                            found.append(int(entry.name))
                    except OSError:
                        continue
            return found
"""


def test_a_clerk_that_was_killed_is_told_once_and_replaced(user: PlainUser) -> None:
    told = user.run(
        CLERKS
        + """
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            await sandbox.files.write("/tmp/a", "x")
            (clerk,) = clerks()
            os.kill(clerk, signal.SIGKILL)
            while clerks() == [clerk]:
                await anyio.sleep(0.01)
            try:
                await sandbox.files.read("/tmp/a")
            except SandboxError as error:
                tell(first=type(error).__name__, words=str(error))
            tell(second=(await sandbox.files.read("/tmp/a")).decode())
        """
    )

    assert (told["first"], told["second"]) == ("UnavailableError", "x")
    assert "ask again" in told["words"]


def test_what_finds_no_room_with_a_clerk_harms_nobody_else(user: PlainUser) -> None:
    told = user.run(
        """
        import resource
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            await sandbox.files.write("/tmp/a", "x")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            await sandbox.sh("mkdir /tmp/d; cd /tmp/d; seq 9000 | xargs touch")
            for name, asked in (("list", lambda: sandbox.files.list("/tmp/d")),
                                ("write", lambda: sandbox.files.write("/tmp/b", bytes(2 << 20)))):
                try:
                    tell(**{name: len(await asked() or "")})
                except SandboxError as error:
                    tell(**{name: str(error)})
            await sandbox.files.write("/tmp/a", "x")
            tell(after=(await sandbox.files.read("/tmp/a")).decode())
        """
    )

    assert "finds no room: File too large" in told["list"]
    assert "finds no room: File too large" in told["write"]
    assert told["after"] == "x"


def test_what_is_no_path_and_no_mode_is_refused_as_with_root(user: PlainUser) -> None:
    told = user.run(
        """
        async with Engine.open() as engine, engine.create(resources=FREE) as sandbox:
            found = []
            for asked in (lambda: sandbox.files.read(b"/x"), lambda: sandbox.files.read(Path("/x")),
                          lambda: sandbox.files.write("/q", b"", mode=b"x"), lambda: sandbox.files.rename("/a", None),
                          lambda: sandbox.files.upload(b"/etc/passwd", "/q")):
                try:
                    await asked()
                except SandboxError as error:
                    found.append(type(error).__name__)
            tell(found=found)
        """
    )

    assert told["found"] == ["InvalidArgumentError"] * 5
