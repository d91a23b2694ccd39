"""What an ordinary user cannot have, or not on this host, is refused with what he can do about it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import pytest
from tests.plain_user import PlainUser, by_root, has_subtree

from unisandbox.backends.runc import overlays

WITHOUT_CGROUPS = {
    "memory": ("{}", "resources.memory cannot be limited here"),
    "pids": ("dict(resources=Resources(memory=None))", "resources.pids cannot be limited here"),
    "cpu": ("dict(resources=Resources(memory=None, pids=None, cpu=0.5))", "resources.cpu cannot be limited here"),
}
NEVER = {
    "disk": ("dict(resources=Resources(memory=None, pids=None, disk='2G'))", "a disk limit of 2147483648 bytes"),
    "userns": ("dict(resources=FREE, userns='host')", "userns='host'"),
    "network": ("dict(resources=FREE, network='/proc/1/ns/net')", "network 'namespace'"),
}


def _refusals(user: PlainUser, asked: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """What is said of each of these; nothing is done."""
    return user.run(
        f"""
        def files():
            # An engine makes its file of events and its directory of records when it first has to.
            own = ("events", "sandboxes")
            return sorted(str(path) for path in Path(HOME).glob("unisandbox*/**/*") if path.name not in own)

        async with Engine.open() as engine:
            for name, (options, _) in {asked!r}.items():
                before = files()
                try:
                    async with engine.create(isolation="runc", **eval(options)):
                        tell(**{{name: ["made", ""]}})
                except SandboxError as error:
                    tell(**{{name: [f"{{type(error).__name__}}: {{error.message}}", error.hint]}})
                assert files() == before, files()
        """
    )


def test_what_only_root_can_have_is_refused_with_a_remedy_before_anything_is_done(user: PlainUser) -> None:
    told = _refusals(user, NEVER)

    for name, (_, words) in NEVER.items():
        assert words in told[name][0], (name, told[name])
        assert told[name][0].startswith("UnsupportedError"), (name, told[name])
        assert told[name][1], name


@by_root
def test_limits_without_a_cgroup_are_refused_with_a_remedy_before_anything_is_done(user: PlainUser) -> None:
    told = _refusals(user, WITHOUT_CGROUPS)

    for name, (_, words) in WITHOUT_CGROUPS.items():
        assert words in told[name][0], (name, told[name])
        assert told[name][0].startswith("UnavailableError"), (name, told[name])
    assert "Resources.unlimited()" in told["memory"][1]


LOST = ["userns_host", "own_ids", "host_devices", "cgroup_parent", "large_disks"]
LOST += ["writable_dirs"] if not overlays.by_kernel() and overlays.obstacle()[0] else []
OF_CGROUPS = ["pause", "exact_exits", "process_trees"]
CAPABILITIES = f"""
        from unisandbox.backends.runc import backend
        claimed = backend.capabilities
        tell(limits=sorted(claimed.limits), users=claimed.users, networks=sorted(claimed.networks), notes=claimed.notes)
        tell(lost=[name for name in {LOST + OF_CGROUPS!r} if not getattr(claimed, name)])
        probe = await backend.probe(deep=True)
        tell(available=probe.available, reason=probe.reason, facts=dict(probe.facts), warnings=probe.warnings)
