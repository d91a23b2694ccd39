"""Events on their way to containerd: kept up to a bound, sent in order, and sent again while containerd is away.

Each pod has a bound of its own, and when there are too many of all it is the pod with the most that loses some: one in
which a lot happens takes no other pod's place.

Source: containerd, api/services/ttrpc/events/v1/events.proto, and pkg/shim/publisher.go for what shims do.
"""

from __future__ import annotations

import datetime
import logging
from collections import Counter, OrderedDict, deque
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

_MOST_OF_POD: Final = 256
_MOST_WAITING: Final = 2048  # of all pods: as many as one shim keeps
_ANSWER_SECONDS: Final = 5.0
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 4.0


class _Waiting(NamedTuple):
    pod: str
    envelope: Envelope
    then: Callable[[], None]


class Publisher:
    """Sends events to one containerd.

    Args:
        address: of its socket for ttrpc; empty: nobody wants to know, and nothing is kept.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        # In order, by numbers that are never used again; and those of each pod that has some.
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()
        self._of_pods: dict[str, deque[int]] = {}
        self._number = 0
        self._sending: _Waiting | None = None
        self._some = anyio.Event()
        self._lost: Counter[str] = Counter()

    @property
    def wanted(self) -> bool:
        """Whether somebody wants to know."""
        return bool(self._address)

    def publish(
        self, pod: str, namespace: str, topic: str, event: Message, then: Callable[[], None] = lambda: None
    ) -> None:
        """Let it be sent; never waits. When containerd is away for long the oldest ones of a pod are lost.

        Args:
            pod: whose it is.
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
        self._number += 1
        self._waiting[self._number] = _Waiting(pod, envelope, then)
        self._of_pods.setdefault(pod, deque()).append(self._number)
        if len(self._of_pods[pod]) > _MOST_OF_POD:
            self._lose(pod)
        elif len(self._waiting) > _MOST_WAITING:
            self._lose(max(self._of_pods, key=lambda name: len(self._of_pods[name])))
        self._some.set()

    def _lose(self, pod: str) -> None:
        self._take(self._of_pods[pod][0])
        self._lost[pod] += 1

    def _take(self, number: int) -> _Waiting:
        """Take one out that is the first of its pod."""
        taken = self._waiting.pop(number)
        numbers = self._of_pods[taken.pod]
        numbers.popleft()
        if not numbers:
            del self._of_pods[taken.pod]
        return taken

    async def run(self) -> None:
        """Send what there is, until cancelled."""
        client: Client | None = None
        pause = 0.0
        try:
            while True:
                while not self._waiting and self._sending is None:
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
            self._tell_lost()

    async def _send(self, client: Client) -> None:
        if self._sending is None:
            self._sending = self._take(next(iter(self._waiting)))
        envelope = self._sending.envelope
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
            self._sending.then()
        self._sending = None
        self._tell_lost()

    def _tell_lost(self) -> None:
        for pod, count in self._lost.items():
            _logger.warning("%d events of pod %s were lost while containerd was away", count, pod)
        self._lost.clear()
