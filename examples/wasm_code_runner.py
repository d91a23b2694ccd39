"""A code runner on WebAssembly: strangers' Python and JavaScript, in this process and unable to harm it.

    pip install 'unisandbox[wasm]'
    python examples/wasm_code_runner.py [DIRECTORY]

DIRECTORY has bin/python.wasm and bin/qjs.wasm; without one they are taken from a package on PyPI, and checked.
Each snippet gets a sandbox of its own: a few milliseconds, no process, nothing shared with the next one. The first run
on a machine compiles the two languages (half a minute of one processor for CPython) and keeps the result.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from unisandbox import DeadlineExceededError, Engine, Resources

LIMITS = Resources(memory="128M", cpu_seconds=5, disk="16M")
COMMANDS = {"python": ["python", "-I", "-c"], "javascript": ["qjs", "-e"]}
SNIPPETS = [
    ("python", "print(sum(n * n for n in range(10)))"),
    ("javascript", "console.log([1, 2, 3].map(n => n * n).join(' '))"),
    ("python", "open('/tmp/notes', 'w').write('mine'); print(open('/tmp/notes').read())"),
    ("python", "print(open('/tmp/notes').read())"),  # of another sandbox
    ("python", "raise SystemExit(7)"),
    ("python", "print(undefined)"),
    ("python", "while True: pass"),
    ("javascript", "for (;;) {}"),
    ("python", "data = []\nwhile True: data.append(bytes(1 << 20))"),
    ("python", "import os; print(sorted(os.environ), os.path.exists('/etc/passwd'))"),
    ("python", "import subprocess; subprocess.run(['sh'])"),
]


async def run(engine: Engine, guests: str, language: str, code: str) -> str:
    """What to tell the one who sent it."""
    async with engine.create(isolation="wasm", rootfs=guests, resources=LIMITS) as sandbox:
        try:
            done = await sandbox.run([*COMMANDS[language], code], timeout=2.0, max_output=10_000)
        except DeadlineExceededError:
            return "stopped: it took longer than two seconds"
    if done.exit.reason == "oom":
        return "stopped: it needed more memory than it may have"
    if done.exit.reason == "cpu":
        return "stopped: it used too much processor time"
    if done.exit_code != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return " ".join([f"failed with {done.exit_code}", *last])
    return done.text.strip()


async def main(guests: str) -> None:
    async with Engine.open() as engine:
        for command in COMMANDS.values():
            # Compiled now, and not in the time of the first snippet.
            await engine.prefetch(command[0], isolation="wasm", rootfs=guests)
        for language, code in SNIPPETS:
            print(f"{language:10} {code[:50]!r:54} -> {await run(engine, guests, language, code)}")


def guests() -> str:
    """A directory with the two languages."""
    if len(sys.argv) > 1:
        return sys.argv[1]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "unisandbox" / "wasm-guests"
    fetch = Path(__file__).resolve().parent.parent / "tools" / "wasm_guests.py"
    subprocess.run([sys.executable, str(fetch), str(directory)], check=True, stdout=subprocess.DEVNULL)
    return str(directory)


asyncio.run(main(guests()))
