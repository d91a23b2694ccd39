"""Numbers of events are on the disk before the first of them is given: a failure of the machine gives none again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from unisandbox.host.keeper.events import Events
from unisandbox.host.keeper.loop import Loop

Open = Callable[[], Events]


@pytest.fixture
def events_at(tmp_path: Path) -> Iterator[Open]:
    dirfd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield lambda: Events(cast("Loop", None), dirfd, "events")  # nobody waits here
    os.close(dirfd)


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced, and what is renamed to it, in order."""
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def syncing(fd: int) -> None:
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path))
        sync(fd)

    def renaming(old: str, new: str, **options: int) -> None:
        done.append(f"{old} -> {new}")
        rename(old, new, **options)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    return done


def test_a_block_of_numbers_is_on_the_disk_with_its_name_before_one_is_given(events_at: Open, done: list[str]) -> None:
    events = events_at()
    assert done == ["events.new", "events.new -> events", "."]
    for _ in range(10):
        events.tell("{}")
    assert len(done) == 3
    events.end()  # if the disk does not get it the block is still reserved
    assert done[3:] == ["events.new -> events"]


def test_on_a_full_disk_a_block_of_numbers_is_on_it_too(
    events_at: Open, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events_at()
    done.clear()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "rename", full)
    events_at()
    assert done == ["events.new", "events"]
