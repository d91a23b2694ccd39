"""What is looked up for a start, users and interpreters, is seen with the rights of root inside, not our own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from unisandbox import Engine, InvalidArgumentError, Mount, Rootfs
from unisandbox.sandbox import SandboxOptions

pytestmark = [pytest.mark.anyio, pytest.mark.root]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the host's root, in which others may look."""
    # Not tmp_path, through which no other user may go.
    with tempfile.TemporaryDirectory(prefix="unisandbox-names-") as made:
        path = Path(made)
        path.chmod(0o755)
        yield path


def led_astray(place: Path) -> SandboxOptions:
    """A sandbox whose users and groups are links into a directory of the host's that it sees with the host's ids."""
    base, theirs = place / "base", place / "theirs"
    for directory in (base / "etc", base / "usr", theirs):
        directory.mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (base / name).symlink_to(f"usr/{name}")
    for name, line in (("passwd", "bob:x:1000:1001::/home/bob:/bin/sh"), ("group", "users:x:77:bob")):
        (base / "etc" / name).symlink_to(f"/data/{name}")
        (theirs / name).write_text(f"{line}\n")
        (theirs / name).chmod(0o600)
    mounts = (Mount.bind("/usr", "/usr"), Mount.bind(theirs, "/data", idmap=False))
    return {"isolation": "runc", "rootfs": Rootfs.dir(base), "mounts": mounts}


async def test_users_in_a_file_that_root_inside_may_not_read_are_not_found(engine: Engine, place: Path) -> None:
    async with engine.create(**led_astray(place)) as sandbox:
        assert (await sandbox.run(["cat", "/etc/passwd", "/etc/group"])).stdout == b""
        for user in ("bob", "1000:users"):
            with pytest.raises(InvalidArgumentError, match="is not in the container's"):
                await sandbox.run(["true"], user=user)
        for name in ("passwd", "group"):
            (place / "theirs" / name).chmod(0o644)
        assert (await sandbox.run(["id", "-u", "-G"], user="bob", check=False)).exit_code != 0
        assert (await sandbox.sh("id -u; id -G; echo $HOME", user="bob")).text.split() == [
            "1000",
            "1001",
            "77",
            "/home/bob",
        ]


async def test_a_file_of_users_that_only_its_owner_may_read_is_read_for_root_inside(
    engine: Engine, place: Path
) -> None:
    async with engine.create(**led_astray(place)) as sandbox:
        await sandbox.sh(
            "rm /etc/passwd; mkdir -m 700 /etc/own; echo alice:x:5:6::/:/ > /etc/own/p; chmod 0 /etc/own/p;"
            " chown -R 9:9 /etc/own; ln -s own/p /etc/passwd",
            check=True,
        )
        assert (await sandbox.run(["id", "-u"], user="alice")).text.strip() == "5"


async def test_what_is_no_regular_file_holds_no_users_and_nobody_waits_for_it(engine: Engine, place: Path) -> None:
    async with engine.create(**led_astray(place)) as sandbox:
        for made in (
            "mkfifo /etc/passwd",
            "mkdir /etc/passwd",
            "ln -s /dev/zero /etc/passwd",
            "ln -s passwd /etc/passwd",
        ):
            await sandbox.sh(f"rm -rf /etc/passwd; {made}", check=True)
            with pytest.raises(InvalidArgumentError, match="is not in the container's"):
                await sandbox.run(["true"], user="bob", timeout=20)


async def test_the_interpreter_of_a_script_that_root_inside_may_not_read_is_not_told(
    engine: Engine, place: Path
) -> None:
    async with engine.create(**led_astray(place)) as sandbox:
        script = place / "theirs" / "script"
        script.write_text("#!/of/the/host\n")
        for mode, is_told in ((0o711, False), (0o755, True)):
            script.chmod(mode)
            with pytest.raises(InvalidArgumentError) as caught:
                await sandbox.run(["/data/script"])
            assert ("/of/the/host" in f"{caught.value} {caught.value.hint}") == is_told
