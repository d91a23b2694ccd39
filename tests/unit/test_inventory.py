"""The inventory sees what a test could leave behind: each case leaves it for real, then takes it away."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from unisandbox.conformance.inventory import Inventory, own_cgroups, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

_PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def whole_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is but once is listed, also where other tests run beside these and may have some of it."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@contextmanager
def _open_fd() -> Iterator[None]:
    fd = os.open("/dev/null", os.O_RDONLY)
    yield
    os.close(fd)


@contextmanager
def _child() -> Iterator[None]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield
        child.kill()


@contextmanager
def _zombie() -> Iterator[None]:
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        yield


@contextmanager
def _thread() -> Iterator[None]:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left")
    thread.start()
    yield
    end.set()
    thread.join()


@contextmanager
def _socket_with_our_name() -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"\0unisandbox-inventory-{os.getpid()}")
        yield


@contextmanager
def _file_with_our_name() -> Iterator[None]:
    path = Path(f"/tmp/unisandbox-inventory-{os.getpid()}")
    path.touch()
    yield
    path.unlink()


@contextmanager
def _umask() -> Iterator[None]:
    old = os.umask(0o123)
    yield
    os.umask(old)


@contextmanager
def _cwd() -> Iterator[None]:
    old = os.getcwd()
    os.chdir("/")
    yield
    os.chdir(old)


@contextmanager
def _signal_handler() -> Iterator[None]:
    old = signal.signal(signal.SIGCHLD, lambda *_: None)
    yield
    signal.signal(signal.SIGCHLD, old)


@contextmanager
def _subreaper() -> Iterator[None]:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@contextmanager
def _environment() -> Iterator[None]:
    os.environ["INVENTORY_TEST"] = "1"
    yield
    del os.environ["INVENTORY_TEST"]


CASES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "fd /dev/null": _open_fd,
    "sleep 60": _child,
    "true:": _zombie,
    "thread": _thread,
    "unix socket": _socket_with_our_name,
    "file /tmp/unisandbox-inventory": _file_with_our_name,
    "Umask 0123": _umask,
    "cwd /": _cwd,
    "signal 17 ": _signal_handler,
    "child subreaper 1": _subreaper,
    "INVENTORY_TEST=1": _environment,
}


@pytest.mark.parametrize("words", CASES)
def test_difference_is_named_and_gone_after_it_is_undone(words: str, whole_machine: None) -> None:
    before = Inventory.take()
    with CASES[words]():
        left = before.diff(Inventory.take())
        assert any(words in line for line in left), left
    assert not any(words in line for line in settle(before))


def test_closed_fd_of_somebody_else_is_a_difference() -> None:
    fd = os.open("/dev/zero", os.O_RDONLY)
    before = Inventory.take()
    os.close(fd)
    assert before.diff(Inventory.take()) == ["gone: fd /dev/zero"]


@pytest.mark.root
def test_process_that_forked_itself_away_is_found_by_the_cgroup_of_the_run() -> None:
    before = Inventory.take()
    if not any("/unisandbox-tests-" in path for path in own_cgroups().values()):
        pytest.skip("this run has no cgroup of its own: cgroup v2 only, or not writable")
    done = subprocess.run(
        ["sh", "-c", "setsid sleep 61 >/dev/null 2>&1 & echo $!"], stdout=subprocess.PIPE, check=True, text=True
    )
    left = before.diff(Inventory.take())
    os.kill(int(done.stdout), signal.SIGKILL)
    assert len(left) == 1
    assert "sleep 61" in left[0]
    assert settle(before) == []


@pytest.mark.root
def test_cgroup_directory_is_found() -> None:
    before = Inventory.take()
    where, own = next((w, p) for w, p in own_cgroups().items() if not w.endswith("cpuset"))
    path = f"{own if where != own else where}/unisandbox-inventory"
    os.mkdir(path)
    left = before.diff(Inventory.take())
    os.rmdir(path)
    assert left == [f"left behind: cgroup {path}"]


def test_cgroup_in_a_subtree_above_is_found_on_v2() -> None:
    [(where, own), *others] = own_cgroups().items()
    if others or own == where or not os.path.exists(f"{where}/cgroup.controllers"):
        pytest.skip("this host has no cgroup v2 alone, or we are at its top")
    path = f"{os.path.dirname(own)}/unisandbox-inventory"
    before = Inventory.take()
    os.mkdir(path)
    left = before.diff(Inventory.take())
    os.rmdir(path)
    assert left == [f"left behind: cgroup {path}"]


@pytest.mark.root
def test_directory_hidden_under_a_cgroup_mount_is_found(whole_machine: None) -> None:
    if not os.path.ismount("/sys/fs/cgroup/unified"):
        pytest.skip("this host has no hybrid cgroup tree, so no mount point below /sys/fs/cgroup to hide things under")
    script = "umount /sys/fs/cgroup/unified && {} /sys/fs/cgroup/unified/inventory-test"
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    before = Inventory.take()
    subprocess.run([*unshare, script.format("mkdir")], check=True)
    left = before.diff(Inventory.take())
    subprocess.run([*unshare, script.format("rmdir")], check=True)
    assert "left behind: hidden cgroup directory unified/inventory-test" in left
    assert not any("inventory-test" in line for line in settle(before))


def test_listing_costs_no_more_than_reading_a_few_hundred_files() -> None:
    """It is done twice for each test. Of the processor's time, in which nobody else's work counts."""

    def cost(work: Callable[[], object]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    def read_as_many() -> None:
        processes = sum(name.isdigit() for name in os.listdir("/proc"))
        for _ in range(300 + 5 * processes):
            Path("/proc/self/status").read_bytes()

    Inventory.take()
    # By turns: how many processes there are changes meanwhile. A tenth to a fifth of it, also where emulated.
    both = [(cost(Inventory.take), cost(read_as_many)) for _ in range(10)]
    assert min(listing for listing, _ in both) < min(reading for _, reading in both)


def test_no_test_can_forget_the_check(tmp_path: Path) -> None:
    test = tmp_path / "test_leak.py"
    test.write_text("import os\ndef test_leaks(): os.open('/dev/null', os.O_RDONLY)\ndef test_clean(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = root: x\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", str(test)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "left behind: fd /dev/null" in done.stdout
    assert "2 passed, 1 error" in done.stdout
