"""What a backend can do, as data, and whether it can do it on this host."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from unisandbox.api.by_fields import by_fields


@attrs.frozen
@by_fields
class Capabilities:
    """What a backend can do. What it cannot raises UnsupportedError before any side effect.

    Attributes:
        isolation: the technology in one word: "namespaces", "user-space kernel", "micro VM", "wasm".
        rootfs: kinds of root file systems: "host", "dir", "image".
        networks: kinds of networks: "none", "user", "host", "namespace".
        containers: more than one container in a sandbox.
        bundles: containers from bundles that a container engine has written (`CreateTask.config`).
        exec: more processes in a running container.
        processes: programs of this machine: a shell, fork, signals, /proc.
        attach: another process that attaches to the engine can use the sandboxes; without it they live in the process
            that made them.
        tty: a terminal for a process, with resize.
        files: reading and writing the sandbox's files from outside.
        userns: a user namespace of its own.
        userns_host: running without one, by explicit word.
        own_ids: root of such a user namespace is a user of the host that nobody else is, nor another sandbox's root.
        users: programs inside may be other users than root, in groups that are asked for, and files inside theirs.
        seccomp: a filter of system calls; without it only seccomp="unconfined" is taken, which users have to say.
        shared_pid: containers that see each other's processes.
        host_mounts: directories and files of the host inside.
        host_devices: devices of the host beyond the usual ones (`Security.devices`).
        cgroup_parent: a place for the sandbox's cgroup that its user chooses.
        limits: what of "memory", "cpu" and "pids" can be limited. `Resources` limits memory and pids unless it is told
            not to (None), and `Resources.unlimited()` limits nothing.
        process_trees: the end of a process by us (a timeout, `kill`) ends all that it has started, also what has left
            its parents and its session. Without it such a one ends with its container.
        writable_dirs: a directory as a root file system that can be written inside; without it `Rootfs.dir` needs
            readonly=True.
        large_disks: more room for what a sandbox writes than half of its memory.
        pause: stopping all processes and going on.
        update: changing limits while it runs.
        cpu_seconds: ending a process that has used so much processor time (`Resources.cpu_seconds`).
        checkpoint: writing the state of a container to disk.
        network_update: changing the network while it runs.
        ttl: ending a sandbox after a time also when nobody is attached.
        exact_exits: exit codes 0-255, signals and OOM are exact.
        survives_host_crash: sandboxes outlive the caller's process under the keeper's policy "keep".
        host_exceptions: names of what the backend leaves in the caller's process ("wasmtime runtime threads").
        start_seconds: what one start costs about; test counts scale by it.
        notes: what else its users have to know, one sentence each.
    """

    isolation: str
    rootfs: frozenset[str] = frozenset()
    networks: frozenset[str] = frozenset({"none"})
    containers: bool = False
    bundles: bool = False
    exec: bool = False
    processes: bool = True
    attach: bool = True
    tty: bool = False
    files: bool = False
    userns: bool = False
    userns_host: bool = False
    own_ids: bool = True
    users: bool = True
    seccomp: bool = False
    shared_pid: bool = False
    host_mounts: bool = False
    host_devices: bool = False
    cgroup_parent: bool = False
    limits: frozenset[str] = frozenset({"cpu", "memory", "pids"})
    process_trees: bool = True
    writable_dirs: bool = True
    large_disks: bool = True
    pause: bool = False
    update: bool = False
    cpu_seconds: bool = False
    checkpoint: bool = False
    network_update: bool = False
    ttl: bool = False
    exact_exits: bool = True
    survives_host_crash: bool = False
    host_exceptions: tuple[str, ...] = ()
    start_seconds: float = 0.02
    notes: tuple[str, ...] = ()


@attrs.frozen
@by_fields
class Probe:
    """Whether a backend can run on this host.

    Attributes:
        backend: its name.
        available: True when nothing that was looked at forbids it.
        reason: why not, or what was found, in one sentence.
        hint: what to do about it; empty when available.
        facts: what was looked at: versions, paths, settings.
        deep: True when something really ran; False when only cheap facts and a cached verdict were read.
        warnings: what works less well than it could here, each with its remedy.
    """

    backend: str
    available: bool
    reason: str = ""
    hint: str = ""
    facts: Mapping[str, str] = attrs.field(factory=dict)
    deep: bool = False
    warnings: tuple[str, ...] = ()
