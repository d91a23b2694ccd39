"""`unisandbox doctor`: the page that saves an issue report has what is asked for there, and no secret."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

import anyio
import pytest
from tests.plain_user import PlainUser, plain_user

import unisandbox
from unisandbox.cli import facts
from unisandbox.oci.features import find_runtimes, losses

DOCTOR = [sys.executable, "-m", "unisandbox.cli", "doctor"]


@pytest.fixture(params=["with subordinate ids", "without"])
def any_user(request: pytest.FixtureRequest) -> Iterator[PlainUser]:
    """A user who is not root, with a range of ids or his own only; nothing of his engines is left after the test."""
    with plain_user(single=request.param == "without") as user:
        yield user
        assert user.left() == []


def test_doctor_says_on_what_it_runs() -> None:
    done = subprocess.run([*DOCTOR, "--json"], capture_output=True, check=False, timeout=60)
    told = json.loads(done.stdout)
    host = told["host"]

    assert host["unisandbox"] == unisandbox.__version__
    assert host["python"].startswith(platform.python_version())
    assert host["kernel"] == f"{os.uname().release} {os.uname().machine}"
    assert host["system"] == platform.freedesktop_os_release()["PRETTY_NAME"]
    assert f"anyio {metadata.version('anyio')}" in host["packages"]
    assert f"attrs {metadata.version('attrs')}" in host["packages"]
    for name in ("processors", "memory", "cgroups", "cgroups to write", "user namespaces", "restrictions"):
        assert host[name], name
    for name in ("first process", "open files"):
        assert host[name], name
    for backend in told["backends"]:
        assert backend["reason"], backend
        assert backend["available"] or backend["hint"], backend
    width = max(map(len, host))
    shown = subprocess.run(DOCTOR, capture_output=True, check=False, timeout=60, text=True).stdout
    for name, value in host.items():
        assert f"{name:{width}}  {value}" in shown.splitlines(), name


def test_doctor_names_every_runtime_with_its_version() -> None:
    done = subprocess.run([*DOCTOR, "--json"], capture_output=True, check=False, timeout=60)
    host = json.loads(done.stdout)["host"]
    told = host["runtimes"].split(", ")

    assert told != ["none"]
    lost = {f"not with {program.name}": "; ".join(losses(program)) for program in anyio.run(find_runtimes)}
    assert {name: what for name, what in host.items() if name.startswith("not with ")} == {
        name: what for name, what in lost.items() if what
    }
    for runtime in told:
        name, version, place = runtime.split(" ")
        said = subprocess.run([place.strip("()"), "--version"], capture_output=True, check=True, text=True).stdout
        assert said.startswith(name)
        assert version in said


def test_doctor_says_which_ids_and_cgroups_an_ordinary_user_has(any_user: PlainUser) -> None:
    told = any_user.run(
        """
        argv = [sys.executable, "-m", "unisandbox.cli", "doctor", "--json"]
        tell(**json.loads(subprocess.run(argv, capture_output=True).stdout)["host"])
        """,
    )

    if any_user.subordinate < 0:
        assert told["subordinate ids"].startswith("none that can be used: this user has 0 subordinate uids")
    else:
        assert told["subordinate ids"] == "65536 uids, 65536 gids"
    if os.geteuid() == 0:
        assert told["user"] == f"id {any_user.uid}, not root"
        assert told["cgroups to write"].startswith("none: ")
        assert told["restrictions"] == "none"


@pytest.mark.root
def test_doctor_says_what_confines_this_process() -> None:
    with plain_user() as user:
        told = user.run(
            """
            argv = [sys.executable, "-m", "unisandbox.cli", "doctor", "--json"]
            tell(**json.loads(subprocess.run(argv, capture_output=True).stdout)["host"])
            """,
            more=("--no-new-privs",),
        )
    dropped = ["setpriv", "--bounding-set=-sys_admin", "--", *DOCTOR, "--json"]
    roots = json.loads(subprocess.run(dropped, capture_output=True, check=False, timeout=60).stdout)["host"]

    assert told["restrictions"] == "no_new_privs"
    assert "without CAP_SYS_ADMIN" in roots["restrictions"].split(", ")


SECRETS = {
    name: f"hushed-{number}"
    for number, name in enumerate(("GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "DATABASE_URL", "HTTPS_PROXY", "EDITOR"))
}

# What a sandbox was given is in the record that its engine leaves.
LEAVING = """
import anyio, os, signal, unisandbox
async def main():
    engine = await unisandbox.Engine.open(os.environ["HOME"] + "/state", policy="keep")
    sandbox = await engine.create(env={"TOKEN": "hushed-env"}, resources=unisandbox.Resources.unlimited())
    await sandbox.exec(["sleep", "1000", "hushed-argv"], env={"PASSWORD": "hushed-exec"})
    os.kill(engine._core.host.keeper.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
anyio.run(main)
"""


def test_no_secret_is_in_what_doctor_says_of_a_host_with_leftovers(any_user: PlainUser) -> None:
    """Neither values of the environment, nor what is in the home directory or where that is."""
    told = any_user.run(
        f"""
        secrets = {SECRETS!r}
        environment = os.environ | secrets
        Path(HOME, ".netrc").write_text("password hushed-netrc")
        Path(HOME, "hushed-name").mkdir()
        subprocess.run([sys.executable, "-c", {LEAVING!r}], env=environment)

        def doctor(*words):
            argv = [sys.executable, "-m", "unisandbox.cli", "doctor", *words]
            return subprocess.run(argv, env=environment, capture_output=True, text=True)

        tell(home=HOME, said=[[done.stdout, done.stderr] for done in map(doctor, ("--debug", "--json", "--deep"))])
        fixed = doctor("--fix", "--json")
        tell(fixed=fixed.stdout, failed=fixed.stderr)
        """
    )

    texts = [text for pair in told["said"] for text in pair] + [told["fixed"], told["failed"]]
    assert "~/state" in told["said"][0][0], "it tells what is left over, and where"
    for text in texts:
        assert "hushed-" not in text
        assert told["home"] not in text


def test_only_the_home_directory_itself_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_homes", lambda: ("/home/me",))

    said = "/home/me, /home/me/x, '/home/me': /home/me2 /home/me.old /srv/home/me /home/meier"
    assert facts.without_home(said) == "~, ~/x, '~': /home/me2 /home/me.old /srv/home/me /home/meier"
