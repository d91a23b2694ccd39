"""The command line `unisandbox`: run a program in a sandbox, say what this host can do, measure.

Lives here: `app` (options, and how errors are shown), `run`, `local` (the caller's own terminal and streams), `doctor`,
`bench`. May know: the SDK, the engine's registry, the contracts. Nothing imports it. It needs the extra `cli`.
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
