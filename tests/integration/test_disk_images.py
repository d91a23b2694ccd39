"""Disk images bound what is written, and free their devices."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from tests.isolated import isolated
from tests.mount_trees import ROOT, build_tree, fill

from unisandbox.host import jobs, loop

pytestmark = pytest.mark.root


def test_a_disk_image_larger_than_its_file_system_can_be_is_refused_as_that() -> None:
    """Also where a file may be that large: on ext4 it may not."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        for size in (loop.MOST_SIZE + 1, 1 << 60):
            with pytest.raises(OSError, match="File too large") as caught:
                loop.make_image(f"{directory}/disk", size)
            assert caught.value.errno == errno.EFBIG
            assert os.listdir(directory) == []


def test_a_disk_image_bounds_what_is_written_and_frees_its_device(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    tmp_path = tmp_path / "work"
    tmp_path.mkdir()

    def work(where: Path) -> object:
        root = where / "root"
        build_tree(root, {"op": "image", "path": "/", "image": str(image), "size": 8 << 20, "uid": ROOT, "gid": ROOT})
        assert root.stat().st_uid == ROOT
        flags = os.statvfs(root).f_flag
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NODEV
        with (root / "fill").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            fill(file)
        os.sync()  # what was written may still be in memory only
        full = image.stat().st_blocks * 512
        (root / "fill").unlink()
        os.sync()
        assert image.stat().st_blocks * 512 < full  # discarded blocks are given back
        (root / "kept").write_text("kept")
        jobs.run([{"do": "unmount", "path": str(root)}], [])
        build_tree(root, {"op": "image", "path": "/", "image": str(image)})
        kept = (root / "kept").read_text()
        jobs.run([{"do": "unmount", "path": str(root)}], [])
        return kept

    assert isolated(work, tmp_path) == "kept"
    assert image.stat().st_size == 8 << 20
    listed = subprocess.run(["losetup", "--noheadings", "--list"], capture_output=True, text=True, check=True)
    assert str(image) not in listed.stdout
