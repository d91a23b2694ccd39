"""What runtimes say about themselves and about a failure is understood; the texts are recorded from real ones."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from unisandbox.api import (
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    SandboxError,
    UnsupportedError,
)
from unisandbox.oci import features
from unisandbox.oci.answers import failure, read_log, why
from unisandbox.oci.bundle import held_path
from unisandbox.oci.features import RuntimeProgram, losses, pick_runtime
from unisandbox.oci.foreign import check

YOUKI_VERSION = """\
youki version: 0.7.0
commit: 0.7.0-VERGEN_IDEMPOTENT_OUTPUT
spec: 1.1.0
rustc: 1.95.0
libseccomp: unknown
"""
YOUKI_FEATURES = {
    "ociVersionMin": "1.0.0",
    "ociVersionMax": "1.1.0",
    "mountOptions": ["ro", "rw", "bind", "rbind"],
    "linux": {"seccomp": None, "mountExtensions": {"idmap": {"enabled": False}}},
}
EXEC_FAILED = (
    "error in executing command: failed to create container: exec process failed with error error in executing"
)
NOT_CREATED = "failed operation due to incompatible container status: `Running`"
NO_PROGRAM = "executable '/no/such/program' not found in $PATH"
NOT_EXECUTABLE = "executable '/usr' at path '\"/usr\"' does not have correct permissions"

Pick = Callable[[str], RuntimeProgram]


@pytest.fixture
def pick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pick:
    """A youki whose --version says what is given."""

    def ask(version: str) -> RuntimeProgram:
        told = {"--version": version, "features": json.dumps(YOUKI_FEATURES)}

        async def query(argv: list[str]) -> bytes:
            return told[argv[1]].encode()

        monkeypatch.setattr(features, "_query", query)
        program = tmp_path / "youki"
        program.touch()
        return anyio.run(pick_runtime, str(program))

    return ask


def test_youki_is_known_by_its_own_words(pick: Pick) -> None:
    found = pick(YOUKI_VERSION)
    assert (found.name, found.version, found.version_text, found.oci_version) == ("youki", (0, 7, 0), "0.7.0", "1.1.0")
    assert found.features.seccomp
    assert not found.features.recursive_readonly
    assert not found.features.idmapped_mounts
    assert not found.features.held_userns


def test_a_youki_without_seccomp_is_not_believed_to_have_it(pick: Pick) -> None:
    found = pick(YOUKI_VERSION.replace("libseccomp: unknown\n", ""))
    assert not found.features.seccomp
    assert "seccomp='default'" in losses(found)


def test_a_bundle_with_a_filter_is_refused_where_the_runtime_has_none(pick: Pick) -> None:
    config = {"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}}
    check(config, pick(YOUKI_VERSION))
    with pytest.raises(UnsupportedError, match=r"linux\.seccomp"):
        check(config, pick(YOUKI_VERSION.replace("libseccomp: unknown\n", "")))


def test_what_is_lost_with_a_runtime_is_told_in_the_words_of_who_asks(pick: Pick) -> None:
    assert losses(pick(YOUKI_VERSION)) == [
        "share_pid=True in a user namespace of its own",
        "mounts of bundles that are read-only with all below them (rro)",
    ]


@pytest.mark.parametrize(
    ("lines", "kind", "exit_code"),
    [
        ([{"message": f"{EXEC_FAILED} process : {NO_PROGRAM}"}], InvalidArgumentError, 127),
        ([{"message": f"{EXEC_FAILED} process : {NOT_EXECUTABLE}"}], InvalidArgumentError, 126),
        (
            [
                {"message": "failed to chdir", "e": "ENOENT"},
                {"message": f"{EXEC_FAILED} process : failed to unix syscall"},
            ],
            InvalidArgumentError,
            126,
        ),
        # Not the program's: a namespace could not be opened.
        ([{"message": f"{EXEC_FAILED} process : EACCES: Permission denied"}], BackendError, None),
        (
            [{"message": f"failed to start c1\n\nCaused by:\n    {NOT_CREATED}"}],
            FailedPreconditionError,
            None,
        ),
        ([{"message": "error in executing command: container c1 does not exist."}], NotFoundError, None),
    ],
    ids=["missing", "refused", "chdir", "namespace", "running", "unknown"],
)
def test_a_failure_of_youki_has_its_type(
    tmp_path: Path, lines: list[dict[str, str]], kind: type[SandboxError], exit_code: int | None
) -> None:
    frame = {"timestamp": "2026-11-29T20:07:15.967748Z", "level": "ERROR", "target": "youki"}
    log = tmp_path / "log"
    log.write_text("".join(json.dumps(frame | line) + "\n" for line in lines))

    error = failure("youki exec", 255, read_log(str(log)), starts_program=True)

    assert type(error) is kind
    if isinstance(error, InvalidArgumentError):
        assert error.exit_code == exit_code
    assert "timestamp" not in str(error)


@pytest.mark.parametrize(
    "words",
    [
        "clone: Resource temporarily unavailable",
        "unable to start container process: fork/exec /proc/self/fd/6: resource temporarily unavailable",
        "failed to clone3: EAGAIN: Try again",
    ],
    ids=["crun", "runc", "youki"],
)
def test_that_there_is_no_room_for_a_process_is_told_with_what_is_full(words: str) -> None:
    error = failure("create", 1, words, starts_program=True)

    assert type(error) is FailedPreconditionError
    assert "Resources.pids" in error.hint


def test_the_reason_is_the_last_error_and_the_first_where_there_are_several() -> None:
    assert why("") == ""
    assert why("warning: odd\nit broke") == "it broke"
    assert why("warning: odd") == "warning: odd"
    assert why("failed to chdir: ENOENT\nfailed to wait\nfailed") == "failed to chdir: ENOENT; failed"


def test_a_held_namespace_is_not_taken_for_its_holders_own() -> None:
    """As runc looks at its path: "/proc/%d/ns/user" matches, for it, whatever else follows the number."""
    with Path("/proc/self/ns/user").open("rb") as held:
        path = held_path(os.getpid(), held.fileno())
        assert os.path.samestat(os.stat(path), os.fstat(held.fileno()))
    assert not re.match(r"/proc/\d", path)


def test_a_message_that_is_written_on_several_lines_is_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    entry = {"msg": "the container `c1` is not in `created` or `stopped` state", "level": "error"}
    log.write_text("odd\n" + 2 * f"{json.dumps(entry, indent=2)}\n")

    assert read_log(str(log)).splitlines() == ["odd", entry["msg"], entry["msg"]]


def test_a_directory_that_crun_is_to_execute_is_refused_with_126() -> None:
    error = failure(
        "crun exec", 1, "the path `/usr` is not a regular file: Operation not permitted", starts_program=True
    )
    assert isinstance(error, InvalidArgumentError)
    assert error.exit_code == 126
