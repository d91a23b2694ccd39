"""How a process ended, and what a finished `run` gives back."""

from __future__ import annotations

from typing import Literal

import attrs

from unisandbox.api.by_fields import by_fields

ExitReason = Literal["exited", "signaled", "oom", "trap", "cpu", "fuel", "lost"]


@attrs.frozen
@by_fields
class Exit:
    """How a process ended.

    Attributes:
        code: 0-255; 128 + n for signal n, as shells say it. 255 when `reason` is "lost".
        signal: the number of the signal that ended it, or None.
        reason: "exited" (it returned a code), "signaled", "oom" (a SIGKILL that we did not send while the OOM
            counter of its own cgroup rose; a Wasm guest that ended itself after it was refused memory), "trap" (a Wasm
            guest did what Wasm forbids), "cpu" (its `Resources.cpu_seconds` are used up), "fuel" (a Wasm guest's
            instructions are), "lost" (it is gone and its status could not be learned; never guessed).
        oom_kills: processes that the kernel killed for memory in the process's own cgroup, its children included.
        exited_at: seconds since the epoch when it ended, whenever one asks. When `reason` is "lost" that may be when
            the end was noticed.
        detail: of a trap its name and where in the program it was; empty otherwise.
    """

    code: int
    signal: int | None = None
    reason: ExitReason = "exited"
    oom_kills: int = 0
    exited_at: float = 0.0
    detail: str = ""

    @classmethod
    def lost(cls, *, exited_at: float) -> Exit:
        """The exit of a process that is gone without a trace."""
        return cls(code=255, reason="lost", exited_at=exited_at)

    @classmethod
    def from_wait_status(cls, status: int, *, exited_at: float, oom_kills: int = 0, killed_by_us: bool = False) -> Exit:
        """Translate a raw wait(2) status word.

        Source: wait(2): the low 7 bits are the signal, bit 7 says that a core was dumped, bits 8-15 are the code.
        """
        number = status & 0x7F
        if number == 0:
            return cls(code=(status >> 8) & 0xFF, oom_kills=oom_kills, exited_at=exited_at)
        oom = number == 9 and oom_kills > 0 and not killed_by_us
        return cls(
            code=128 + number,
            signal=number,
            reason="oom" if oom else "signaled",
            oom_kills=oom_kills,
            exited_at=exited_at,
        )


@attrs.frozen
@by_fields
class Completed:
    """A finished `run`.

    Attributes:
        argv: what was run.
        exit: how it ended.
        stdout: what it wrote to its standard output, at most `max_output` bytes.
        stderr: the same for its standard error.
        truncated: output beyond `max_output` was thrown away.
        duration: seconds from the request to the end.
    """

    argv: tuple[str, ...]
    exit: Exit
    stdout: bytes = attrs.field(default=b"", repr=lambda data: repr(data[:80]))
    stderr: bytes = attrs.field(default=b"", repr=lambda data: repr(data[:80]))
    truncated: bool = False
    duration: float = 0.0

    @property
    def exit_code(self) -> int:
        """0-255; 128 + n for signal n."""
        return self.exit.code

    @property
    def text(self) -> str:
        """Standard output as UTF-8; bytes that are not become U+FFFD."""
        return self.stdout.decode("utf-8", "replace")
