"""The files of a runtime: states of its containers, logs, and what is written for one call.

They may lie in the keeper's private mounts, where only the keeper and its children see them: everything here goes
through `Keeper.outside`, and raises UnavailableError once the keeper has ended.
"""

from __future__ import annotations

import contextlib
import json
import os

import attrs

from unisandbox.api.errors import BackendError, UnavailableError
from unisandbox.host import pidfd as pidfds
from unisandbox.host.boundary import reached
from unisandbox.oci.calls import Spawner


@attrs.frozen(eq=False, repr=False)
class RuntimeFiles:
    """What lies below `root` (absolute, as the keeper sees it), and in bundles."""

    root: str
    keeper: Spawner

    def states(self) -> str:
        """The runtime's `--root`, as the keeper sees it."""
        return f"{self.root}/state"

    def logs(self) -> str:
        """Where calls without a bundle log, as the keeper sees it."""
        return f"{self.root}/log"

    def log(self, name: str) -> str:
        """The log of one such call, as the keeper sees it."""
        return f"{self.logs()}/{name}.log"

    def exists(self, container_id: str) -> bool:
        """Whether the runtime has a state of this container."""
        return os.path.lexists(self.state_dir(container_id))

    def state_dir(self, container_id: str) -> str:
        """The state directory of a container, as seen from here."""
        return self.view(f"{self.states()}/{container_id}")

    def view(self, path: str) -> str:
        """A path of the keeper's mount namespace as it is reached from here."""
        return self.keeper.outside(path)

    def write(self, path: str, text: str | bytes) -> None:
        """Make a file that nobody else reads."""
        data = text.encode() if isinstance(text, str) else text
        try:
            descriptor = os.open(
                self.view(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            with open(descriptor, "wb") as file:
                file.write(data)
        except OSError as error:
            raise BackendError(f"cannot write {path}: {error.strerror}") from error

    def unlink(self, path: str) -> None:
        """Remove a file, if it is there."""
        # Missing is the usual case; whatever else prevents it, the directory goes with its owner.
        with contextlib.suppress(OSError, UnavailableError):
            os.unlink(self.view(path))

    def unlink_pid_file(self, path: str) -> None:
        """Remove a pid-file, and what a runtime that was killed while it wrote one left of it.

        Source: runc utils_linux.go, createPidFile(): written under the name with a dot before it, then renamed.
        """
        directory, _, name = path.rpartition("/")
        for each in (path, f"{directory}/.{name}"):
            self.unlink(each)

    def has_hooks(self, directory: str, kind: str, *, seen: bool = False) -> bool:
        """Whether the config.json in a bundle, or (`seen`: as seen from here) a state directory, has such hooks."""
        path = f"{directory}/config.json"
        try:
            with open(path if seen else self.view(path), "rb") as file:
                raw = file.read()
            if b'"hooks"' not in raw:
                return False
            hooks = json.loads(raw).get("hooks") or {}
            return bool(hooks.get(kind))
        except (OSError, ValueError, AttributeError):
            return True  # it cannot be told, so the runtime shall decide

    def remove_stopped(self, container_id: str) -> bool:
        """Delete a stopped container without the runtime, where that is only a directory: whether it was done.

        Source: crun 1.8.1 src/libcrun/{container,status}.c: with its cgroup manager disabled, `delete` of a stopped
        container runs the poststop hooks and removes the state directory. Anything unexpected: False.
        """
        directory = self.state_dir(container_id)
        try:
            with open(f"{directory}/status", "rb") as file:
                status = json.load(file)
            pid, start_time = status["pid"], status["process-start-time"]
            if type(pid) is not int or type(start_time) is not int or pid <= 1:
                return False
            with contextlib.suppress(ProcessLookupError):
                if pidfds.start_time(pid) == start_time:
                    return False
            if self.has_hooks(directory, "poststop", seen=True):
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return self.discard(container_id)

    def discard(self, container_id: str) -> bool:
        """Remove the state directory of a container; whether it is gone."""
        directory = self.state_dir(container_id)
        try:
            reached("before runtime.forget", container_id)
            for entry in os.listdir(directory):
                os.unlink(f"{directory}/{entry}")
            os.rmdir(directory)
            reached("after runtime.forget", container_id)
        except FileNotFoundError:
            return not os.path.lexists(directory)
        except OSError:
            return False
        return True
