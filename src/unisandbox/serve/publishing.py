"""Events on their way to containerd: a bounded queue, sent in order, and sent again while containerd is away.

Source: containerd, api/services/ttrpc/events/v1/events.proto, and pkg/shim/publisher.go for what shims do.
"""

from __future__ import annotations

import datetime
import logging
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import anyio
from betterproto2 import Message

from unisandbox.api import DeadlineExceededError, SandboxError, UnavailableError
from unisandbox.api.proto.containerd.services.events.ttrpc.v1 import ForwardRequest
from unisandbox.api.proto.containerd.types import Envelope
from unisandbox.api.proto.google.protobuf import Any as AnyMessage
from unisandbox.api.proto.methods import EventsV1
from unisandbox.wire import codec, remote
from unisandbox.wire.ttrpc import Client

_logger: Final = logging.getLogger("unisandbox.serve")

_MOST_WAITING: Final = 2048  # as many as a shim keeps
_ANSWER_SECONDS: Final = 5.0
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 4.0


class _Waiting(NamedTuple):
    envelope: Envelope
    then: Callable[[], None]


class Publisher:
    """Sends events to one containerd.

    Args:
        address: of its socket for ttrpc; empty: nobody wants to know, and nothing is kept.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._waiting: deque[_Waiting] = deque()
        self._some = anyio.Event()
        self._lost = 0

    @property
    def wanted(self) -> bool:
        """Whether somebody wants to know."""
        return bool(self._address)

    def publish(self, namespace: str, topic: str, event: Message, then: Callable[[], None] = lambda: None) -> None:
        """Let it be sent; never waits. When containerd is away for long the oldest ones are lost.

        Args:
            namespace: containerd's; events of who says none (iSulad) are for nobody.
            topic: as "/tasks/exit".
            event: a message of `containerd.events`.
            then: called once containerd has it.
        """
        if not (self.wanted and namespace):
            return
        kind = f"containerd.events.{type(event).__name__.replace('Oom', 'OOM')}"
        envelope = Envelope(
            timestamp=datetime.datetime.now(tz=datetime.UTC),
            namespace=namespace,
            topic=topic,
            event=AnyMessage(type_url=kind, value=codec.encode(event)),
        )
        self._waiting.append(_Waiting(envelope, then))
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._some.set()

    async def run(self) -> None:
        """Send what there is, until cancelled."""
        client: Client | None = None
        pause = 0.0
        try:
            while True:
                while not self._waiting:
                    self._some = anyio.Event()
                    await self._some.wait()
                is_new = client is None
                try:
                    client = client or await Client.connect(self._address)
                    await self._send(client)
                    pause = 0.0
                except (UnavailableError, DeadlineExceededError) as error:
                    if client is not None:
                        client.close()
                        client = None
                    # The end of an old connection is learnt by using it.
                    if is_new:
                        if not pause:
                            _logger.warning("events wait for containerd: %s", error)
                        pause = min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)
                        await anyio.sleep(pause)
        finally:
            if client is not None:
                client.close()

    async def _send(self, client: Client) -> None:
        first = self._waiting[0]
        envelope = first.envelope
        try:
            await remote.call(
                client,
                EventsV1.FORWARD,
                ForwardRequest(envelope=envelope),
                namespace=envelope.namespace,
                timeout=_ANSWER_SECONDS,
            )
        except (UnavailableError, DeadlineExceededError):
            raise
        except SandboxError as error:
            _logger.error("containerd does not take an event of %s: %s", envelope.topic, error)
        else:
            first.then()
        if self._waiting and self._waiting[0] is first:  # else it was the oldest of too many
            self._waiting.popleft()
        if self._lost:
            _logger.warning("%d events were lost while containerd was away", self._lost)
            self._lost = 0
