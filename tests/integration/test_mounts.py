"""Trees are built from mounts as told, hostile directories lead nowhere, and a failure leaves no mount."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import pytest
from tests.isolated import isolated, open_fds
from tests.mount_trees import ROOT, USERNS, bind_op, build_tree, mkdir_op, tmpfs_op

from unisandbox.host import jobs, mounts, syscalls, tree
from unisandbox.host.power import standing

pytestmark = pytest.mark.root

READONLY = ["readonly", "nosuid", "nodev"]


def _points(below: Path) -> list[str]:
    return [point for point in mounts.mount_points() if point.startswith(f"{below}/")]


def test_a_tree_is_built_as_told_and_taken_apart(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        root = where / "root"
        before = open_fds()
        build_tree(
            root,
            tmpfs_op(uid=ROOT, gid=ROOT, mode=0o750),
            bind_op("/usr", "/usr", attributes=READONLY),
            {"op": "symlink", "target": "usr/bin", "path": "/bin", "uid": ROOT, "gid": ROOT},
            {"op": "mkdir", "path": "/a/b/c", "parents": True, "mode": 0o700, "uid": ROOT},
            {"op": "file", "path": "/a/hosts", "content": "127.0.0.1 localhost\n", "mode": 0o600, "gid": ROOT},
            {"op": "file", "path": "/a/raw", "base64": "AP8="},
            bind_op("/etc/passwd", "/etc/passwd", attributes=READONLY),
            {"op": "mkdir", "path": "/tmp", "mode": 0o1777},
        )
        assert open_fds() == before
        top = root.stat()
        assert (top.st_uid, top.st_gid, stat.S_IMODE(top.st_mode)) == (ROOT, ROOT, 0o750)
        assert (root / "bin").readlink() == Path("usr/bin")
        assert (root / "bin").lstat().st_uid == ROOT
        assert (root / "a/b/c").stat().st_mode & 0o7777 == 0o700
        assert (root / "a/hosts").read_text() == "127.0.0.1 localhost\n"
        assert (root / "a/raw").read_bytes() == b"\0\xff"
        assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
        assert (root / "etc/passwd").read_bytes() == Path("/etc/passwd").read_bytes()
        with pytest.raises(OSError, match="Read-only"):
            (root / "usr/x").touch()
        with pytest.raises(OSError, match="Read-only"):
            (root / "etc/passwd").write_text("")
        result, _ = jobs.run([{"do": "unmount", "path": str(root), "rmdir": True}], [])
        assert not root.exists()
        jobs.run([{"do": "unmount", "path": str(root), "rmdir": True}], [])  # may be repeated
        return result["steps"], _points(where)

    assert isolated(work, tmp_path) == [[{"unmounted": 1}], []]


@pytest.mark.skipif(standing.kernel() < (6, 15), reason="this kernel mounts nothing in what is mounted nowhere")
def test_a_detached_file_system_has_the_directories_that_were_asked_for_and_no_path_leads_out(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        before = open_fds()
        step: dict[str, object] = {"do": "detached", "name": "top", "size": 1 << 20, "inodes": 100}
        _, named = jobs.run([{**step, "directories": {"a": 0o755, "a/b": 0o1777}}], [])
        modes = [stat.S_IMODE(os.stat(path, dir_fd=named["top"]).st_mode) for path in ("a", "a/b")]
        os.close(named["top"])
        for path in (f"{where}/x", "a/../../x", "../x", "./x", "", "x/"):
            with pytest.raises(jobs.StepError, match="must be relative"):
                jobs.run([{**step, "directories": {"a": 0o755, path: 0o755}}], [])
        with pytest.raises(jobs.StepError, match="permission bits"):
            jobs.run([{**step, "directories": {"a": 0o10000}}], [])
        assert open_fds() == before
        return modes, os.listdir(where)

    assert isolated(work, tmp_path) == [[0o755, 0o1777], []]


def test_readonly_holds_for_submounts_where_a_plain_bind_does_not(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        source = where / "source"
        (source / "sub").mkdir(parents=True)
        syscalls.mount("tmpfs", str(source / "sub"), "tmpfs")
        build_tree(where / "root", bind_op(str(source), "/safe", attributes=["readonly"]))
        plain = where / "plain"
        plain.mkdir()
        syscalls.mount(str(source), str(plain), None, syscalls.MS_BIND | syscalls.MS_REC)
        flags = syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY
        syscalls.mount("none", str(plain), None, flags)
        (plain / "sub/attack").touch()  # the trap that mount(8) warns of
        with pytest.raises(OSError, match="Read-only"):
            (where / "root/safe/sub/attack2").touch()
        return True

    assert isolated(work, tmp_path)


def test_two_may_unmount_the_same_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = mounts.mount_points

    def and_another_is_quicker(below: str = "/") -> list[str]:
        found = listed(below)
        for point in found:
            syscalls.umount(point)
            os.rmdir(point)
        return found

    def work(where: Path) -> object:
        (where / "root/in").mkdir(parents=True)
        syscalls.mount("tmpfs", str(where / "root/in"), "tmpfs")
        monkeypatch.setattr(mounts, "mount_points", and_another_is_quicker)
        return mounts.unmount_below(str(where / "root"))

    assert isolated(work, tmp_path) == 0


def test_a_later_mount_of_the_host_does_not_appear_inside(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        source = where / "source"
        (source / "late").mkdir(parents=True)
        syscalls.mount(str(source), str(source), None, syscalls.MS_BIND)
        syscalls.mount("none", str(source), None, 1 << 20)  # MS_SHARED, as systemd makes everything
        build_tree(where / "root", bind_op(str(source), "/in", attributes=["readonly"]))
        syscalls.mount("tmpfs", str(source / "late"), "tmpfs")
        (source / "late/here").touch()
        return (where / "root/in/late/here").exists()

    assert isolated(work, tmp_path) is False


def test_ids_are_mapped_for_binds_and_overlays(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        lower = where / "lower"
        lower.mkdir()
        (lower / "file").write_text("lower")
        os.chown(lower / "file", 5, 6)
        root = where / "root"
        root.mkdir()
        ops = [
            tmpfs_op(),
            bind_op(str(lower), "/bind", idmap=True),
            tmpfs_op("/layer") | {"path": "/layer"},
        ]
        ops.insert(2, {"op": "mkdir", "path": "/layer"})
        ops += [
            {"op": "mkdir", "path": "/layer/upper", "uid": ROOT, "gid": ROOT},
            {"op": "mkdir", "path": "/layer/work", "uid": ROOT, "gid": ROOT},
            {"op": "mkdir", "path": "/merged"},
            {
                "op": "overlay",
                "path": "/merged",
                "lower": [str(lower)],
                "upper": {"below": str(root), "path": "/layer/upper"},
                "work": {"below": str(root), "path": "/layer/work"},
                "idmap": True,
            },
        ]
        assert build_tree(root, *ops) == {"unmapped": []}
        for place in ("bind", "merged"):
            status = (root / place / "file").stat()
            assert (status.st_uid, status.st_gid) == (ROOT + 5, ROOT + 6)
        (root / "merged/file").write_text("changed")
        assert (lower / "file").read_text() == "lower"
        assert (root / "layer/upper/file").stat().st_uid == ROOT + 5
        assert len(_points(root)) == 3  # nothing of what was staged is left
        return True

    assert isolated(work, tmp_path)


def test_overlays_of_old_kernels_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_layers: object, _attributes: int) -> int:
        raise OSError(22, "this kernel has no lowerdir+")

    monkeypatch.setattr(tree, "_overlay_mount", refuse)
    monkeypatch.setattr(standing, "kernel", lambda: (6, 1))

    def work(where: Path) -> object:
        layers = [where / f"layer{n}" for n in range(30)]
        for layer in layers:
            layer.mkdir()
            (layer / layer.name).touch()
        for name in ("upper", "work"):
            (where / name).mkdir()
        root = where / "root"
        for path in ("/", "/deep"):
            build_tree(
                root,
                *([] if path == "/" else [mkdir_op("/deep")]),
                {
                    "op": "overlay",
                    "path": path,
                    "lower": [str(layer) for layer in layers],
                    "upper": str(where / "upper"),
                    "work": str(where / "work"),
                    "idmap": True,
                    "attributes": ["nosuid"],
                },
            )
            merged = root / path.strip("/")
            assert len([name for name in os.listdir(merged) if name.startswith("layer")]) == 30
            assert (merged / "layer0").stat().st_uid == ROOT
            (merged / "new").touch()
            assert (where / "upper/new").exists()
            assert os.statvfs(merged).f_flag & os.ST_NOSUID
            assert len([p for p in mounts.mount_points() if p.startswith(str(root))]) == 1
            jobs.run([{"do": "unmount", "path": str(root)}], [])
            (where / "upper/new").unlink()
        return True

    assert isolated(work, tmp_path)


def test_many_layers_fit(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        layers = [where / f"a-rather-long-name-of-a-layer-{'x' * 100}{n}" for n in range(120)]
        for layer in layers:
            layer.mkdir()
            (layer / layer.name).touch()
        lower: list[object] = [str(layer) for layer in layers]
        build_tree(where / "root", {"op": "overlay", "path": "/", "lower": lower})
        return len(os.listdir(where / "root")), os.access(where / "root", os.W_OK)

    assert isolated(work, tmp_path) == [120, False]


@pytest.mark.parametrize("follow", [False, True])
def test_symbolic_links_of_a_hostile_directory_lead_nowhere(tmp_path: Path, follow: bool) -> None:
    def work(where: Path) -> object:
        victim = where / "victim"
        victim.mkdir()
        hostile = where / "root"
        hostile.mkdir()
        (hostile / "absolute").symlink_to(victim)
        (hostile / "relative").symlink_to("../victim")
        (hostile / "magic").symlink_to("/proc/self/root")
        (hostile / "file").symlink_to(victim / "file")
        mounted = mounts.mount_points()
        for path in (
            "/absolute",
            "/absolute/x",
            "/relative",
            "/magic",
            "/file",
            "/../victim",
            "/relative/../../victim",
        ):
            attacks: list[dict[str, object]] = [
                mkdir_op(path, parents=True),
                {"op": "file", "path": path, "content": "x"},
                tmpfs_op(path),
                bind_op("/usr", path),
                {"op": "symlink", "path": path + "/link", "target": "x"},
            ]
            for op in attacks:
                with contextlib.suppress(jobs.StepError):
                    build_tree(hostile, op | {"follow": follow})
        assert os.listdir(victim) == []
        assert sorted(os.listdir(where)) == ["root", "victim"]
        return [p for p in mounts.mount_points() if p not in mounted and not p.startswith(f"{hostile}/")]

    assert isolated(work, tmp_path) == []


def test_links_inside_may_be_followed_when_asked(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        root = where / "root"
        (root / "run").mkdir(parents=True)
        (root / "var").mkdir()
        (root / "var/run").symlink_to("/run")
        with pytest.raises(jobs.StepError, match="symbolic link"):
            build_tree(root, tmpfs_op("/var/run"))
        build_tree(root, tmpfs_op("/var/run", follow=True))
        return _points(root) == [f"{root}/run"]

    assert isolated(work, tmp_path)


def test_a_failure_leaves_no_mount_no_descriptor_and_no_image(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        before = open_fds(), mounts.mount_points()
        image = where / "disk"
        with pytest.raises(jobs.StepError) as caught:
            build_tree(
                where / "root",
                tmpfs_op(),
                bind_op("/usr", "/usr"),
                {"op": "mkdir", "path": "/x"},
                tmpfs_op("/x"),
                bind_op("/no/such/place", "/y"),
            )
        assert (open_fds(), mounts.mount_points()) == before
        with pytest.raises(jobs.StepError):
            build_tree(where / "root", {"op": "image", "path": "/missing", "image": str(image), "size": 1 << 20})
        assert not image.exists()
        assert (open_fds(), mounts.mount_points()) == before
        error = caught.value
        return error.index, error.do, error.errno, str(error)

    index, do, number, message = isolated(work, tmp_path)
    assert (index, do, number) == (1, "mounts", 2)
    assert "bind /y" in message
    assert "/no/such/place" in message


def test_a_source_that_was_opened_elsewhere_is_mounted_if_it_is_still_the_same(tmp_path: Path) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    for directory in (source, other, tmp_path / "w"):
        directory.mkdir()
    (source / "mine").touch()
    fd = os.open(source, os.O_PATH)
    detached = mounts.detached_tree(str(source))

    def work(where: Path) -> object:
        build_tree(
            where / "root", bind_op({"fd": 0}, "/fd"), bind_op({"fd": 1}, "/tree", detached=True), fds=[fd, detached]
        )
        return (where / "root/fd/mine").exists(), (where / "root/tree/mine").exists()

    def replaced(where: Path) -> object:
        source.rename(tmp_path / "moved")
        other.rename(source)
        syscalls.mount(str(source), str(tmp_path / "moved"), None, syscalls.MS_BIND)
        with pytest.raises(jobs.StepError, match="is not the file that was opened"):
            build_tree(where / "root", bind_op({"fd": 0}, "/fd"), fds=[fd])
        return True

    try:
        assert isolated(work, tmp_path / "w") == [True, True]
        assert isolated(replaced, tmp_path / "w")
    finally:
        os.close(fd)
        os.close(detached)


def test_a_source_path_with_a_link_in_it_is_refused(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        (where / "link").symlink_to("/usr")
        with pytest.raises(jobs.StepError, match="symbolic links"):
            build_tree(where / "root", bind_op(f"{where}/link/bin", "/bin"))
        return True

    assert isolated(work, tmp_path)


def test_a_file_system_that_cannot_map_ids_is_an_error_or_reported(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        with pytest.raises(jobs.StepError, match="mapping the ids"):
            build_tree(where / "root", bind_op("/proc", "/p", idmap=True))
        return build_tree(where / "root", bind_op("/proc", "/p", idmap="try"))["unmapped"]

    assert isolated(work, tmp_path) == ["/p"]


def test_unmounting_never_follows_what_a_stranger_has_renamed(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        root = where / "root"
        build_tree(root, tmpfs_op(), {"op": "mkdir", "path": "/a/b", "parents": True}, tmpfs_op("/a/b"))
        (root / "a").rename(root / "c")
        (root / "a").symlink_to("/")
        before = len(mounts.mount_points())
        jobs.run([{"do": "unmount", "path": str(root)}], [])
        return before - len(mounts.mount_points())

    assert isolated(work, tmp_path) == 2


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ({"op": "teleport", "path": "/x"}, "unknown operation"),
        ({"op": "mkdir", "path": "/x", "colour": 1}, "unknown field 'colour'"),
        ({"op": "mkdir", "path": "/x", "mode": "755"}, "must be of type int"),
        ({"op": "mkdir", "path": "/"}, "names nothing"),
        ({"op": "tmpfs", "path": "/", "size": -1, "inodes": 1}, "must not be negative"),
        ({"op": "bind", "path": "/x", "source": "usr"}, "must be absolute"),
        ({"op": "bind", "path": "/x", "source": {"fd": 3}}, "no descriptor 3"),
        ({"op": "bind", "path": "/x", "source": {"name": "nobody"}}, "named"),
        ({"op": "bind", "path": "/x", "source": "/usr", "attributes": ["shiny"]}, "unknown mount attribute"),
        ({"op": "overlay", "path": "/", "lower": []}, "needs lower"),
        ({"op": "file", "path": "/x", "content": "a", "base64": "aa=="}, "either"),
    ],
)
def test_a_wrong_operation_is_an_error_that_names_it(tmp_path: Path, op: dict[str, object], words: str) -> None:
    def work(where: Path) -> object:
        with pytest.raises(jobs.StepError) as caught:
            build_tree(where / "root", op)
        return str(caught.value)

    message = isolated(work, tmp_path)
    assert words in message
    assert f"{op['op']} {op['path']} (operation 0)" in message


def test_stacked_mounts_and_odd_names_are_unmounted(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        odd = where / "a b\\c\td"
        for _ in range(3):
            build_tree(odd, tmpfs_op())
        build_tree(odd, mkdir_op("/in"), tmpfs_op("/in"), tmpfs_op("/in"))
        beside = where / "a b"
        build_tree(beside, tmpfs_op())
        result, _ = jobs.run([{"do": "unmount", "path": str(odd)}], [])
        return result["steps"], mounts.mount_points(str(odd)), len(mounts.mount_points(str(beside)))

    assert isolated(work, tmp_path) == [[{"unmounted": 3}], [], 1]


def test_descriptors_are_named_and_given(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        (where / "lower").mkdir()
        (where / "lower/file").touch()
        (where / "root").mkdir()
        _, named = jobs.run([USERNS], [])
        before = open_fds()
        steps: list[dict[str, object]] = [
            {"do": "given", "fd": 0, "name": "user"},
            {"do": "dirfd", "path": str(where / "lower"), "name": "layer"},
            {
                "do": "mounts",
                "root": str(where / "root"),
                "ops": [
                    bind_op({"name": "layer"}, "/x", idmap=True),
                    {"op": "restrict", "path": "/x", "attributes": ["readonly"]},
                ],
            },
            {"do": "dirfd", "path": str(where / "root/x"), "name": "files"},
        ]
        _, fds = jobs.run(steps, [named["user"]])
        assert os.stat("file", dir_fd=fds["files"]).st_uid == ROOT
        assert os.statvfs(where / "root/x").f_flag & os.ST_RDONLY
        assert sorted(fds) == ["files", "layer", "user"]
        for fd in fds.values():
            assert not os.get_inheritable(fd)
            os.close(fd)
        assert open_fds() == before
        with pytest.raises(jobs.StepError, match="no namespace"):
            jobs.run([{"do": "given", "fd": 0, "name": "user"}], [os.open("/", os.O_RDONLY)])
        with pytest.raises(jobs.StepError, match="two steps name"):
            jobs.run([steps[1], steps[1]], [])
        return True

    assert isolated(work, tmp_path)


def test_devices_can_be_bound_where_nodes_cannot_be_made(tmp_path: Path) -> None:
    def work(where: Path) -> object:
        build_tree(
            where / "root",
            tmpfs_op(),
            bind_op("/dev/null", "/dev/null", attributes=["nosuid", "noexec"]),
            bind_op("/dev/zero", "/dev/zero", attributes=["nosuid", "nodev"]),
        )
        (where / "root/dev/null").write_text("gone")
        with pytest.raises(PermissionError):
            (where / "root/dev/zero").read_bytes()
        return (where / "root/dev/null").read_text()

    assert isolated(work, tmp_path) == ""
