"""The entry point of pytest: lets `pytest --pyargs unisandbox.conformance` know its options.

pytest loads it wherever unisandbox is installed, so it does nothing at all in runs of other tests: its options would
get in the way of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

_PLUGIN = "unisandbox.conformance.plugin"


# After the conftest.py files of the command line, which may know some of the options already.
@pytest.hookimpl(trylast=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: Sequence[str], parser: pytest.Parser) -> None:
    """Load the plugin if its tests are asked for."""
    if any(arg.startswith("unisandbox.conformance") or "unisandbox/conformance" in arg for arg in args):
        early_config.pluginmanager.import_plugin(_PLUGIN)
        from unisandbox.conformance.plugin import add_shared_options

        add_shared_options(parser)
