"""Where a Python that we start apart from our environment leaves compiled modules: where this process does."""

from __future__ import annotations

import os
import sys


def options() -> list[str]:
    """For its command line; with -I it does not see PYTHONDONTWRITEBYTECODE and PYTHONPYCACHEPREFIX."""
    if sys.dont_write_bytecode:
        return ["-B"]
    return ["-X", f"pycache_prefix={os.path.abspath(sys.pycache_prefix)}"] if sys.pycache_prefix else []
