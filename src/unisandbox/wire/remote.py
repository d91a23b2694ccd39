"""Calls of other people's services with messages instead of bytes, over a ttrpc connection."""

from __future__ import annotations

from typing import TypeVar

from betterproto2 import Message

from unisandbox.api.errors import BackendError, InvalidArgumentError
from unisandbox.api.rpc import Method
from unisandbox.wire import codec
from unisandbox.wire.services import NAMESPACE_KEYS
from unisandbox.wire.ttrpc import NO_METADATA, Client

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


async def call(
    client: Client, method: Method[Q, R], request: Q, *, namespace: str = "", timeout: float | None = None
) -> R:
    """Call a method that has one message each way.

    Args:
        client: the connection.
        method: what to call.
        request: its message.
        namespace: containerd's, if the service wants one.
        timeout: seconds after which nobody waits any more; None: for ever.

    Raises:
        DeadlineExceededError: there was no answer in time.
        UnavailableError: the connection has ended.
        BackendError: the answer is no valid message.
        SandboxError: the server's status, as the error that means it; a StatusError where none does.
    """
    metadata = {NAMESPACE_KEYS[0]: (namespace,)} if namespace else NO_METADATA
    payload = codec.encode(request)
    answer = await client.call(method.service, method.name, payload, metadata=metadata, timeout=timeout)
    try:
        return codec.decode(method.reply, answer)
    except InvalidArgumentError as error:
        raise BackendError(f"the answer of {method} is damaged: {error}") from error
