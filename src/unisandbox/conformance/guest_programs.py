"""The words of `Programs` for sandboxes that run no programs of this machine: commands of one small Wasm module."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Final

from unisandbox import Mount
from unisandbox.conformance.programs import Argv, Bad, Stream, octal


class GuestPrograms:
    """The commands of `tool.wasm`, each a module of its own name in /bin."""

    COMMANDS: Final = (
        *(
            "abort",
            "append",
            "args",
            "ask",
            "await",
            "cat",
            "churn",
            "count",
            "deep",
            "divide",
            "do",
            "eat",
            "echo",
            "env",
        ),
        *(
            "err",
            "exit",
            "fds",
            "files",
            "fill",
            "fit",
            "flood",
            "litter",
            "ln",
            "ls",
            "mkdir",
            "mv",
            "out",
            "pwd",
            "random",
        ),
        *("read", "refill", "rm", "rmdir", "sha256sum", "sleep", "sockets", "spin", "stat", "store", "swap", "tool"),
        *("true", "truncate", "whole", "write"),
    )

    def nothing(self) -> Argv:
        return ["true"]

    def exits(self, code: int) -> Argv:
        return ["exit", str(code)]

    def aborts(self) -> Argv:
        return ["abort"]

    def echo(self, text: str) -> Argv:
        return ["echo", text]

    def says(self, *pieces: tuple[Stream, str | bytes], code: int = 0) -> Argv:
        steps = [["err" if stream == "stderr" else "out", octal(text)] for stream, text in pieces]
        return _in_turn(*steps, ["exit", str(code)])

    def announces(self, text: str) -> Argv:
        return _in_turn(["out", octal(text + "\n")], ["sleep", "1000"])

    def lingers(self, seconds: float, text: str, code: int) -> Argv:
        return _in_turn(["sleep", f"{seconds:g}"], ["out", octal(text + "\n")], ["exit", str(code)])

    def copies(self) -> Argv:
        return ["cat"]

    def digest(self) -> Argv:
        return ["sha256sum"]

    def sleeps(self, seconds: float) -> Argv:
        return ["sleep", f"{seconds:g}"]

    def stubborn(self) -> Argv:
        return ["sleep", "1000"]  # it has no handlers of signals

    def asks(self, code: int, *, before: str = "", after: str = "", log: str = "", patient: bool = False) -> Argv:
        steps = [["append", log, octal("started\n")]] if log else []
        steps += [["out", octal(before + "\n")]] if before else []
        steps += [["await" if patient else "read", *([f"{after} "] if after else [])]]
        return _in_turn(*steps, ["exit", str(code)])

    def writes(self, blocks: int) -> Argv:
        return ["write", str(blocks)]

    def repeats(self) -> Argv:
        return ["flood"]

    def floods(self) -> Argv:
        return ["flood"]

    def counts(self, end: int) -> Argv:
        return ["count", str(end)]

    def works(self, seconds: float) -> Argv:
        return ["spin", str(seconds)]

    def fits(self, size: int) -> Argv:
        return ["fit", str(size)]

    def eats(self) -> Argv:
        return ["eat"]

    def stores(self, path: str, line: str) -> Argv:
        return ["store", path, octal(line + "\n")]

    def shows(self, path: str) -> Argv:
        return ["cat", path]

    def replaces(self, path: str, line: str) -> Argv:
        return _in_turn(["cat", path], ["store", path, octal(line + "\n")], ["cat", path])

    def lists(self, path: str) -> Argv:
        return ["ls", path]

    def fills(self, path: str, size: int, *, keep: bool = False) -> Argv:
        return ["fill", path, str(size), *([] if keep else ["remove"])]

    def makes_files(self, directory: str, limit: int) -> Argv:
        return ["files", directory, str(limit)]

    def pretends(self, path: str) -> Argv:
        return ["truncate", path, str(1 << 50), str(1 << 40), str(1 << 30)]

    def churns(self, directory: str) -> Argv:
        return _in_turn(["out", octal("go\n")], ["churn", directory])

    def swaps(self, one: str, other: str, path: str) -> Argv:
        return _in_turn(["out", octal("go\n")], ["swap", one, other, path])

    def finds_whole(self, path: str, size: int) -> Argv:
        return _in_turn(["out", octal("go\n")], ["whole", path, str(size)])

    def nests(self, directory: str, depth: int) -> Argv:
        return ["deep", directory, str(depth)]

    def environment(self) -> Argv:
        return ["env"]

    def arguments(self, *words: str) -> Argv:
        return ["args", *words]

    def directory(self) -> Argv:
        return ["pwd"]

    def variable_and_directory(self, name: str) -> Argv:
        return _in_turn(["env", name], ["out", octal("\n")], ["pwd"])

    def descriptors(self) -> Argv:
        return ["fds"]

    def bad(self, what: Bad) -> Argv:
        commands: dict[Bad, Argv] = {
            "a busy loop": ["spin"],
            "unread output": ["flood"],
            "unread errors": ["flood", "err"],
            "endless files": ["litter", "/tmp"],
            "endless data": ["refill", "/tmp/fill"],
            "endless calls": ["ask"],
        }
        return _in_turn(["out", octal("started\n")], commands[what])

    def worst(self) -> Argv:
        return ["spin"]

    def program(self) -> bytes:
        return resources.files("unisandbox.conformance").joinpath("guest", "tool.wasm").read_bytes()

    def make_root(self, path: Path) -> Sequence[Mount]:
        for name in ("bin", "etc", "home", "mnt", "root", "run", "tmp", "usr", "var"):
            (path / name).mkdir()
        (path / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/true\n")
        module = path / "bin" / "tool.wasm"
        module.write_bytes(self.program())
        for name in self.COMMANDS:
            if name != "tool":
                os.link(module, path / "bin" / f"{name}.wasm")
        return []


def _in_turn(*steps: Argv) -> Argv:
    """One command after the other in one program."""
    return ["do", *(word for step in steps for word in (*step, ";"))][:-1]
