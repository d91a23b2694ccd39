"""The container of an inner sandbox in which the workers of one of ours are, with the files that its guests see."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import anyio

from unisandbox.api import ContainerSpec, CreateTask, Mount, Stdio, SupportsUpdate, TaskService, UnsupportedError
from unisandbox.backends.wasm.checks import check_container
from unisandbox.backends.wasm.given import container_of
from unisandbox.backends.wasm.process.bundles import Bundle, bundle_of
from unisandbox.backends.wasm.process.capabilities import NAME
from unisandbox.backends.wasm.process.interior import GUEST
from unisandbox.backends.wasm.process.workers import Workplace

_CLEANING_SECONDS: Final = 10.0


def asked_for(request: CreateTask, user_ids: tuple[int, int] | None) -> tuple[ContainerSpec, Bundle | None]:
    """What a container shall be, checked, and the bundle if it is made of one.

    Args:
        request: says it.
        user_ids: of its sandbox; see `bundle_of`.
    """
    if request.config:
        bundle = bundle_of(request, user_ids)
        return bundle.container, bundle
    container = container_of(request, NAME)
    check_container(container, NAME)
    if container.rootfs is not None or container.mounts or request.rootfs:
        raise UnsupportedError("a container with files of its own", NAME, hint="Use a sandbox for each.")
    return container, None


async def make_inner(
    place: Workplace,
    container: ContainerSpec,
    main: tuple[int, int] | None,
    root_fd: Callable[[], int],
    bundle: Bundle | None,
) -> None:
    """Make it.

    Args:
        place: of its sandbox.
        container: as our sandbox knows it.
        main: standard input, closed afterwards, and error of the worker that is its main process; None: it has none.
        root_fd: a descriptor of the sandbox's root, which its guests see unless there is a bundle.
        bundle: what it is made of.
    """
    fds = [] if main is None else [main[0]]
    try:
        if bundle is None:
            fds.append(root_fd())
            mounts = [Mount.bind(f"/proc/self/fd/{fds[-1]}", GUEST, readonly=False, idmap=False)]
        else:
            mounts = []
        inner = ContainerSpec(
            container.name,
            process=None if main is None else place.spec,
            rootfs=place.interior.rootfs,
            mounts=(*mounts, *place.interior.mounts),
            own_mounts_only=True,
            user=None if bundle is None else container.user,
        )
        request = CreateTask(
            container.name,
            container=inner,
            stdio=Stdio() if main is None else Stdio(main[0], None, main[1]),
            rootfs=() if bundle is None else (*bundle.rootfs, *bundle.mounts),
            rootfs_at="" if bundle is None else GUEST,
        )
        await place.inner.create(request)
    finally:
        for fd in fds:
            os.close(fd)
    if bundle is not None and bundle.limits:
        try:
            await set_limits(place.inner, container.name, bundle.limits)
        except BaseException:
            place.inner.kill_now(container.name)
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEANING_SECONDS):
                await place.inner.delete(container.name)
            raise


async def set_limits(inner: TaskService, container: str, limits: str) -> None:
    """Set limits of one container; they hold for its workers and their guests together.

    Args:
        inner: drives the containers of the inner sandbox.
        container: which.
        limits: the text of an OCI object `linux.resources`; empty: nothing changes.
    """
    if not isinstance(inner, SupportsUpdate):
        raise UnsupportedError("resources of one container", NAME)
    if limits:
        await inner.update(container, limits)
