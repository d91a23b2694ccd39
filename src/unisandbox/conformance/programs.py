"""The programs that the tests run: words for what a test needs, and what says them in a sandbox of either kind.

Most technologies run this machine's programs: a shell, coreutils and python3 (`MachinePrograms`). A Wasm sandbox runs
none of them; there the words are commands of one small module (`guest_programs`; its source is `native/guest/tool.c`).
What only processes can do (fork, handlers of signals, /proc, users, devices) is not in here: tests of that need the
capability `processes`, and speak to a shell.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, Protocol

from unisandbox import Mount

Argv = list[str]
Stream = Literal["stdout", "stderr"]
Bad = Literal["a busy loop", "unread output", "unread errors", "endless files", "endless data", "endless calls"]

BLOCK: Final = bytes(range(256)) * 256
"""What `writes` writes, over and over."""


class Programs(Protocol):
    """Each word gives the arguments of a program. Texts are written as they are, with no end of line added."""

    def nothing(self) -> Argv:
        """Ends at once, with code 0."""

    def exits(self, code: int) -> Argv:
        """Ends at once with this code."""

    def aborts(self) -> Argv:
        """Ends as `abort()` does."""

    def echo(self, text: str) -> Argv:
        """Writes the text and an end of line to its standard output."""

    def says(self, *pieces: tuple[Stream, str | bytes], code: int = 0) -> Argv:
        """Writes the pieces in this order, and ends with the code."""

    def announces(self, text: str) -> Argv:
        """Writes the text and an end of line, and sleeps for long."""

    def lingers(self, seconds: float, text: str, code: int) -> Argv:
        """Sleeps so long, writes the text and an end of line, and ends with the code."""

    def copies(self) -> Argv:
        """Copies its input to its output, at once."""

    def digest(self) -> Argv:
        """Writes the SHA-256 of its input: the first word of its output."""

    def sleeps(self, seconds: float) -> Argv:
        """Sleeps so long."""

    def stubborn(self) -> Argv:
        """Sleeps for long, and does what programs of its kind can so as not to be ended by a SIGTERM."""

    def asks(self, code: int, *, before: str = "", after: str = "", log: str = "", patient: bool = False) -> Argv:
        """Reads a line of its input and ends with the code.

        Args:
            code: to end with.
            before: a line that is written first.
            after: a word that is written with the line that was read, and a space between.
            log: a file that gets the line "started" first.
            patient: the end of the input is no line; it goes on to wait for one.
        """

    def writes(self, blocks: int) -> Argv:
        """Writes so many `BLOCK`s."""

    def repeats(self) -> Argv:
        """Writes lines without end."""

    def floods(self) -> Argv:
        """Writes large blocks without end."""

    def counts(self, end: int) -> Argv:
        """Writes the numbers below `end`, a line each, and then "error" and an end of line to its standard error."""

    def works(self, seconds: float) -> Argv:
        """Computes for so long by the clock; writes the CPU seconds that it got, or nothing where it cannot know."""

    def fits(self, size: int) -> Argv:
        """Uses so many bytes of memory and writes "fits" and an end of line; without so much it does not end well."""

    def eats(self) -> Argv:
        """Uses memory until there is none."""

    def stores(self, path: str, line: str) -> Argv:
        """Writes a file of this line."""

    def shows(self, path: str) -> Argv:
        """Writes what a file holds."""

    def replaces(self, path: str, line: str) -> Argv:
        """Writes what a file holds, makes it a file of this line, and writes that."""

    def lists(self, path: str) -> Argv:
        """Writes the names in a directory, a line each."""

    def fills(self, path: str, size: int, *, keep: bool = False) -> Argv:
        """Writes a file of so many bytes, or as many as there is room for, and how many there were.

        "No space left" is in what it writes to its standard error then. With `keep` the file stays, and the code says
        whether it was written.
        """

    def makes_files(self, directory: str, limit: int) -> Argv:
        """Makes at most so many empty files; writes how many there are, and the name of the error that ended it."""

    def pretends(self, path: str) -> Argv:
        """Makes a file with holes, as large as it can be, and at least 1 GiB."""

    def churns(self, directory: str) -> Argv:
        """Writes "go" and an end of line, then makes and removes files x0 to x49 without end."""

    def swaps(self, one: str, other: str, path: str) -> Argv:
        """Writes "go" and an end of line, then makes `path` a link now to one, now to the other, without end."""

    def finds_whole(self, path: str, size: int) -> Argv:
        """Writes "go" and an end of line, and reads a file again and again; ends when it is not `size` equal bytes."""

    def nests(self, directory: str, depth: int) -> Argv:
        """Makes so many directories, each in the one before it; the first is called d."""

    def environment(self) -> Argv:
        """Writes its environment: NAME=VALUE, each ended by a NUL."""

    def arguments(self, *words: str) -> Argv:
        """Writes its arguments, each ended by a NUL."""

    def directory(self) -> Argv:
        """Writes its working directory and an end of line."""

    def variable_and_directory(self, name: str) -> Argv:
        """Writes a variable of its environment and its working directory, in this order, among white space."""

    def descriptors(self) -> Argv:
        """Writes the numbers of what is open but directories that were given, a line each."""

    def bad(self, what: Bad) -> Argv:
        """Writes "started" and an end of line, and then is bad without end."""

    def worst(self) -> Argv:
        """As much work for the machine as one program can make."""

    def program(self) -> bytes:
        """A file that is a program: called `out`, with the one argument "ran\\n", it writes that."""

    def make_root(self, path: Path) -> Sequence[Mount]:
        """Make an empty directory a root file system in which these programs run, with these mounts."""


def octal(text: str | bytes) -> str:
    """The text with everything but letters and digits as \\ooo, which both `printf` and our guest understand."""
    data = text.encode() if isinstance(text, str) else text
    return "".join(chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else f"\\{byte:03o}" for byte in data)


class MachinePrograms:
    """A POSIX shell, coreutils and python3. The cheapest that does: a shell takes 1 ms, python3 20."""

    def nothing(self) -> Argv:
        return ["true"]

    def exits(self, code: int) -> Argv:
        return ["sh", "-c", f"exit {code}"]

    def aborts(self) -> Argv:
        return ["python3", "-c", "import os; os.abort()"]

    def echo(self, text: str) -> Argv:
        return ["echo", text]

    def says(self, *pieces: tuple[Stream, str | bytes], code: int = 0) -> Argv:
        steps = [f"printf '{octal(text)}'{' >&2' if stream == 'stderr' else ''}" for stream, text in pieces]
        return ["sh", "-c", "; ".join([*steps, f"exit {code}"])]

    def announces(self, text: str) -> Argv:
        return ["sh", "-c", f"echo {shlex.quote(text)}; exec sleep 1000"]

    def lingers(self, seconds: float, text: str, code: int) -> Argv:
        return ["sh", "-c", f"sleep {seconds:g}; echo {shlex.quote(text)}; exit {code}"]

    def copies(self) -> Argv:
        return ["cat"]

    def digest(self) -> Argv:
        return ["sha256sum"]

    def sleeps(self, seconds: float) -> Argv:
        return ["sleep", f"{seconds:g}"]

    def stubborn(self) -> Argv:
        return ["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000"]

    def asks(self, code: int, *, before: str = "", after: str = "", log: str = "", patient: bool = False) -> Argv:
        steps = [f"echo started >> {log}"] if log else []
        steps += [f"echo {before}"] if before else []
        steps += ["while ! read line; do :; done" if patient else "read line"]
        steps += [f"echo {after} $line"] if after else []
        return ["sh", "-c", "; ".join([*steps, f"exit {code}"])]

    def writes(self, blocks: int) -> Argv:
        script = "import sys\nblock = bytes(range(256)) * 256\n"
        script += "for _ in range(int(sys.argv[1])): sys.stdout.buffer.write(block)"
        return ["python3", "-c", script, str(blocks)]

    def repeats(self) -> Argv:
        return ["sh", "-c", "while :; do echo x; done"]

    def floods(self) -> Argv:
        return ["cat", "/dev/zero"]

    def counts(self, end: int) -> Argv:
        script = f"import sys\nfor n in range({end}): print(n)\nprint('error', file=sys.stderr)"
        return ["python3", "-c", script]

    def works(self, seconds: float) -> Argv:
        script = f"import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass\n"
        return ["python3", "-c", script + "print(time.process_time())"]

    def fits(self, size: int) -> Argv:
        script = f"data = bytearray({size})\nfor i in range(0, {size}, 4096): data[i] = 1\nprint('fits')"
        return ["python3", "-c", script]

    def eats(self) -> Argv:
        return ["python3", "-c", "data = bytearray()\nwhile True: data += bytes(1 << 20)"]

    def stores(self, path: str, line: str) -> Argv:
        return ["sh", "-c", f"echo {shlex.quote(line)} > {path}"]

    def shows(self, path: str) -> Argv:
        return ["cat", path]

    def replaces(self, path: str, line: str) -> Argv:
        return ["sh", "-c", f"cat {path}; echo {shlex.quote(line)} > {path} && cat {path}"]

    def lists(self, path: str) -> Argv:
        return ["ls", path]

    def fills(self, path: str, size: int, *, keep: bool = False) -> Argv:
        script = f"head -c {size} /dev/zero > {path} && stat -c %s {path}"
        return ["sh", "-c", script if keep else f"head -c {size} /dev/zero > {path}; stat -c %s {path}; rm {path}"]

    def makes_files(self, directory: str, limit: int) -> Argv:
        script = (
            f"import errno, os\nn, e = 0, 'none'\ntry:\n while n < {limit}:\n"
            f"  os.close(os.open(f'{directory}/x{{n}}', os.O_CREAT)); n += 1\n"
            "except OSError as error: e = errno.errorcode[error.errno]\nprint(n, e)"
        )
        return ["python3", "-c", script]

    def pretends(self, path: str) -> Argv:
        return ["sh", "-c", f"truncate -s 1P {path} || truncate -s 1T {path} || truncate -s 1G {path}"]

    def churns(self, directory: str) -> Argv:
        script = (
            f"import os\nprint('go', flush=True)\nwhile True:\n"
            f" for n in range(50): os.close(os.open(f'{directory}/x{{n}}', os.O_CREAT))\n"
            f" for n in range(50): os.unlink(f'{directory}/x{{n}}')"
        )
        return ["python3", "-c", script]

    def swaps(self, one: str, other: str, path: str) -> Argv:
        script = (
            f"import os\nnew = {path + '.next'!r}\nprint('go', flush=True)\nwhile True:\n"
            f" for target in ({one!r}, {other!r}): os.symlink(target, new); os.rename(new, {path!r})"
        )
        return ["python3", "-c", script]

    def finds_whole(self, path: str, size: int) -> Argv:
        script = (
            f"import sys\nprint('go', flush=True)\nwhile True:\n d = open({path!r}, 'rb').read()\n"
            f" if len(d) != {size} or d.count(d[:1]) != len(d): sys.exit(1)"
        )
        return ["python3", "-c", script]

    def nests(self, directory: str, depth: int) -> Argv:
        script = f"import os\nos.chdir({directory!r})\nfor _ in range({depth}): os.mkdir('d'); os.chdir('d')"
        return ["python3", "-c", script]

    def environment(self) -> Argv:
        return ["env", "-0"]

    def arguments(self, *words: str) -> Argv:
        return ["sh", "-c", "printf '%s\\0' \"$@\"", "sh", *words]

    def directory(self) -> Argv:
        return ["pwd"]

    def variable_and_directory(self, name: str) -> Argv:
        return ["sh", "-c", f"echo ${name}; pwd"]

    def descriptors(self) -> Argv:
        # The directory that the shell has read for the pattern is closed when the names are looked at.
        return ["sh", "-c", "for fd in /proc/self/fd/*; do test -e $fd && echo ${fd##*/}; done; true"]

    def bad(self, what: Bad) -> Argv:
        scripts: dict[Bad, str] = {
            "a busy loop": "while :; do :; done",
            "unread output": "cat /dev/zero",
            "unread errors": "cat /dev/zero >&2",
            "endless files": "i=0; while :; do i=$((i+1)); : > /tmp/f$i; done 2>/dev/null",
            "endless data": "while :; do cat /dev/zero > /tmp/fill; done 2>/dev/null",
            "endless calls": "while :; do test -e /tmp; done",
        }
        return ["sh", "-c", f"echo started; {scripts[what]}"]

    def worst(self) -> Argv:
        return ["sh", "-c", "b() { b | b & }; b; while :; do sleep 1; done"]

    def program(self) -> bytes:
        return b"#!/bin/sh\necho ran\n"

    def make_root(self, path: Path) -> Sequence[Mount]:
        for name in ("bin", "lib", "lib64", "sbin"):
            if os.path.islink(f"/{name}"):
                os.symlink(os.readlink(f"/{name}"), path / name)
        (path / "usr").mkdir()
        return [Mount.bind("/usr", "/usr")]