"""


@by_root
def test_the_capabilities_tell_what_is_lost(user: PlainUser) -> None:
    told = user.run(CAPABILITIES)

    # Where this machine has what the network "user" takes, he has it too.
    assert (told["limits"], [name for name in told["networks"] if name != "user"]) == ([], ["host", "none"])
    assert told["lost"] == LOST + OF_CGROUPS
    assert told["users"]
    assert any("root inside is this user outside" in note for note in told["notes"])
    assert not any("subordinate ids:" in note for note in told["notes"])
    assert not any("one user id" in warning for warning in told["warnings"])
    assert told["available"], told["reason"]
    assert "65537" in told["facts"]["user ids"]
    assert told["facts"]["without root"] == "; ".join(told["notes"])


@pytest.mark.skipif(not has_subtree(), reason="no subtree of cgroup v2 has been delegated to this user")
def test_with_a_delegated_subtree_there_are_limits_and_nothing_of_cgroups_is_lost(user: PlainUser) -> None:
    told = user.run(CAPABILITIES)

    assert (told["limits"], told["lost"]) == (["cpu", "memory", "pids"], LOST)
    assert told["available"], told["reason"]
    assert not any("cgroup" in note for note in told["notes"])


# In the mount namespace of the program only, and on a directory that is there.
TEMPORARY = "T=/mnt; mount -t tmpfs none $T; chmod 755 $T"
SETTING = (
    "cp -r /proc/sys/kernel $T/kernel 2>/dev/null || true; chmod -R u+w $T/kernel; echo {} > $T/kernel/{};"
    " mount --bind $T/kernel /proc/sys/kernel"
)
OBSTACLES = {
    "kernel.unprivileged_userns_clone": SETTING.format(0, "unprivileged_userns_clone"),
    "kernel.apparmor_restrict_unprivileged_userns": SETTING.format(1, "apparmor_restrict_unprivileged_userns"),
    "user.max_user_namespaces": "echo 0 > $T/zero; mount --bind $T/zero /proc/sys/user/max_user_namespaces",
}


@by_root
@pytest.mark.parametrize("what", OBSTACLES)
def test_the_setting_that_forbids_it_is_named_with_its_remedy(user: PlainUser, what: str) -> None:
    told = user.run(
        """
        from unisandbox.backends.runc import backend
        probe = await backend.probe()
        tell(available=probe.available, reason=probe.reason, hint=probe.hint)
        try:
            async with Sandbox.create(isolation="runc", resources=FREE):
                tell(error="")
        except SandboxError as error:
            tell(error=str(error))
        """,
        setup=f"{TEMPORARY}; {OBSTACLES[what]}",
    )

    assert not told["available"]
    assert what in told["reason"]
    assert told["hint"]
    assert what in told["error"]


@by_root
def test_doctor_names_the_setting_and_the_remedy(user: PlainUser) -> None:
    told = user.run(
        """
        argv = [sys.executable, "-m", "unisandbox.cli", "doctor"]
        tell(doctor=subprocess.run(argv, capture_output=True, text=True).stdout)
        """,
        setup=f"{TEMPORARY}; {OBSTACLES['kernel.unprivileged_userns_clone']}",
    )

    cause, remedy = told["doctor"].split("runc: cannot run here\n")[1].splitlines()[:2]
    assert cause.startswith("  cause: ")
    assert "kernel.unprivileged_userns_clone is 0" in cause
    assert remedy == "  remedy: sysctl -w kernel.unprivileged_userns_clone=1"
    assert "kernel.unprivileged_userns_clone=0" in told["doctor"].split("user namespaces")[1].splitlines()[0]


@by_root
def test_what_newuidmap_says_is_told(user: PlainUser) -> None:
    words = "printf '#!/bin/sh\\necho it has its reasons >&2; exit 1' > $T/no; chmod 4755 $T/no"
    told = user.run(
        """
        try:
            async with Sandbox.create(isolation="runc", resources=FREE):
                tell(error="")
        except UnavailableError as error:
            tell(error=str(error))
        """,
        setup=f"{TEMPORARY}; {words}; mount --bind $T/no $(command -v newuidmap)",
    )

    assert "it has its reasons" in told["error"]


@by_root
def test_a_newuidmap_that_lacks_the_power_in_a_container_is_told_with_the_remedy(user: PlainUser) -> None:
    """In a container it is bound by what that has. With capabilities of its file it does without."""
    work = """
        try:
            async with Sandbox.create(isolation="runc", resources=FREE) as sandbox:
                tell(error="", text=(await sandbox.sh("id -u")).text)
        except UnavailableError as error:
            tell(error=str(error))
        """
    bounded = ["--bounding-set=-sys_admin"]
    told = user.run(work, more=bounded)
    if told["error"]:  # some are built to do without
        assert "setcap cap_setuid=ep newuidmap" in told["error"]

    setcap = shutil.which("setcap")
    if setcap is None:
        pytest.skip("setcap is not installed (apt install libcap2-bin)")
    copies = "".join(
        f"; cp $(command -v new{kind}idmap) $T/{kind}; chmod 755 $T/{kind}; {setcap} cap_set{kind}id=ep $T/{kind}"
        f"; mount --bind $T/{kind} $(command -v new{kind}idmap)"
        for kind in ("u", "g")
    )
    assert user.run(work, setup=TEMPORARY + copies, more=bounded) == {"error": "", "text": "0\n"}
