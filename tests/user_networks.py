"""Host programs with sandboxes whose network is in user mode."""

from __future__ import annotations

import select
import textwrap
from typing import Any

from tests.outside import World
from tests.programs import program

# What programs inside do; with it they say one thing each.
INSIDE = """
import socket
def tcp(address, port=7000, device=""):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as s:
        s.settimeout(10 if not device else 0.2)
        try:
            if device:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            s.connect((address, port))
            return s.recv(100).decode()
        except OSError as error:
            return type(error).__name__
def udp(address, said, port=7000, device=""):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(10 if not device else 0.2)
        try:
            if device:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            s.sendto(said.encode(), (address, port))
            return s.recv(100).decode()
        except OSError as error:
            return type(error).__name__
"""
HELPERS = f"""
from pathlib import Path
from unisandbox import Dns, UnsupportedError, UnavailableError
INSIDE = {INSIDE!r}
async def inside(sandbox, code):
    done = await sandbox.run(["python3", "-c", INSIDE + code], timeout=60)
    assert done.exit_code == 0, done.stderr
    return done.text.strip()
def helpers():
    found = {{}}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, stat = (path / "cmdline").read_bytes().split(b"\\0"), (path / "stat").read_text()
            is_ours = f"\\nUid:\\t{{os.getuid()}}\\t" in (path / "status").read_text()  # other users have tests, too
        except OSError:
            continue
        if is_ours and words[0].endswith(b"/pasta"):
            found[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
    # It clones itself now and then to do something in the other namespace.
    return sorted(pid for pid, parent in found.items() if parent not in found)
"""
# A tun device that everybody may open, as udev makes it; in the program's own mount namespace.
TUN = "mount -t tmpfs -o mode=755 none /dev/net && mknod -m 666 /dev/net/tun c 10 200\n"


def main(body: str) -> str:
    """A host program from the body of its main function."""
    return f"{HELPERS}\nasync def main():\n{textwrap.indent(textwrap.dedent(body), '    ')}\nanyio.run(main)\n"


def told(around: World, body: str, *arguments: str) -> dict[str, Any]:
    """All that a host program on this host tells."""
    words: dict[str, Any] = {}
    with program(main(body), *arguments, wrapper=around.enter) as host:
        while "done" not in words:
            words |= host.heard()
        assert host.finish()[0] == 0
    return words


ONE = """
async with Engine.open() as engine, engine.create(network="user") as sandbox:
    {}
tell(done=True, left=helpers())
"""


def one(around: World, *lines: str) -> dict[str, Any]:
    """What is told by a program with one sandbox."""
    return told(around, ONE.format("\n    ".join(lines)))


# A socket that is bound to the interface sends there what is for a loopback; pasta of 2023 takes that for the host's.
ATTACK = """
for address in ("127.0.0.1", "127.0.0.9", "::1", "::ffff:127.0.0.1", "0.0.0.0", "10.0.2.1", "10.0.2.5", "10.0.2.6"):
    for device in ("eth0", "lo"):
        udp(address, "attack", device=device)
        tcp(address, device=device)
"""


def ended(pidfd: int, seconds: float = 20.0) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])
