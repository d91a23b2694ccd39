"""Records: whole or damaged, never another one; damaged ones are kept aside, older ones are read."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unisandbox.api import BackendError, InvalidArgumentError, Mount, SandboxSpec
from unisandbox.api.plain import plain
from unisandbox.engine import durable, records
from unisandbox.engine.record import Record, spec_of
from unisandbox.engine.record_format import line_of
from unisandbox.engine.records import Damaged, Records, RecordStore

# As version 1 of the code has written it.
VERSION_1 = (
    b'{"version": 1, "sha256": "085a725e441f3550f05cb8cf800e3780b5370bce5d21903a4f0cfcc5e6fe5882", "record": '
    b'{"backend":"runc","boot_id":"b","created_at":1764000000.25,"generation":1,"name":"web","owner_pid":4711,'
    b'"phase":"ready","sandbox_id":"s1","spec":{"env":{"A":"\\u00e4"},"name":"web","ttl":null}}}\n'
)

FULL = Record(
    sandbox_id="s1",
    name="web",
    backend="runc",
    phase="ready",
    created_at=1764000000.25,
    generation=7,
    boot_id="0f3c2a4e-0000-4000-8000-000000000000",
    owner=(4711, 123456),
    client=7,
    spec=plain(SandboxSpec(name="web", mounts=(Mount.tmpfs("/data"),), env={"A": "ä", "B": "\udcff"})),
    started_at=1764000001.5,
    stopped_at=None,
    expires_at=1764003601.5,
    operation_id="op-1",
)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(str(tmp_path / "sandboxes"), durable=True)


def written(store: RecordStore, tmp_path: Path, record: Record = FULL) -> Path:
    store.write(record)
    return tmp_path / "sandboxes" / f"{record.sandbox_id}.json"


def only_damage(store: RecordStore, path: Path, reason: str) -> Damaged:
    """Read a store in which one record is damaged: it is kept aside, and told once."""
    found = store.read_all()
    assert found.records == ()
    assert len(found.damaged) == 1
    damage = found.damaged[0]
    assert damage.path == str(path)
    assert reason in damage.reason
    assert os.path.dirname(damage.kept_as) == str(path.parent.parent / "damaged")
    assert os.path.lexists(damage.kept_as)
    assert store.read_all() == Records((), ())
    return damage


@pytest.mark.parametrize("durable", [True, False])
def test_what_was_written_is_read(tmp_path: Path, durable: bool) -> None:
    store = RecordStore(str(tmp_path / "sandboxes"), durable=durable)
    least = Record("s2", None, "runc", "creating", 1.0)
    assert store.read_all() == Records((), ())
    store.write(least)
    store.write(FULL._replace(phase="creating"))
    store.write(FULL)
    assert store.read_all() == Records((FULL, least), ())
    assert store.read("s1") == FULL
    assert spec_of(FULL) == SandboxSpec(name="web", mounts=(Mount.tmpfs("/data"),), env={"A": "ä", "B": "\udcff"})
    store.remove("s1")
    store.remove("s1")
    assert store.read("s1") is None
    assert store.read_all() == Records((least,), ())
    assert os.listdir(tmp_path / "sandboxes") == ["s2.json"]


def test_every_prefix_of_a_record_is_damaged(store: RecordStore, tmp_path: Path) -> None:
    path = written(store, tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found = store.read_all(repair=False)
        assert (found.records, len(found.damaged)) == ((), 1), length


def test_a_flipped_bit_never_makes_another_record(store: RecordStore, tmp_path: Path) -> None:
    path = written(store, tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        found = store.read_all(repair=False)
        assert (found.records, len(found.damaged)) == ((), 1), place
    path.write_bytes(whole)
    assert store.read_all() == Records((FULL,), ())


def test_a_record_of_version_1_is_read_and_written_back_as_the_latest(store: RecordStore, tmp_path: Path) -> None:
    path = tmp_path / "sandboxes" / "s1.json"
    path.parent.mkdir()
    path.write_bytes(VERSION_1)
    record = Record(
        sandbox_id="s1",
        name="web",
        backend="runc",
        phase="ready",
        created_at=1764000000.25,
        generation=1,
        boot_id="b",
        owner=(4711, 0),
        spec={"env": {"A": "ä"}, "name": "web", "ttl": None},
    )
    assert store.read_all() == Records((record,), ())
    assert path.read_bytes() == VERSION_1
    assert spec_of(record) == SandboxSpec(name="web", env={"A": "ä"})
    store.write(record)
    assert json.loads(path.read_bytes())["version"] == 3
    assert store.read("s1") == record


@pytest.mark.parametrize("place", range(0, len(VERSION_1), 7))
def test_a_flipped_bit_of_an_old_record_never_makes_another(store: RecordStore, tmp_path: Path, place: int) -> None:
    path = tmp_path / "sandboxes" / "s1.json"
    path.parent.mkdir()
    for bit in range(8):
        changed = bytearray(VERSION_1)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        assert store.read_all(repair=False).records == ()


def test_a_record_of_a_later_version_is_kept_aside_and_says_so(store: RecordStore, tmp_path: Path) -> None:
    path = written(store, tmp_path)
    path.write_bytes(line_of(4, {"anything": 1}))
    content = path.read_bytes()
    damage = only_damage(store, path, "version 4, written by a later unisandbox")
    assert Path(damage.kept_as).read_bytes() == content


def changed(**fields: object) -> Callable[[Path], None]:
    """Write a record whose checksum is right and whose fields are not."""

    def write(path: Path) -> None:
        body = {**FULL._asdict(), **fields}
        path.write_bytes(line_of(3, {name: value for name, value in body.items() if value != "left out"}))

    return write


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not whole"),
    "garbage": (lambda path: path.write_bytes(os.urandom(300)), "not whole"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), "not whole"),
    "another text": (lambda path: path.write_text("[1, 2]"), "no record"),
    "utf-16": (lambda path: path.write_bytes(path.read_bytes().decode().encode("utf-16")), "not whole"),
    "nested without end": (lambda path: path.write_bytes(b"[" * 100_000), "nested without end"),
    "a number without end": (lambda path: path.write_bytes(b"9" * 100_000), "not whole"),
    "huge": (lambda path: os.truncate(path, 1 << 40), "larger than"),
    "of another sandbox": (changed(sandbox_id="s2"), "the record of sandbox 's2'"),
    "an id that is a path": (changed(sandbox_id="../s1"), "'../s1' is not valid"),
    "no id": (changed(sandbox_id=1), "sandbox_id must be text"),
    "a field more": (changed(gpu=1), "'gpu' is not known"),
    "a field less": (changed(owner="left out"), "'owner' is missing"),
    "name": (changed(name=["web"]), "name must be text or null"),
    "name that is none": (changed(name="a/b"), "'a/b' is not valid"),
    "backend": (changed(backend=None), "backend must be text"),
    "backend that is a path": (changed(backend="../x"), "not valid"),
    "phase": (changed(phase="sleeping"), "phase must be one of creating, ready, stopped, removing"),
    "created_at": (changed(created_at="now"), "created_at must be seconds"),
    "created_at true": (changed(created_at=True), "created_at must be seconds"),
    "created_at null": (changed(created_at=None), "created_at must be seconds"),
    "generation": (changed(generation=0), "generation must be a whole number > 0"),
    "generation in parts": (changed(generation=1.5), "generation must be a whole number > 0"),
    "boot_id": (changed(boot_id=7), "boot_id must be"),
    "owner": (changed(owner=[1]), "owner must be a pid and a start time"),
    "owner below 0": (changed(owner=[-1, 1]), "owner must be a pid and a start time"),
    "spec": (changed(spec=[]), "spec must be an object"),
    "started_at": (changed(started_at="x"), "started_at must be seconds"),
    "stopped_at": (changed(stopped_at=[]), "stopped_at must be seconds"),
    "expires_at": (changed(expires_at={}), "expires_at must be seconds"),
    "operation_id": (changed(operation_id=None), "operation_id must be text"),
    "operation_id that is a path": (changed(operation_id="a/b"), "not valid"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_kept_aside_with_the_reason(
    store: RecordStore, tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    path = written(store, tmp_path)
    damage(path)
    with pytest.raises(BackendError, match=r"record of sandbox 's1' .* cannot be used"):
        store.read("s1")
    assert store.read_all(repair=False).damaged[0].kept_as == str(path)
    only_damage(store, path, reason)


def test_not_a_number_is_no_time(store: RecordStore, tmp_path: Path) -> None:
    path = written(store, tmp_path)
    path.write_bytes(path.read_bytes().replace(b"1764000000.25", b"NaN"))
    only_damage(store, path, "")


@pytest.mark.parametrize("kind", ["directory", "link", "dangling link", "socket", "fifo"])
def test_what_is_no_file_is_kept_aside_and_not_followed(store: RecordStore, tmp_path: Path, kind: str) -> None:
    path = written(store, tmp_path)
    good = tmp_path / "good.json"
    path.rename(good)
    if kind == "directory":
        (path / "inside").mkdir(parents=True)
    elif kind == "link":
        path.symlink_to(good)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(path))
        finally:
            listener.close()
    damage = only_damage(store, path, "not a regular file")
    assert good.exists()
    assert os.path.isdir(os.path.join(damage.kept_as, "inside")) == (kind == "directory")


def test_nothing_that_was_kept_aside_is_overwritten(store: RecordStore, tmp_path: Path) -> None:
    for turn in range(3):
        path = written(store, tmp_path)
        path.write_text(f"damage {turn}")
        only_damage(store, path, "not whole")
    kept = sorted(file.read_text() for file in (tmp_path / "damaged").iterdir())
    assert kept == ["damage 0", "damage 1", "damage 2"]


def test_a_record_that_was_mended_meanwhile_is_not_moved(
    store: RecordStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody writes it anew between the look at the damaged one and its move."""
    path = written(store, tmp_path)
    path.write_text("damage")
    move = durable.set_aside

    def slow(path: str, directory: str, *, of: tuple[int, int] | None, durable: bool) -> str:
        store.write(FULL)
        return move(path, directory, of=of, durable=durable)

    monkeypatch.setattr(durable, "set_aside", slow)
    assert store.read_all() == Records((FULL,), ())
    assert store.read("s1") == FULL
    assert os.listdir(tmp_path / "damaged") == []


