"""Every name of the package has a complete type: pyright --verifytypes by room, with the causes and not their echoes.

All rooms count: the mechanisms are nobody's public surface, but a type that is unclear there makes every type unclear
that mentions it, up to `Sandbox`. Generated code does not: what of it is untyped is its generator's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_GENERATED = "unisandbox.api.proto."
_ECHO = "partially unknown"  # "type of parameter "x" is partially unknown": some other line is the cause


def main() -> None:
    # With --verifytypes pyright takes the first `python` in PATH for its environment, whatever --pythonpath says.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    command = [sys.executable, "-m", "pyright", "--ignoreexternal", "--outputjson", "--verifytypes", "unisandbox"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=False)
    report = json.loads(done.stdout)["typeCompleteness"]
    symbols = [symbol for symbol in report["symbols"] if symbol["isExported"] and _GENERATED not in symbol["name"]]
    spoilt = _spoilt(report["symbols"])
    if not symbols:
        sys.exit("public_types: pyright found no public name in unisandbox; is the package installed in .venv?")
    known: Counter[str] = Counter()
    total: Counter[str] = Counter()
    faults: list[str] = []
    for symbol in symbols:
        words = symbol["name"].split(".")
        room = ".".join(words[: 2 if len(words) > 2 else 1])
        complete = (symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]) or symbol["name"] in spoilt
        total[room] += 1
        known[room] += complete
        if not complete:
            faults += [_line(symbol["name"], fault) for fault in symbol["diagnostics"]]
    for room in sorted(total):
        print(f"{room:24} {known[room]:4} of {total[room]:4} names fully typed")
    if known != total:
        causes = [fault for fault in faults if _ECHO not in fault]
        sys.exit("\n".join([*(causes or faults), f"public_types: {total.total() - known.total()} names lack a type"]))


def _spoilt(symbols: list[dict[str, Any]]) -> set[str]:
    """The names that are incomplete only because a generated class is, which they mention."""
    incomplete = [symbol for symbol in symbols if not symbol["isTypeKnown"]]
    classes = {symbol["name"].rpartition(".")[2] for symbol in incomplete if _GENERATED in symbol["name"]}
    spoilt: set[str] = set()
    grown = True
    while grown:
        before = len(spoilt)
        for symbol in incomplete:
            name = symbol["name"]
            members = [other for other in incomplete if other["name"].startswith(f"{name}.")]
            said = [str(fault.get("message", "")) for fault in symbol["diagnostics"]]
            by_members = not said and members and all(other["name"] in spoilt for other in members)
            by_type = said and all(
                _ECHO in text and text.rpartition(' is "')[2].rstrip('"') in classes for text in said
            )
            if by_members or by_type:
                spoilt.add(name)
                if by_members:
                    classes.add(name.rpartition(".")[2])
        grown = len(spoilt) > before
    return spoilt


def _line(name: str, fault: dict[str, object]) -> str:
    place = fault.get("range")
    file = str(fault.get("file") or "")
    where = f"{os.path.relpath(file, ROOT)}:{place['start']['line'] + 1}: " if file and isinstance(place, dict) else ""
    return f"{where}{name.removeprefix('unisandbox.')}: {str(fault.get('message', '')).splitlines()[0]}"


if __name__ == "__main__":
    main()
