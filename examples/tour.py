"""A tour: real programs in sandboxes, and what unisandbox says about them. `make demo` runs it.

It needs nothing but what a plain Debian has: Python's standard library and, where it is installed, git. The part with
WebAssembly needs the extra "wasm", which `make demo` installs.
"""

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unisandbox import Completed, DeadlineExceededError, Engine, Resources, Sandbox, SandboxError

LIMITS = Resources(memory="256M", cpu=1, pids=64, disk="64M")

# Every example in the documentation of these modules is run, and what it prints is compared with what is written there.
DOCTESTS = """
import doctest, importlib
failed = tried = 0
for name in "collections difflib enum fractions heapq http.cookiejar json pickletools statistics".split():
    result = doctest.testmod(importlib.import_module(name))
    failed, tried = failed + result.failed, tried + result.attempted
print(tried, "examples,", failed, "failed")
"""

HISTORY = """
set -e
export HOME=/tmp
git init -q -b main /tmp/repo && cd /tmp/repo && git config user.name Tour && git config user.email tour@example.org
for n in $(seq 10); do seq $n > numbers && git add . && git commit -qm "count to $n"; done
git log --oneline | wc -l
"""

DATABASE = """
import csv, sqlite3
rows = [(name, int(amount)) for name, amount in csv.reader(open("/tmp/sales.csv"))]
db = sqlite3.connect("/tmp/sales.db")
db.execute("create table sales (name text, amount int)")
db.executemany("insert into sales values (?, ?)", rows)
db.commit()
with open("/tmp/totals.csv", "w") as file:
    query = "select name, count(*), sum(amount) from sales group by name order by name"
    csv.writer(file, lineterminator="\\n").writerows(db.execute(query))
"""

SERVER = ["python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", "/tmp", "8000"]
CLIENT = """
import time, urllib.request
while True:  # the server may not listen yet
    try:
        print(urllib.request.urlopen("http://127.0.0.1:8000/", timeout=5).status)
        break
    except OSError:
        time.sleep(0.01)
"""

# Programs for the Wasm sandbox, as text: one counts the primes below its limit and ends with how many there are, one
# writes to an address that it does not have, one goes on for ever.
PRIMES = """
(module
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (func (export "_start") (local $n i32) (local $d i32) (local $found i32)
    (local.set $n (i32.const 2))
    (loop $next
      (local.set $d (i32.const 2))
      (block $done
        (loop $try
          (if (i32.gt_u (i32.mul (local.get $d) (local.get $d)) (local.get $n))
            (then (local.set $found (i32.add (local.get $found) (i32.const 1))) (br $done)))
          (br_if $done (i32.eqz (i32.rem_u (local.get $n) (local.get $d))))
          (local.set $d (i32.add (local.get $d) (i32.const 1)))
          (br $try)))
      (local.set $n (i32.add (local.get $n) (i32.const 1)))
      (br_if $next (i32.lt_u (local.get $n) (i32.const 1000))))
    (call $exit (local.get $found))))
"""
STRAY = """(module (memory (export "memory") 1)
  (func (export "_start") (i32.store (i32.const 0x7fff0000) (i32.const 1))))"""
ENDLESS = '(module (memory (export "memory") 1) (func (export "_start") (loop $again (br $again))))'

PROGRESS = "import time\nfor n in range(5): print('step', n, flush=True); time.sleep(0.1)"


