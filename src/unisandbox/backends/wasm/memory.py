"""Linear memories of guests: made, grown and counted by us, through wasmtime's host memory creator.

`memory.grow` asks a function of ours, in the guest's own thread. So the sum over a sandbox is exact at every moment,
a refused growth is known and not guessed, and our own calls know where a memory is without asking wasmtime. Heaps of
the GC proposal come through here too. Memories are anonymous mappings that grow in place or move (mremap), without
a reservation of addresses; with `trust_signals` the Engine asks for one, and they grow inside it (mprotect).
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import wasmtime
from wasmtime import _ffi as ffi

from unisandbox.backends.wasm.budget import Budget

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAP_NORESERVE: Final = 0x4000  # linux/mman.h; the mmap module has it from Python 3.13 on
_MREMAP_MAYMOVE: Final = 1
_PROT_NONE: Final = 0
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_PAGE: Final = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class MemoryRefusedError(Exception):
    """There is not so much left, of the sandbox's budget or of the host's memory."""


class LinearMemory:
    """One mapping.

    Args:
        size: bytes at first.
        reserved: bytes that the code trusts to be at this address for ever; 0: it may move.
        guard: bytes behind that must fault.
        budget: what it is counted in; None: nothing.
    """

    __slots__ = ("_budget", "_fixed", "_mapped", "_reserved", "_view", "base", "size")

    def __init__(self, size: int, reserved: int, guard: int, budget: Budget | None) -> None:
        self._budget = budget
        self._fixed = reserved > 0 or guard > 0
        self._view: memoryview | None = None
        self._reserved = reserved
        self.size: int = size
        if budget is not None and not budget.take(size):
            raise MemoryRefusedError
        self._mapped = max(_pages(max(size, reserved)) + _pages(guard), _PAGE)
        protection = _PROT_NONE if self._fixed else mmap.PROT_READ | mmap.PROT_WRITE
        base = _libc.mmap(None, self._mapped, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
        if base == _MAP_FAILED:
            self._give_back(size)
            raise MemoryRefusedError
        self.base: int = base
        if self._fixed and size and not self._open(size):
            _libc.munmap(self.base, self._mapped)
            self._give_back(size)
            raise MemoryRefusedError

    def grow(self, size: int) -> None:
        """Make it `size` bytes large."""
        more = size - self.size
        if self._budget is not None and not self._budget.take(more):
            raise MemoryRefusedError
        if not (self._open(size) if self._fixed else self._remap(size)):
            self._give_back(more)
            raise MemoryRefusedError
        self._view = None
        self.size = size

    def close(self) -> None:
        """Unmap it; its store is gone."""
        self._view = None
        _libc.munmap(self.base, self._mapped)
        self._give_back(self.size)

    @property
    def capacity(self) -> int:
        """Up to what size it stays where it is; wasmtime does not even ask a memory that must not move for more."""
        return max(self._reserved, self.size)

    @property
    def view(self) -> memoryview:
        """Its bytes now; only for the guest's own thread, only until it returns into the guest."""
        if self._view is None:
            self._view = memoryview((ctypes.c_char * self.size).from_address(self.base)).cast("B")
        return self._view

    def _open(self, size: int) -> bool:
        return size <= self._mapped and not _libc.mprotect(self.base, _pages(size), mmap.PROT_READ | mmap.PROT_WRITE)

    def _remap(self, size: int) -> bool:
        mapped = max(_pages(size), _PAGE)
        base = _libc.mremap(self.base, self._mapped, mapped, _MREMAP_MAYMOVE)
        if base == _MAP_FAILED:
            return False
        self.base, self._mapped = base, mapped
        return True

    def _give_back(self, size: int) -> None:
        if self._budget is not None:
            self._budget.give_back(size)


class MemoryOwner:
    """The memories of one guest, and what is known of its requests.

    Args:
        budget: what its memories are counted in.
    """

    __slots__ = ("_memories", "budget", "refused")

    def __init__(self, budget: Budget | None) -> None:
        self.budget: Budget | None = budget
        self.refused: bool = False
        """Its last request for memory was refused."""
        self._memories: list[LinearMemory] = []

    @property
    def size(self) -> int:
        """Bytes of all its memories."""
        return sum(memory.size for memory in tuple(self._memories))

    def add(self, memory: LinearMemory) -> None:
        """The guest has one more."""
        self._memories.append(memory)

    def discard(self, memory: LinearMemory) -> None:
        """One of them is gone."""
        self._memories.remove(memory)

    def at(self, base: int) -> LinearMemory | None:
        """The one that is mapped at `base`."""
        return next((memory for memory in self._memories if memory.base == base), None)

    @property
    def memories(self) -> Iterable[LinearMemory]:
        return tuple(self._memories)


# By the number that wasmtime hands back to us; every entry goes with its store.
_memories: dict[int, tuple[LinearMemory, MemoryOwner]] = {}
_numbers = itertools.count(1)
_owner_of_thread: Callable[[], MemoryOwner | None] | None = None


def owned_by(owner_of_thread: Callable[[], MemoryOwner | None]) -> None:
    """Say who the memories that are made in a thread belong to."""
    global _owner_of_thread  # noqa: PLW0603
    _owner_of_thread = owner_of_thread


def create_memories_for(config: wasmtime.Config) -> None:
    """Let the Engine of this configuration make its memories here."""
    creator = ffi.wasmtime_memory_creator_t()
    creator.new_memory = _new_memory  # type: ignore[assignment]
    ffi.wasmtime_config_host_memory_creator_set(config.ptr(), ctypes.byref(creator))


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _refusal(what: str) -> int:
    return ctypes.cast(ffi.wasmtime_error_new(what.encode()), ctypes.c_void_p).value or 0


# None of these ever raises: an exception in a ctypes callback would be printed and forgotten.


@ffi.wasmtime_new_memory_callback_t  # type: ignore[untyped-decorator]
def _new_memory(_env: Any, _type: Any, minimum: int, _maximum: int, reserved: int, guard: int, result: Any) -> int:
    try:
        owner = None if _owner_of_thread is None else _owner_of_thread()
        if owner is None:
            return _refusal("a memory outside of any guest")
        try:
            memory = LinearMemory(minimum, reserved, guard, owner.budget)
        except MemoryRefusedError:
            owner.refused = True
            return _refusal(f"no {minimum} bytes of memory are left")
        number = next(_numbers)
        _memories[number] = memory, owner
        owner.add(memory)
        made = result[0]
        made.env = number
        made.get_memory = _get_memory
        made.grow_memory = _grow_memory
        made.finalizer = _drop_memory
    except BaseException as error:
        return _refusal(f"cannot make a memory: {error!r}")
    return 0


@ffi.wasmtime_memory_get_callback_t  # type: ignore[untyped-decorator]
def _get_memory(number: int, size: Any, capacity: Any) -> int:
    memory = _memories[number][0]
    size[0] = memory.size
    capacity[0] = memory.capacity
    return memory.base


@ffi.wasmtime_memory_grow_callback_t  # type: ignore[untyped-decorator]
def _grow_memory(number: int, size: int) -> int:
    try:
        memory, owner = _memories[number]
        try:
            memory.grow(size)
        except MemoryRefusedError:
            owner.refused = True
            return _refusal(f"no {size} bytes of memory are left")
        owner.refused = False
    except BaseException as error:
        return _refusal(f"cannot grow a memory: {error!r}")
    return 0


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # type: ignore[untyped-decorator]
def _drop_memory(number: int) -> None:
    memory, owner = _memories.pop(number)
    owner.discard(memory)
    memory.close()