def test_a_damaged_record_that_cannot_be_moved_stays_and_is_told(store: RecordStore, tmp_path: Path) -> None:
    path = written(store, tmp_path)
    path.write_text("damage")
    (tmp_path / "damaged").write_text("in the way")
    damage = store.read_all().damaged[0]
    assert (damage.path, damage.kept_as) == (str(path), str(path))
    assert "could not be moved" in damage.reason
    assert path.read_text() == "damage"


def test_a_record_is_not_damaged_because_its_reader_lacks_descriptors(
    store: RecordStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(store, tmp_path)

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(OSError, match="Too many"):
            store.read_all()
    assert path.exists()
    assert store.read_all() == Records((FULL,), ())


def test_only_temporary_files_of_writers_are_cleared_away(store: RecordStore, tmp_path: Path) -> None:
    place = written(store, tmp_path).parent
    (place / "s1.json.01234567.tmp").write_text("half")
    (place / "s1.json.tmp").write_text("half")  # as version 1 named them
    (place / "keep.tmp").mkdir()
    (place / "link.tmp").symlink_to(place / "s1.json")
    (place / "notes").write_text("the user's own")
    assert store.read_all(repair=False) == Records((FULL,), ())
    assert len(os.listdir(place)) == 6
    assert store.read_all() == Records((FULL,), ())
    assert sorted(os.listdir(place)) == ["keep.tmp", "link.tmp", "notes", "s1.json"]


KILLED = """
import os, signal, sys
from unisandbox.engine.record import Record
from unisandbox.engine.records import RecordStore
step, place = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, step, die)
RecordStore(place, durable=True).write(Record("s1", None, "runc", "stopped", 9.0))
"""


@pytest.mark.parametrize("step", ["fsync", "rename", "close"])
def test_a_kill_in_the_middle_of_a_write_leaves_the_old_record(store: RecordStore, tmp_path: Path, step: str) -> None:
    path = written(store, tmp_path)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, step, str(path.parent)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert len(os.listdir(path.parent)) == 2
    assert store.read_all() == Records((FULL,), ())
    assert os.listdir(path.parent) == ["s1.json"]


def test_a_record_that_could_not_be_read_again_is_refused(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RECORD_LIMIT", 4096)
    store.write(FULL)
    with pytest.raises(InvalidArgumentError, match="'s1' needs"):
        store.write(FULL._replace(spec={"env": {"A": "x" * 4096}}))
    assert store.read("s1") == FULL
    with pytest.raises(InvalidArgumentError, match="not valid"):
        store.read("../s1")


def test_a_spec_of_a_later_version_names_sandbox_and_field() -> None:
    with pytest.raises(InvalidArgumentError, match="sandbox 's1': sandbox spec: the field 'gpu' is not known"):
        spec_of(FULL._replace(spec={**FULL.spec, "gpu": 1}))