class Report:
    """Prints a line for each thing done, with the time it took."""

    def __init__(self) -> None:
        self._said = ""

    def say(self, text: str) -> None:
        """What came out of the step at hand."""
        self._said = text

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Do something, then print its line; a failure is printed too, and goes on."""
        self._said = "failed"
        begun = time.perf_counter()
        try:
            yield
        finally:
            print(f"  {what:42} {(time.perf_counter() - begun) * 1000:7.1f} ms   {self._said}", flush=True)


def expect(done: Completed, text: str | None = None) -> str:
    """Its output, when it went well."""
    if done.exit_code != 0 or (text is not None and done.text.strip() != text):
        raise SystemExit(f"{done.argv}: {done.exit}, {done.stdout!r}, {done.stderr!r}")
    return done.text.strip()


def expect_code(done: Completed, code: int) -> None:
    """Its end, as it has to be."""
    if done.exit_code != code:
        raise SystemExit(f"{done.argv}: expected exit code {code}, got {done.exit}")


async def real_programs(sandbox: Sandbox, report: Report) -> None:
    """Programs that do something, under limits of memory, processor, processes and disk."""
    with report.step("first program (the container is made)"):
        report.say(expect(await sandbox.run(["python3", "--version"])))
    with report.step("second program"):
        report.say(expect(await sandbox.run(["uname", "-srm"])))
    with report.step("doctests of nine standard modules"):
        report.say(expect(await sandbox.run(["python3", "-c", DOCTESTS], timeout=60)))
    if shutil.which("git") == "/usr/bin/git":
        with report.step("git: a repository with ten commits"):
            report.say(f"{expect(await sandbox.sh(HISTORY, timeout=60), '10')} commits")
    with report.step("files in, sqlite, files out"):
        rows = "".join(f"{('ann', 'bob', 'cyd')[n % 3]},{n}\n" for n in range(30_000))
        await sandbox.files.write("/tmp/sales.csv", rows)
        expect(await sandbox.run(["python3", "-c", DATABASE], timeout=60))
        totals = (await sandbox.files.read("/tmp/totals.csv")).decode().split()
        report.say(f"{len(rows) >> 10} KiB in, out: {totals[0]}")


async def streaming(sandbox: Sandbox, report: Report) -> None:
    """Output is there when it is written, not when the program ends."""
    with report.step("a program that streams"):
        begun = time.perf_counter()
        async with sandbox.exec(["python3", "-c", PROGRESS]) as process:
            times = [time.perf_counter() - begun async for _ in process]
            end = await process.wait()
        report.say(f"{len(times)} pieces over {times[-1] - times[0]:.2f} s, exit code {end.code}")


async def bad_programs(sandbox: Sandbox, report: Report) -> None:
    """What goes wrong is told exactly, and the sandbox goes on."""
    with report.step("one that wants 1 GiB of 256 MiB"):
        done = await sandbox.run(["python3", "-c", "data = bytearray(1 << 30)"], timeout=60)
        if done.exit.reason != "oom":
            raise SystemExit(f"expected the end for memory, got {done.exit}")
        report.say(f"reason {done.exit.reason!r}, signal {done.exit.signal}")
    with report.step("one that never ends, with timeout=0.3"):
        try:
            await sandbox.sh("echo begun; sleep 1000 & sleep 1000", timeout=0.3)
        except DeadlineExceededError as error:
            report.say(
                f"killed with all it had started; it had said {error.completed.text!r}" if error.completed else ""
            )
    with report.step("one that is not there"):
        try:
            await sandbox.run(["no-such-program"])
        except SandboxError as error:
            report.say(f"{type(error).__name__}")
    with report.step("the sandbox goes on"):
        report.say(expect(await sandbox.sh("echo $(ls /tmp | wc -l) files in /tmp")))


async def pod(engine: Engine, report: Report) -> None:
    """Two containers, each with files of its own, in one sandbox with one network."""
    with report.step("a sandbox for two containers"):
        sandbox = await engine.create(resources=LIMITS, name="pod")
        report.say((await sandbox.status()).state)
    async with sandbox:
        with report.step("server and client talk over localhost"):
            server = await sandbox.containers.add(argv=SERVER, name="server")
            client = await sandbox.containers.add(argv=["python3", "-c", CLIENT], name="client")
            async with asyncio.timeout(30):
                end = await client.wait()
            status = (await client.logs()).decode().strip()
            if (end.code, status) != (0, "200"):
                raise SystemExit(f"client: {end}, {status!r}, {await client.logs('stderr')!r}")
            request = (await server.logs("stderr")).decode().split('"')[1]
            report.say(f"answer {status}; the server logged: {request}")


async def wasm(engine: Engine, report: Report) -> None:
    """WebAssembly in the same engine: guests are threads of this process, with files and limits of their own."""
    for probe in await engine.probe():
        if probe.backend == "wasm" and probe.available:
            break
    else:
        print("  not here: pip install 'unisandbox[wasm]'")
        return
    with tempfile.TemporaryDirectory() as root:
        for name, text in (("primes", PRIMES), ("stray", STRAY), ("endless", ENDLESS)):
            Path(root, f"{name}.wat").write_text(text)  # noqa: ASYNC240 (small)
        limits = Resources(memory="16M", cpu_seconds=0.2, disk="1M")
        with report.step("create it"):
            sandbox = await engine.create(isolation="wasm", rootfs=root, resources=limits, name="guests")
            report.say(f"{(await sandbox.status()).state}; beside it: {', '.join(sorted(await others(engine)))}")
        async with sandbox:
            with report.step("first program (compiled once a machine)"):
                report.say(f"{(await sandbox.run(['primes.wat'])).exit_code} primes below 1000")
            with report.step("second program"):
                done = await sandbox.run(["primes.wat"])
                expect_code(done, 168)
                report.say(f"{done.exit_code} primes below 1000")
            with report.step("one that writes where it has no memory"):
                done = await sandbox.run(["stray.wat"])
                report.say(f"reason {done.exit.reason!r}: {done.exit.detail.splitlines()[0]}")
            with report.step("one that never ends, with cpu_seconds=0.2"):
                report.say(f"reason {(await sandbox.run(['endless.wat'], timeout=30)).exit.reason!r}")
        with report.step("50 sandboxes, one after the other"):
            for _ in range(50):
                async with engine.create(isolation="wasm", rootfs=root, resources=limits) as one:
                    expect_code(await one.run(["primes.wat"]), 168)
            report.say("made, used and removed")


async def others(engine: Engine) -> list[str]:
    """The sandboxes of this engine, with their backends."""
    return [f"{status.name} ({status.backend})" for status in await engine.list()]


def on_the_host(engine_id: str) -> list[str]:
    """What this engine has on the host: all that it makes has its id in its name, or runs in a cgroup that has."""
    found = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if engine_id in line]
    for top in (Path("/run"), Path(tempfile.gettempdir())):
        found += [str(path) for depth in ("*", "*/*") for path in top.glob(f"{depth}{engine_id}*")]
    for directory, names, _ in os.walk("/sys/fs/cgroup"):
        found += [os.path.join(directory, name) for name in names if engine_id in name]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cgroup").read_text() + (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it has ended
            continue
        if engine_id in text and process.name != str(os.getpid()):
            found.append(f"process {process.name}")
    return found


async def main() -> None:
    report = Report()
    begun = time.perf_counter()
    print(f"unisandbox on Linux {os.uname().release}, Python {sys.version.split()[0]}\n")
    async with Engine.open() as engine:
        for probe in await engine.probe():
            print(f"  {probe.backend}: {probe.reason}{'' if probe.available else '. ' + probe.hint}")
        print("\nOne sandbox: 256 MiB of memory, one core, 64 processes, 64 MiB of disk, no network")
        with report.step("create it"):
            sandbox = await engine.create(resources=LIMITS, name="tour")
            report.say(f"{(await sandbox.status()).state}; backend {sandbox.backend}")
        await real_programs(sandbox, report)
        await streaming(sandbox, report)
        await bad_programs(sandbox, report)
        print("\nA WebAssembly sandbox in the same engine: 16 MiB of memory, 1 MiB of disk")
        await wasm(engine, report)
        print("\nThe first one again")
        during = on_the_host(engine.id)
        with report.step("remove it"):
            await sandbox.remove()
            report.say("its name is free, its files are gone")
        print("\nA pod")
        await pod(engine, report)
    left = on_the_host(engine.id)
    print(f"\n{time.perf_counter() - begun:.1f} s in all. On the host while it ran: {len(during)} things. ", end="")
    print(f"Left behind: {', '.join(left) or 'nothing'}.")
    if left:
        raise SystemExit(1)


try:
    asyncio.run(main())
except SandboxError as error:
    raise SystemExit(f"the tour cannot go on: {error}") from None
