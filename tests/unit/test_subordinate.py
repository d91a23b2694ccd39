"""The ids of a user who is not root: his own, those that are subordinate to him, and the one that is kept back."""

from __future__ import annotations

from pathlib import Path

import pytest

from unisandbox.api import Rootfs, UnsupportedError
from unisandbox.backends.runc import overlays, users
from unisandbox.host import subordinate
from unisandbox.host.power import ids, standing

# A user 1000 with two ranges.
ROWS = [[0, 1000, 1], [1, 100_000, 500], [501, 300_000, 600]]


def test_namespaces_below_have_all_ids_but_the_last_one() -> None:
    below = subordinate.below(ROWS)

    assert below == [[0, 0, 1], [1, 1, 500], [501, 501, 599]]
    assert subordinate.count(below) == subordinate.count(ROWS) - 1
    assert subordinate.reserved(ROWS) == 1100


def test_a_range_of_one_id_that_is_kept_back_is_in_no_namespace_below() -> None:
    assert subordinate.below([[0, 1000, 1], [1, 100_000, 1]]) == [[0, 0, 1]]


def test_the_only_id_is_not_kept_back() -> None:
    assert subordinate.below([[0, 1000, 1]]) == [[0, 0, 1]]
    assert subordinate.are_single(([[0, 1000, 1]], ROWS))
    assert not subordinate.are_single((ROWS, ROWS))


@pytest.mark.parametrize(
    ("told", "rows"),
    [
        ("0 0 4294967295\n", [[0, 0, 65537]]),
        ("0 1000 1\n1 100000 65536\n", [[0, 0, 1], [1, 1, 65536]]),
        ("0 100000 65536\n", [[0, 0, 65536]]),
        ("0 1000 1\n2 100000 65536\n", [[0, 0, 1]]),
    ],
    ids=["the host's", "podman's", "Docker's", "with a gap"],
)
def test_root_has_the_ids_that_are_his_already_row_by_row(
    monkeypatch: pytest.MonkeyPatch, told: str, rows: list[list[int]]
) -> None:
    """The kernel takes no row that spans two of the namespace above."""
    monkeypatch.setattr(standing, "read", lambda _: told)
    monkeypatch.setattr("os.geteuid", lambda: 0)

    assert ids.maps() == (rows, rows)


@pytest.mark.parametrize("release", ["6.1.0-57-cloud-amd64", "5.15.0"])
@pytest.mark.parametrize("installed", [(), ("fuse-overlayfs",), ("fuse-overlayfs", "unshare", "setpriv")])
def test_a_directory_to_be_written_is_refused_where_nothing_can_lay_a_layer_over_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, installed: tuple[str, ...]
) -> None:
    for name in installed:
        (tmp_path / name).touch(0o755)
    monkeypatch.setattr(overlays, "PATH", str(tmp_path))
    monkeypatch.setattr(overlays, "DEVICE", str(tmp_path / "fuse"))
    missing = {0: "fuse-overlayfs is not installed", 1: "unshare is not installed", 3: "fuse cannot be opened"}
    with pytest.raises(UnsupportedError, match="readonly=True") as caught:
        users.check_rootfs(Rootfs.dir("/srv"), release)
    assert missing[len(installed)] in str(caught.value)
    assert "As root: modprobe fuse" in str(caught.value) or "apt install" in str(caught.value)
    users.check_rootfs(Rootfs.dir("/srv", readonly=True), release)
    users.check_rootfs(Rootfs.dir("/srv"), "6.6.0")
    if len(installed) == 3:
        (tmp_path / "fuse").touch()
        users.check_rootfs(Rootfs.dir("/srv"), release)


def test_the_range_that_is_proposed_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/etc/subuid": "a:100000:65536\nb:300000:10\nodd\n", "/etc/subgid": "a:400000:65536"}
    monkeypatch.setattr(standing, "read", lambda path: files.get(path, ""))
    assert ids._free() == "465536-531071"
    files.clear()
    assert ids._free() == "100000-165535"


@pytest.mark.parametrize("release", ["6.1", "6.1.0-18-amd64", "6.1-rc2", "6.1-15-generic"])
def test_the_version_of_a_kernel_is_read_however_the_release_goes_on(release: str) -> None:
    assert standing.kernel(release) == (6, 1)
