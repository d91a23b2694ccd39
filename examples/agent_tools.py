"""Tools for a program that writes programs: run untrusted snippets, keep their files, bound what they may use.

The snippets here stand for what a language model or a stranger would send.
"""

import asyncio

from unisandbox import DeadlineExceededError, Resources, Sandbox

SNIPPETS = {
    "makes a file": "with open('squares.csv', 'w') as f: f.writelines(f'{n},{n * n}\\n' for n in range(9))",
    "reads it back": "print(sum(int(line.split(',')[1]) for line in open('squares.csv')))",
    "has a mistake": "print(undefined)",
    "never ends": "while True: pass",
    "wants all memory": "data = bytearray(1 << 30)",
    "looks for secrets": "import glob, os\nprint(glob.glob('/root/.ssh/*'), [k for k in os.environ if 'KEY' in k])",
    "calls home": "import urllib.request\nurllib.request.urlopen('http://192.0.2.1/', timeout=1)",
}


async def run_snippet(sandbox: Sandbox, code: str) -> str:
    """What to tell the one who sent it: its output, or in what way it failed."""
    try:
        done = await sandbox.run(["python3", "-"], input=code, cwd="/tmp", timeout=1.0, max_output=10_000)
    except DeadlineExceededError:
        return "stopped: it took longer than a second"
    if done.exit.reason == "oom":
        return "stopped: it needed more memory than it may have"
    if done.exit_code != 0:
        return f"failed: {done.stderr.decode(errors='replace').splitlines()[-1]}"
    return done.text.strip() or "ok, no output"


async def main() -> None:
    limits = Resources(memory="128M", cpu=1, pids=32, disk="16M")
    async with Sandbox.create(resources=limits, user=1000) as sandbox:
        for what, code in SNIPPETS.items():
            print(f"{what:18} -> {await run_snippet(sandbox, code)}")
        files = [file.name for file in await sandbox.files.list("/tmp")]
        print(f"it leaves {files}: {len(await sandbox.files.read('/tmp/squares.csv'))} bytes, read from outside")


asyncio.run(main())
