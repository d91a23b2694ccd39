"""The SDK: Engine, Sandbox, Process, Files, Containers.

May know: engine/ and the contracts. Nothing imports it but other faces.
It holds no state of its own beyond streams; what must be remembered is the engine's.
"""

from unisandbox.sandbox.containers import Container, Containers
from unisandbox.sandbox.engine import Engine
from unisandbox.sandbox.files import Files
from unisandbox.sandbox.opening import Opening
from unisandbox.sandbox.process import Output, Process
from unisandbox.sandbox.sandbox import Sandbox, SandboxOptions

__all__ = ["Container", "Containers", "Engine", "Files", "Opening", "Output", "Process", "Sandbox", "SandboxOptions"]
