"""Who works with the files of a sandbox: this process, from its root on, or the engine's clerk in its place."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar, cast

from unisandbox.api import FileInfo, NotFoundError, UnavailableError
from unisandbox.engine.entry import Entry
from unisandbox.host.identity import Identity
from unisandbox.sandbox import inside
from unisandbox.sandbox.arguments import check_mode, content_of, local_path
from unisandbox.sandbox.inside import Root, named

if TYPE_CHECKING:
    from unisandbox.engine.clerk import Clerk
    from unisandbox.sandbox.files import Files

_P = ParamSpec("_P")
_T = TypeVar("_T")

METHODS: Final = frozenset(
    {"read", "write", "list", "stat", "exists", "mkdir", "remove", "rename", "upload", "download"}
)
"""Those of `Files` that a clerk does; see `engine.clerk`."""


@contextmanager
def root_of(entry: Entry) -> Iterator[Root]:
    """The root of a sandbox, while the block lasts.

    Raises:
        NotFoundError: it is gone.
        UnavailableError: its keeper has ended, or this process has too many open files.
    """
    try:
        fd = entry.sandboxer.root_fd(entry.sandbox_id)
    except (OSError, NotFoundError) as error:
        if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
            raise inside.translate(error, "/") from error
        entry.check_there()
        if isinstance(error, NotFoundError):
            raise
        if isinstance(error, FileNotFoundError):
            # A keeper that lives has let go of it: it is being freed, by its ttl or by another process.
            raise entry.gone() from error
        raise UnavailableError(f"the files of sandbox {entry.label!r} cannot be reached: {error}") from error
    try:
        first, count = entry.sandboxer.host_ids(entry.sandbox_id)
        bounds = entry.bounds
        if bounds is None:
            yield Root(fd, Identity(first, count, entry.spec.security.capabilities))
        else:
            yield Root(fd, Identity(first, count, None, (os.geteuid(), os.getegid())), bounds)
    finally:
        os.close(fd)


def where_it_may_be_done(
    method: Callable[Concatenate[Files, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[Files, _P], Coroutine[Any, Any, _T]]:
    """Let the engine's clerk do it where this process has no power over what belongs to a sandbox's users."""
    code = method.__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]

    @functools.wraps(method)
    async def done(self: Files, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        clerk = self._entry.clerk
        if clerk is None or len(args) >= code.co_argcount or not kwargs.keys() <= set(names):
            return await method(self, *args, **kwargs)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        return cast("_T", await _by_clerk(self._entry, clerk, method.__name__, arguments))

    return done


async def _by_clerk(entry: Entry, clerk: Clerk, method: str, arguments: dict[str, Any]) -> object:
    await entry.sharing.reach()
    check_mode(arguments.get("mode"))
    for name in ("path", "source", "target"):
        if name in arguments:
            inside.absolute(arguments[name])
    content = None
    if "data" in arguments:
        content = content_of(arguments["path"], arguments.pop("data"))
    if "local" in arguments:
        local = arguments["local"] = local_path(arguments["local"])
        if not os.path.isabs(local):
            with named(local, "host"):  # the clerk has another working directory, and ours may be gone
                arguments["local"] = os.path.join(os.getcwd(), local)
    with root_of(entry) as root:
        asked = clerk.call(
            method,
            root.fd,
            arguments,
            capabilities=entry.spec.security.capabilities,
            label=entry.label,
            content=content,
        )
        try:
            value = await asked
        except UnavailableError:
            entry.check_there()
            raise
    if method == "list":
        return [FileInfo(**info) for info in cast("list[dict[str, Any]]", value)]
    return FileInfo(**value) if isinstance(value, dict) else value
