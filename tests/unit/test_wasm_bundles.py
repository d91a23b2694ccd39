"""What of an engine's bundle becomes of a container of WebAssembly guests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest

from unisandbox.api import CreateTask, ExecTask, InvalidArgumentError, ProcessSpec, RootMount, UnsupportedError
from unisandbox.backends.wasm.process.bundles import Bundle, bundle_of, limits_text, process_of

PROCESS: Final = {
    "user": {"uid": 1000, "gid": 100, "additionalGids": [100]},
    "args": ["/app.wasm", "serve"],
    "env": ["A=1", "B=x=y", "EMPTY="],
    "cwd": "/data",
    "capabilities": {"bounding": ["CAP_CHOWN"]},
    "noNewPrivileges": True,
    "oomScoreAdj": 900,
    "apparmorProfile": "some",
    "selinuxLabel": "label",
}
ROW: Final = {"containerID": 0, "hostID": 70_000, "size": 65_536}
MAPPINGS: Final = {"uidMappings": [ROW], "gidMappings": [ROW]}
LAYERS: Final = RootMount("overlay", "overlay", ("lowerdir=/l", "upperdir=/u", "workdir=/w"))


def bundle(
    *, ids: tuple[int, int] | None = None, rootfs: tuple[RootMount, ...] = (LAYERS,), **parts: Mapping[str, Any] | Any
) -> Bundle:
    config: dict[str, Any] = {
        "ociVersion": "1.3.0",
        "process": {**PROCESS, **parts.pop("process", {})},
        "root": {"path": "rootfs"},
        "linux": {
            "namespaces": [{"type": "mount"}],
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
            "maskedPaths": ["/proc/kcore"],
            "cgroupsPath": "/x",
            "resources": {},
            **parts.pop("linux", {}),
        },
        **parts,
    }
    return bundle_of(CreateTask("c1", bundle="/b", config=json.dumps(config), rootfs=rootfs), ids)


def test_the_command_is_the_guests_with_nothing_added() -> None:
    made = bundle()
    assert made.container.name == "c1"
    assert made.container.process == ProcessSpec(
        ["/app.wasm", "serve"], env={"A": "1", "B": "x=y", "EMPTY": ""}, cwd="/data"
    )
    assert made.container.user == "1000:100"
    assert made.container.env == {}
    assert (made.rootfs, made.mounts, made.limits) == ((LAYERS,), (), "")


def test_without_layers_its_root_is_the_directory_that_the_bundle_names() -> None:
    assert bundle(rootfs=()).rootfs == (RootMount("bind", "/b/rootfs", ("rbind",)),)
    readonly = bundle(root={"path": "/files", "readonly": True}, rootfs=())
    assert readonly.rootfs == (RootMount("bind", "/files", ("rbind", "ro")),)


def test_volumes_are_mounted_in_the_guests_files_and_the_kernels_own_are_not() -> None:
    kernel = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=64k"]},
    ]
    volumes = [
        {"destination": "/etc/hosts", "type": "bind", "source": "/k/hosts", "options": ["rbind", "rprivate", "ro"]},
        {"destination": "/dev/log", "source": "log", "options": ["bind", "rw", "noexec"]},
    ]
    hosts, log = bundle(mounts=[*kernel, *volumes]).mounts
    assert hosts == RootMount("bind", "/k/hosts", ("rbind", "ro"), "/etc/hosts")
    assert log == RootMount("bind", "/b/log", ("bind",), "/dev/log")


def test_a_root_of_several_mounts_is_refused() -> None:
    for rootfs in ((LAYERS, LAYERS), (RootMount("bind", "/b", ("rbind",), "/sub"),)):
        with pytest.raises(UnsupportedError, match="several mounts"):
            bundle(rootfs=rootfs)


def test_limits_go_on_as_they_are_and_what_is_of_devices_does_not() -> None:
    rules = [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 3}]
    resources = {"memory": {"limit": 5 << 20}, "cpu": {"shares": 2}, "devices": rules}
    assert json.loads(bundle(linux={"resources": resources}).limits) == {
        "memory": {"limit": 5 << 20},
        "cpu": {"shares": 2},
    }
    assert limits_text({"devices": rules, "memory": {}}) == ""


def test_ids_are_those_of_the_sandbox_or_it_is_refused() -> None:
    ids = (70_000, 65_536)
    volume = {"destination": "/v", "type": "bind", "source": "/v", "options": ["idmap"], **MAPPINGS}
    assert bundle(ids=ids, linux=MAPPINGS, mounts=[volume]).mounts[0].options == ("bind", "idmap")
    of_all = {**volume, "options": ["rbind"]}
    assert bundle(ids=ids, linux=MAPPINGS, mounts=[of_all]).mounts[0].options == ("rbind", "ridmap"), "runtime-spec"
    with pytest.raises(InvalidArgumentError, match="user ids"):
        bundle(ids=ids)
    with pytest.raises(InvalidArgumentError, match="user ids"):
        bundle(linux=MAPPINGS)
    with pytest.raises(InvalidArgumentError, match="user ids"):
        bundle(ids=(80_000, 65_536), linux=MAPPINGS)
    with pytest.raises(UnsupportedError, match="other ids"):
        bundle(mounts=[volume])


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"process": {"terminal": True}}, "tty"),
        ({"process": {"rlimits": [{"type": "RLIMIT_CORE"}]}}, "process.rlimits"),
        ({"process": {"scheduler": {"policy": "SCHED_FIFO"}}}, "process.scheduler"),
        ({"process": {"user": {"uid": 0, "umask": 7}}}, "process.user.umask"),
        ({"process": {"user": {"uid": 1, "gid": 1, "additionalGids": [1, 2]}}}, "supplementary groups"),
        ({"hooks": {"prestart": [{"path": "/x"}]}}, "hooks"),
        ({"domainname": "x"}, "domainname"),
        ({"linux": {"sysctl": {"a.b": "1"}}}, "linux.sysctl"),
        ({"linux": {"devices": [{"path": "/dev/x"}]}}, "linux.devices"),
        ({"linux": {"rootfsPropagation": "shared"}}, "linux.rootfsPropagation"),
        ({"linux": {"resources": {"devices": [{"allow": True}]}}}, "devices"),
        ({"linux": {"resources": {"pids": {"limit": 9}}}}, "resources.pids"),
        ({"linux": {"resources": {"hugepageLimits": [{"limit": 1}]}}}, "resources.hugepageLimits"),
        ({"mounts": [{"destination": "/t", "type": "tmpfs"}]}, "mount '/t' of type 'tmpfs'"),
        ({"mounts": [{"destination": "/t", "type": "proc", "source": "proc"}]}, "mount '/t' of type 'proc'"),
        ({"mounts": [{"destination": "/dev/t", "type": "ext4", "source": "/x"}]}, "mount '/dev/t' of type 'ext4'"),
        ({"mounts": [{"destination": "/t", "type": "bind", "source": "/x", "label": "y"}]}, "mount '/t' with 'label'"),
        ({"mounts": [{"destination": "/t", "type": "bind", "source": "/x", "options": ["dev"]}]}, "'dev'"),
        ({"mounts": [{"destination": "/t", "type": "bind", "source": "/x", "options": ["noatime"]}]}, "'noatime'"),
        ({"mounts": [{"destination": "/b", "type": "bind", "source": "/b", "options": ["rslave"]}]}, "'rslave'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_guest_cannot_have_is_refused_by_its_name(parts: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        bundle(**parts)
    assert named in refused.value.message


@pytest.mark.parametrize(
    "parts",
    [
        {"process": {"env": ["no-equals-sign"]}},
        {"process": {"env": {"A=1": 1}}},
        {"process": {"env": [1]}},
        {"process": {"user": {"uid": "root"}}},
        {"mounts": [{"destination": "/x", "type": "bind"}]},
        {"mounts": [{"destination": "/x", "type": "bind", "source": 5}]},
        {"mounts": [{"destination": "/x", "type": ["bind"], "source": "/x"}]},
        {"process": {"user": [1]}},
        {"process": {"args": [""]}},
        {"linux": {"resources": ["x"]}},
        {"mounts": [{"destination": "relative", "type": "bind", "source": "/x"}]},
        {"mounts": [{"destination": "/", "type": "bind", "source": "/x"}]},
        {"mounts": [{"destination": "/x/../../..", "type": "bind", "source": "/x"}]},
        {"mounts": [{"destination": "/x", "type": "bind", "source": "/x", "options": "ro"}]},
        {"root": {"path": "/"}},
    ],
    ids=repr,
)
def test_a_config_that_is_none_is_said_to_be_none(parts: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        bundle(rootfs=() if "root" in parts else (LAYERS,), **parts)


JUNK: Final = [0, 1, -1, 1 << 70, 1.5, True, "x", "", [], [1], [[1]], ["x"], [{}], {}, {"x": 1}, {"x": [1]}, None]


def variants(value: Any) -> Iterator[Any]:
    """The value with junk in each place of it, one at a time."""
    yield from JUNK
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        for changed in variants(inner):
            copy = value.copy()
            copy[key] = changed
            yield copy


def test_whatever_a_config_holds_it_is_taken_or_refused() -> None:
    rules = [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "r"}]
    resources: dict[str, Any] = {
        "memory": {"limit": 5, "swap": 9},
        "cpu": {"shares": 2, "quota": 5, "period": 9},
        "devices": rules,
    }
    config: dict[str, Any] = {
        "process": {"args": ["a"], "env": ["A=1"], "cwd": "/", "user": {"uid": 1, "gid": 1, "additionalGids": [1]}},
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [{"destination": "/v", "type": "bind", "source": "/v", "options": ["rbind", "ridmap"], **MAPPINGS}],
        "linux": {"resources": {**resources, "unified": {"memory.oom.group": "1"}}, **MAPPINGS},
    }
    refused, taken = 0, 0
    for changed in variants(config):
        try:
            bundle_of(CreateTask("c1", bundle="/b", config=json.dumps(changed)), (70_000, 65_536))
            taken += 1
        except (InvalidArgumentError, UnsupportedError):
            refused += 1
    assert refused > 300
    assert taken > 50


@pytest.mark.parametrize(
    ("options", "readonly"), [(["ro", "rw"], False), (["rw", "ro"], True), (["rro"], True), (["rro", "rw"], False)]
)
def test_the_last_word_on_writing_counts(options: list[str], readonly: bool) -> None:
    (mount,) = bundle(mounts=[{"destination": "/v", "type": "bind", "source": "/v", "options": options}]).mounts
    assert ("ro" in mount.options) == readonly


def test_one_more_process_is_of_the_same_user() -> None:
    container = bundle().container
    request = ExecTask("c1", "e1", oci_process=json.dumps({**PROCESS, "args": ["other"]}))
    assert process_of(request, container).argv == ("other",)
    for changes in ({"user": {"uid": 0, "gid": 0}}, {"terminal": True}):
        request = ExecTask("c1", "e1", oci_process=json.dumps({**PROCESS, **changes}))
        with pytest.raises(UnsupportedError):
            process_of(request, container)
    for text in ("{", "[]", '{"args": "x"}'):
        with pytest.raises(InvalidArgumentError):
            process_of(ExecTask("c1", "e1", oci_process=text), container)
