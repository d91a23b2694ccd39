"""The command line `unisandbox`: run programs in sandboxes, look after those that live on, say what this host can do.

Lives here: `app` and `commands` (what can be said to it), `run`, `local` (the caller's own terminal and streams),
`state` (the directory that the commands share), `sandboxes` (what is done with those in it), `doctor` and its `facts`,
`bench`. May know: the SDK, the engine's parts, the contracts. Nothing imports it. It needs the extra `cli`.
"""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["main"]

_EXTRA = "click"


def main() -> NoReturn:
    """The entry point of the program `unisandbox`; ends the process with the exit code."""
    try:
        from unisandbox.cli.app import run_app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != _EXTRA:
            raise
        sys.exit(f"unisandbox: the command line needs {error.name}, which is missing: pip install 'unisandbox[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run_app(sys.argv[1:]))
