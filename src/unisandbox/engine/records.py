"""One record per sandbox on disk: what was intended before it was done, so that it can be found after a crash.

A record is one line of JSON: a header with version and checksum, and the body. It is written to a temporary file and
renamed over the old one, so a reader sees the old or the new record, never a part of one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import attrs

from unisandbox.api import BackendError, SandboxError, SandboxSpec

RECORD_VERSION: Final = 1

Phase = Literal["creating", "ready", "stopped", "removing"]


@attrs.frozen
class Record:
    """What is known of one sandbox beyond this process.

    Attributes:
        sandbox_id, name, backend, created_at: as in SandboxStatus.
        phase: what was being done, or was reached.
        generation: rises with each engine that takes the sandbox over.
        boot_id: of the kernel that it lives on; another one means that nothing of it lives.
        owner_pid: the process that wrote this.
        spec: the request, as plain data.
    """

    sandbox_id: str
    name: str | None
    backend: str
    phase: Phase
    created_at: float
    generation: int = 1
    boot_id: str = ""
    owner_pid: int = 0
    spec: Mapping[str, object] = attrs.field(factory=dict)


def boot_id() -> str:
    """The id of this boot of the kernel. Source: random(4), /proc/sys/kernel/random/boot_id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _plain(value: object) -> object:
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def plain_spec(spec: SandboxSpec) -> dict[str, object]:
    """The spec as plain data that JSON can hold."""
    plain = _plain(attrs.asdict(spec))
    assert isinstance(plain, dict)  # noqa: S101 (asdict gives a dict; said for the type checker)
    return plain


class RecordStore:
    """The directory of records of one engine.

    Args:
        directory: made when the first record is written.
        durable: wait until the disk has it (fsync of file and directory). Not needed on a file system in memory.
    """

    def __init__(self, directory: str, *, durable: bool) -> None:
        self._directory = directory
        self._durable = durable

    def _path(self, sandbox_id: str) -> str:
        return os.path.join(self._directory, f"{sandbox_id}.json")

    def write(self, record: Record) -> None:
        """Replace the record by this one.

        Raises:
            BackendError: the disk is full or not writable; the old record is still there.
        """
        body = json.dumps(attrs.asdict(record, recurse=False), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(body.encode()).hexdigest()
        line = json.dumps({"version": RECORD_VERSION, "sha256": digest})[:-1] + f', "record": {body}}}\n'
        path = self._path(record.sandbox_id)
        temporary = f"{path}.tmp"
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
                    file.write(line)
                if self._durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, path)
            self._sync_directory()
        except OSError as error:
            self._discard(temporary)
            raise BackendError(
                f"cannot write the record of sandbox {record.sandbox_id!r} to {path}: {error.strerror}",
                hint="Free space there, or open the engine with another state directory.",
            ) from error

    def remove(self, sandbox_id: str) -> None:
        """Forget a sandbox. A record that is not there is no error."""
        try:
            os.unlink(self._path(sandbox_id))
        except FileNotFoundError:
            return
        self._sync_directory()

    def read_all(self) -> tuple[list[Record], list[tuple[str, str]]]:
        """Every record that can be read, and (path, why not) of the others; those are left as they are."""
        records: list[Record] = []
        damaged: list[tuple[str, str]] = []
        try:
            names = sorted(os.listdir(self._directory))
        except FileNotFoundError:
            return [], []
        for name in names:
            if not name.endswith(".json"):
                continue
            path = os.path.join(self._directory, name)
            try:
                records.append(_parse(Path(path).read_bytes()))
            except (OSError, ValueError, KeyError, TypeError, SandboxError) as error:
                damaged.append((path, str(error)))
        return records, damaged

    def _sync_directory(self) -> None:
        if not self._durable:
            return
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @staticmethod
    def _discard(path: str) -> None:
        try:
            os.unlink(path)
        except OSError:
            return  # it was never made, or the disk refuses everything; the error that matters is already on its way


def _parse(raw: bytes) -> Record:
    outer = json.loads(raw)
    if outer["version"] != RECORD_VERSION:
        raise ValueError(f"version {outer['version']} is not {RECORD_VERSION}")
    body = json.dumps(outer["record"], sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
        raise ValueError("the checksum does not match")
    return Record(**outer["record"])
