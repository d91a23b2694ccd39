"""The containers of one sandbox by name, in either mode, and how the processes of those that are gone ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

from unisandbox.api import AlreadyExistsError, ContainerSpec, Exit, NotFoundError
from unisandbox.backends.wasm.given import ended_before_start
from unisandbox.host.latest import EXITS_KEPT, Latest

P_co = TypeVar("P_co", covariant=True)


class Container(Protocol[P_co]):
    """What both modes know of one."""

    @property
    def spec(self) -> ContainerSpec: ...

    @property
    def processes(self) -> Mapping[str, P_co]:
        """By exec id; the main one has none."""
        ...


C = TypeVar("C", bound=Container[object])


class Containers(Generic[C]):
    """The containers of one sandbox, and how the processes of those that are gone ended.

    Args:
        label: of the sandbox.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._there: dict[str, C] = {}
        self._exits: Latest[tuple[str, str], Exit] = Latest(EXITS_KEPT)

    @property
    def ids(self) -> list[str]:
        """The oldest first."""
        return list(self._there)

    @property
    def all(self) -> list[C]:
        """The oldest first."""
        return list(self._there.values())

    def add(self, container: C) -> None:
        """Raises AlreadyExistsError: there is one of its name."""
        name = container.spec.name
        if name in self._there:
            raise AlreadyExistsError(f"sandbox {self._label!r} has a container {name!r} already")
        self._there[name] = container
        self._exits.pop((name, ""), None)

    def discard(self, container: C) -> bool:
        """It is gone; False when it was not there any more."""
        if not self.has(container):
            return False
        del self._there[container.spec.name]
        return True

    def has(self, container: C) -> bool:
        """Whether this very one is there."""
        return self._there.get(container.spec.name) is container

    def find(self, container_id: str) -> C | None:
        """The one of this name."""
        return self._there.get(container_id)

    def get(self, container_id: str) -> C:
        """The same; raises NotFoundError."""
        container = self._there.get(container_id)
        if container is None:
            raise NotFoundError(f"sandbox {self._label!r} has no container {container_id!r}")
        return container

    def process(self, container: Container[P_co], exec_id: str) -> P_co:
        """A process of a container; raises NotFoundError."""
        process = container.processes.get(exec_id)
        if process is None:
            raise NotFoundError(
                f"container {container.spec.name!r} of sandbox {self._label!r} has no process {exec_id!r}"
            )
        return process

    def expect(self, container: C, exec_id: str) -> None:
        """It is about to have a process of this id; the end of one in an earlier container is forgotten.

        Raises:
            AlreadyExistsError: it has one.
        """
        if exec_id in container.processes:
            raise AlreadyExistsError(f"container {container.spec.name!r} has a process {exec_id!r} already")
        self._exits.pop((container.spec.name, exec_id), None)

    def check_startable(self, container: C, exec_id: str, *, killed: bool) -> None:
        """Raises FailedPreconditionError: the process, or its container, was ended before it could be started."""
        if killed or not self.has(container):
            raise ended_before_start(container.spec.name, exec_id)

    def keep_exit(self, container_id: str, exec_id: str, exit: Exit) -> None:
        """How a process ended whose container is gone; the last `EXITS_KEPT` are known."""
        self._exits[container_id, exec_id] = exit

    def exit_of_gone(self, container_id: str, exec_id: str) -> Exit | None:
        """What was kept."""
        return self._exits.get((container_id, exec_id))

    def forget_exit(self, container_id: str, exec_id: str) -> Exit | None:
        """The same, for the last time."""
        return self._exits.pop((container_id, exec_id), None)

    def clear(self) -> None:
        """Forget the containers."""
        self._there.clear()
