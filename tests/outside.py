"""A host with a world around it, for tests of networks: two network namespaces and the cable between them.

What the host program runs in is the "host", with a default route; "outside" has servers that tell whom they see (7000)
or give back what they got (7002: a line with its length comes first), and a name server.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HOST, OUTSIDE = "198.51.100.1", "198.51.100.2"
PORT, NAMED = 7000, "203.0.113.7"

# Says "ready", and then each connection and packet that comes: protocol, own address, what was said.
_SERVER = """
import json, selectors, socket, sys
sockets = selectors.DefaultSelector()
for address in sys.argv[1].split(","):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for port in (7000, 7002, 53):
            server = socket.socket(family, kind)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((address, port))
            if kind == socket.SOCK_STREAM:
                server.listen()
            sockets.register(server, selectors.EVENT_READ, (kind, address, port))
def tell(*words):
    print(json.dumps(words), flush=True)
def named(query):
    # A name that was asked for has one address: header, the question again, a pointer to it, A IN, a minute.
    question = query[12:query.index(b"\\0", 12) + 5]
    known = question[-4:-2] == b"\\0\\1"
    answer = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\x3c\\0\\4" + socket.inet_aton(sys.argv[2])
    return query[:2] + b"\\x81\\x80\\0\\1\\0" + (b"\\1" if known else b"\\0") + bytes(4) + question + answer * known
tell("ready")
while True:
    for key, _ in sockets.select():
        kind, address, port = key.data
        if kind == socket.SOCK_STREAM:
            client, _ = key.fileobj.accept()
            tell("tcp", address, "")
            if port == 7002:
                with client.makefile("rb") as stream:
                    client.sendall(stream.read(int(stream.readline())))
            else:
                client.sendall(b"seen " + client.getpeername()[0].encode())
            client.close()
        else:
            said, sender = key.fileobj.recvfrom(2000)
            tell("udp", address, said.decode(errors="replace") if port == 7000 else "query")
            key.fileobj.sendto(b"seen " + said if port == 7000 else named(said), sender)
"""


class World:
    """See the module's text.

    Attributes:
        host, outside: a process in each of the two.
        resolv_conf: the host's /etc/resolv.conf, which names the outside's name server.
        enter: a command that runs the rest on the "host".
    """

    def __init__(self, host: int, outside: int, resolv_conf: Path) -> None:
        self.host, self.outside, self.resolv_conf = host, outside, resolv_conf
        script = f'mount --bind {resolv_conf} /etc/resolv.conf && exec "$@"'
        self.enter = [*_inside(host), "unshare", "--mount", "sh", "-c", script, "sh"]

    @contextmanager
    def server(self, where: int, addresses: str) -> Iterator[Server]:
        """A server of TCP and UDP at these addresses, in one of the two."""
        argv = [*_inside(where), sys.executable, "-c", _SERVER, addresses, NAMED]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            try:
                server = Server(process)
                assert server.heard() == ["ready"]
                yield server
            finally:
                process.kill()

    def run(self, where: int, code: str) -> str:
        """What a Python program prints, run in one of the two."""
        argv = [*_inside(where), sys.executable, "-c", f"import socket\n{code}"]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


class Server:
    """One that runs."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._said = process.stdout
        os.set_blocking(self._said.fileno(), True)

    def heard(self, seconds: float = 30.0) -> Any:
        """The next that it has seen."""
        assert select.select([self._said], [], [], seconds)[0], "nothing has come"
        return json.loads(self._said.readline())


def _inside(pid: int) -> list[str]:
    return ["nsenter", f"--net=/proc/{pid}/ns/net", "--"]


@contextmanager
def world(*, way_out: bool = True) -> Iterator[World]:
    """One for a test; it is gone afterwards."""
    with ExitStack() as stack:
        host, outside = (stack.enter_context(_namespace()) for _ in range(2))
        _ip(host, "link add host0 type veth peer name out0")
        _ip(host, f"link set out0 netns /proc/{outside}/ns/net")
        for pid, name, address in ((host, "host0", HOST), (outside, "out0", OUTSIDE)):
            _ip(pid, f"addr add {address}/24 dev {name}")
            _ip(pid, f"link set {name} up")
        if way_out:
            _ip(host, f"route add default via {OUTSIDE}")
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="world-"))
        resolv_conf = Path(directory, "resolv.conf")
        resolv_conf.write_text(f"nameserver {OUTSIDE}\n")
        os.chmod(directory, 0o755)
        yield World(host, outside, resolv_conf)


@contextmanager
def _namespace() -> Iterator[int]:
    argv = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo made && exec sleep 600"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"made\n"
            yield process.pid
        finally:
            process.kill()


def _ip(pid: int, words: str) -> None:
    subprocess.run([*_inside(pid), "ip", *words.split()], check=True)
