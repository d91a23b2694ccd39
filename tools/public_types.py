"""Every name of the package has a complete type: pyright --verifytypes by room, with the causes and not their echoes.

All rooms count: the mechanisms are nobody's public surface, but a type that is unclear there makes every type unclear
that mentions it, up to `Sandbox`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_ECHO = "partially unknown"  # "type of parameter "x" is partially unknown": some other line is the cause


def main() -> None:
    # With --verifytypes pyright takes the first `python` in PATH for its environment, whatever --pythonpath says.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    command = [sys.executable, "-m", "pyright", "--ignoreexternal", "--outputjson", "--verifytypes", "unisandbox"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=False)
    report = json.loads(done.stdout)["typeCompleteness"]
    symbols = [symbol for symbol in report["symbols"] if symbol["isExported"]]
    if not symbols:
        sys.exit("public_types: pyright found no public name in unisandbox; is the package installed in .venv?")
    known: Counter[str] = Counter()
    total: Counter[str] = Counter()
    faults: list[str] = []
    for symbol in symbols:
        words = symbol["name"].split(".")
        room = ".".join(words[: 2 if len(words) > 2 else 1])
        complete = symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]
        total[room] += 1
        known[room] += complete
        if not complete:
            faults += [_line(symbol["name"], fault) for fault in symbol["diagnostics"]]
    for room in sorted(total):
        print(f"{room:24} {known[room]:4} of {total[room]:4} names fully typed")
    if known != total:
        causes = [fault for fault in faults if _ECHO not in fault]
        sys.exit("\n".join([*(causes or faults), f"public_types: {total.total() - known.total()} names lack a type"]))


def _line(name: str, fault: dict[str, object]) -> str:
    place = fault.get("range")
    file = str(fault.get("file") or "")
    where = f"{os.path.relpath(file, ROOT)}:{place['start']['line'] + 1}: " if file and isinstance(place, dict) else ""
    return f"{where}{name.removeprefix('unisandbox.')}: {str(fault.get('message', '')).splitlines()[0]}"


if __name__ == "__main__":
    main()
