"""A service of systemd's that has a sandbox in which a job runs; its unit is worker.service, see docs/systemd.md.

With the policy "keep" the job goes on while the service is restarted, and the next run has it as this one had it. With
"stop" it ends with the service.
"""

import os
import signal
import socket
import sys
from functools import partial

import anyio

from unisandbox import Engine, NotFoundError

JOB = ["sh", "-c", "while read order; do echo $order is done; done; exit 7"]


def ready(words: str) -> None:
    """Tell systemd that the service has started (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(f"READY=1\nSTATUS={words}".encode(), address.replace("@", "\0", 1))


async def main(*, keep: bool) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with Engine.open(os.environ["STATE_DIRECTORY"], policy="keep" if keep else "stop") as engine:
            try:
                sandbox = await engine.get("work")
            except NotFoundError:
                sandbox = await engine.create(name="work")
            job, *_ = await sandbox.processes() or [await sandbox.exec(JOB, stdin="pipe")]
            ready(f"job {job.id}, process {job.pid}")
            async for _ in signals:
                break
        print("left in good order", flush=True)


anyio.run(partial(main, keep=sys.argv[1:] == ["keep"]))
