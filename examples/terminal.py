"""A program with a terminal: type into it, look at what it shows, change the size of its window."""

import asyncio

from unisandbox import Process, Sandbox, Terminal


async def see(process: Process, wanted: str) -> str:
    """What the terminal shows, up to `wanted`."""
    shown = ""
    while wanted not in shown:
        shown += (await process.stdout.receive()).decode(errors="replace")
    return shown


async def main() -> None:
    async with Sandbox.create() as sandbox:
        shell = sandbox.exec(["sh"], tty=Terminal(rows=25, columns=80), env={"PS1": "$ ", "TERM": "dumb"})
        async with shell as process:
            await see(process, "$ ")
            print("window: ", end="")
            await process.stdin.send(b"stty size\r")
            print((await see(process, "$ ")).splitlines()[1])

            await process.resize(rows=50, columns=132)
            print("resized: ", end="")
            await process.stdin.send(b"stty size\r")
            print((await see(process, "$ ")).splitlines()[1])

            await process.stdin.send(b"sh -c 'echo asl''eep; exec sleep 1000'\r")
            await see(process, "asleep")
            await process.stdin.send(b"\x03")  # Ctrl-C ends the sleep, not the shell
            await see(process, "$ ")
            await process.stdin.send(b"exit 4\r")
            print(f"the shell ended with code {(await process.wait()).code}")


asyncio.run(main())
