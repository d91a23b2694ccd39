"""A sandbox and the program that is its own, made as one."""

from __future__ import annotations

from unisandbox.api import ProcessSpec
from unisandbox.sandbox.engine import Engine
from unisandbox.sandbox.sandbox import Sandbox, SandboxOptions, make_spec


async def create_launched(engine: Engine, options: SandboxOptions, process: ProcessSpec) -> Sandbox:
    """As `Engine.create` and `Sandbox.launch`, with nothing left when that fails or is cut in between.

    To others the sandbox is being made until the program runs.
    """
    return Sandbox(await engine._core.create(make_spec(**options), program=process))
