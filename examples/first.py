"""The shortest useful program: run something in a sandbox of its own, with limits."""

import asyncio

from unisandbox import Resources, Sandbox


async def main() -> None:
    async with Sandbox.create(resources=Resources(memory="256M", pids=64)) as sandbox:
        done = await sandbox.run(["python3", "-c", "print(6 * 7)"], timeout=30, check=True)
        print(f"{done.text.strip()}, in {done.duration * 1000:.0f} ms; the sandbox was a {sandbox.backend} one")


asyncio.run(main())
