"""Programs in sandboxes of the SDK: as whom they run, what they are given, and why one could not be started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

import pytest

from unisandbox import (
    DeadlineExceededError,
    Engine,
    InvalidArgumentError,
    Rootfs,
)
from unisandbox.backends.runc import rootfs as root_file_system

pytestmark = [pytest.mark.anyio, pytest.mark.root]


async def test_users_by_name_and_number(engine: Engine) -> None:
    async with engine.create(user="user") as sandbox:
        assert (await sandbox.sh("id -u; id -g; echo $HOME; touch ~/x && echo ok")).text.split() == [
            "1000",
            "1000",
            "/home/user",
            "ok",
        ]
        assert (await sandbox.sh("id -u; id -g", user="root")).text.split() == ["0", "0"]
        assert (await sandbox.sh("id -u; id -g", user="12:34")).text.split() == ["12", "34"]
        assert (await sandbox.sh("id -u; id -g", user="12:tty")).text.split() == ["12", "5"]
        for wrong in ("nobody-like-that", 65536, "0:70000", "-1", ""):
            with pytest.raises(InvalidArgumentError):
                await sandbox.run(["true"], user=wrong)


async def test_every_user_can_open_his_streams_by_their_names_and_nobody_those_of_others(engine: Engine) -> None:
    script = "echo out > /dev/stdout; echo error > /dev/stderr"
    async with engine.create(rootfs="host") as sandbox:
        for user in ("root", "nobody", "1000"):
            done = await sandbox.sh(script, user=user)
            assert (done.stdout, done.stderr) == (b"out\n", b"error\n"), user
            async with sandbox.containers.add(argv=["sh", "-c", script], user=user) as container:
                await container.wait()
                assert await container.logs() + await container.logs("stderr") == b"out\nerror\n", user
        async with sandbox.exec(["sh", "-c", "echo $$; read word"], stdin="pipe", user="1000") as process:
            pid = int(await process.stdout.receive())
            others = await sandbox.sh(f"ls /proc/{pid}/fd; echo false > /proc/{pid}/fd/1", user="nobody")
            assert (others.stdout, others.stderr.count(b"Permission denied")) == (b"", 2)


async def test_a_program_outside_of_usr_is_explained(engine: Engine, tmp_path: Path) -> None:
    program = tmp_path / "tool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    async with engine.create() as sandbox:
        with pytest.raises(InvalidArgumentError, match="shows only programs below /usr") as caught:
            await sandbox.run([str(program)])
        assert caught.value.exit_code == 127


LOCAL: Final = "without /usr/local: use Rootfs.host(local=True)."
ELSEWHERE: Final = "Install it there, or mount its directory with Mount.bind()."


@pytest.mark.parametrize(
    ("program", "leads_to", "hidden", "also_with_local"),
    [
        ("/usr/local/bin/tool", "/usr/local/bin/tool", LOCAL, ""),
        ("/usr/local/bin/tool", "/usr/bin/tool", LOCAL, ""),
        ("/usr/bin/tool", "/usr/local/bin/tool", LOCAL, ""),
        ("/usr/local/bin/tool", "/opt/tool", ELSEWHERE, ELSEWHERE),
        ("/usr/bin/tool", "/opt/tool", ELSEWHERE, ELSEWHERE),
        ("/opt/tool", "/usr/bin/tool", ELSEWHERE, ELSEWHERE),
        ("/bin/tool", "/usr/bin/tool", "", ""),
        ("./tool", "/opt/tool", "", ""),
    ],
)
def test_the_remedy_for_a_program_that_is_not_shown_is_one(
    program: str, leads_to: str, hidden: str, also_with_local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = {program: leads_to, "/bin": "/usr/bin"}
    monkeypatch.setattr(os.path, "realpath", lambda path: links.get(path, path))
    monkeypatch.setattr(shutil, "which", lambda path: path)
    for local, remedy in ((False, hidden), (True, also_with_local)):
        said = root_file_system.not_shown(program, Rootfs.host(local=local))
        assert said.endswith(remedy)
        assert bool(said) == bool(remedy)


async def test_an_interpreter_that_is_missing_is_named(engine: Engine, tmp_path: Path) -> None:
    interpreter = tmp_path / "interpreter"
    interpreter.write_text("#!/bin/sh\n")
    interpreter.chmod(0o755)
    async with engine.create() as sandbox:
        for name, line, words in (
            ("nope", "#! /no/such/interpreter -x", "a script for '/no/such/interpreter', which is missing"),
            ("hidden", f"#!{interpreter}", f"{interpreter} exists on this machine, but .* only programs below /usr"),
        ):
            await sandbox.files.write(f"/tmp/{name}", f"{line}\n", mode=0o755)
            for argv, options in (
                ([f"/tmp/{name}"], {}),
                ([f"./{name}"], {"cwd": "/tmp"}),
                ([name], {"env": {"PATH": "/usr/bin:/tmp"}}),
            ):
                with pytest.raises(InvalidArgumentError, match=words) as caught:
                    await sandbox.run(argv, **options)
                assert caught.value.exit_code == 127
                if name == "hidden":
                    assert str(interpreter) in caught.value.hint


async def test_large_arguments_and_environments(engine: Engine) -> None:
    async with engine.create() as sandbox:
        words = ["x" * 100_000] * 10
        done = await sandbox.run(
            ["sh", "-c", 'echo ${#1} $#; printf %s "$BIG" | wc -c', "sh", *words], env={"BIG": "y" * 120_000}
        )
        assert done.text.split() == ["100000", "10", "120000"]
        with pytest.raises(InvalidArgumentError, match="too large"):
            await sandbox.run(["true", "x" * 200_000])
        assert (await sandbox.run(["true"])).exit_code == 0


async def test_a_timeout_says_so_and_keeps_what_there_was(engine: Engine) -> None:
    async with engine.create() as sandbox:
        with pytest.raises(DeadlineExceededError, match=r"did not end within 2 s") as caught:
            await sandbox.sh("echo before; sleep 60; echo after", timeout=2)
        completed = caught.value.completed
        assert completed is not None
        assert (completed.stdout, completed.exit.signal, completed.exit.reason) == (b"before\n", 9, "signaled")
        assert 1.9 < completed.duration < 30
        for wrong in (0, -1.0, float("nan")):
            with pytest.raises(InvalidArgumentError):
                await sandbox.run(["true"], timeout=wrong)


async def test_a_timeout_that_catches_the_start_leaves_nothing(engine: Engine) -> None:
    async with engine.create() as sandbox:
        with pytest.raises(DeadlineExceededError):
            await sandbox.run(["sleep", "60"], timeout=0.000001)
        assert (await sandbox.run(["true"])).exit_code == 0
