"""The commands for sandboxes that live on: their options, and what they print. Nothing heavy is loaded for --help."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import click

from unisandbox.api import InvalidArgumentError, SandboxError
from unisandbox.cli.answering import answer
from unisandbox.cli.errors import OWN_ERROR, as_dict, explain, say, with_json_errors
from unisandbox.cli.options import own_terminal, pairs, process_options

if TYPE_CHECKING:
    from unisandbox.cli.sandboxes import Program
    from unisandbox.sandbox import Container, Sandbox
    from unisandbox.sandbox.sandbox import SandboxOptions

_F = TypeVar("_F", bound=Callable[..., Any])
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

STATE: Final = click.option(
    "--state",
    metavar="DIR",
    envvar="UNISANDBOX_STATE",
    help="Where the sandboxes are known; or UNISANDBOX_STATE.  [default: /var/lib/unisandbox/cli as root]",
)
_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
_DEBUG: Final = click.option("--debug", is_flag=True, help="Show a traceback and the backend's log with an error.")


def _common(command: _F) -> _F:
    """The options that all of these commands have."""
    return STATE(_JSON(_DEBUG(command)))


def _names(command: _F) -> _F:
    return click.argument("names", nargs=-1, required=True, metavar="NAME...")(command)


def _answer(main: Callable[[], Awaitable[int]], *, as_json: bool, debug: bool) -> int:
    """Do it, until it is done or a signal ends it; the exit code."""

    def work() -> int:
        import anyio

        return anyio.run(_until_signalled, main)

    return with_json_errors(work, as_json=as_json, debug=debug)


async def _until_signalled(main: Callable[[], Awaitable[int]]) -> int:
    """SIGINT, SIGTERM and SIGHUP end it in an orderly way: what was begun is undone, and the engine is left."""
    import anyio

    outcome: int | Exception = 0
    numbers = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    with anyio.open_signal_receiver(*numbers) as signals:
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                nonlocal outcome
                async for number in signals:
                    outcome = 128 + number
                    group.cancel_scope.cancel()
                    return

            group.start_soon(watch)
            try:
                outcome = await main()
            except Exception as error:  # raised below: a task group would wrap it
                outcome = error
            group.cancel_scope.cancel()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def launch_detached(
    state: str | None, options: SandboxOptions, program: Program, *, as_json: bool
) -> Callable[[], Awaitable[int]]:
    """What `run -d` does."""

    async def main() -> int:
        from unisandbox.cli.sandboxes import launch
        from unisandbox.cli.state import opened

        async with opened(state, create=True) as engine:
            assert engine is not None  # noqa: S101 (it is made)
            sandbox = await launch(engine, options, program)
            answer(json.dumps({"id": sandbox.id, "name": sandbox.name}) if as_json else sandbox.name or sandbox.id)
        return 0

    return lambda: _until_signalled(main)


@click.command(short_help="List sandboxes.")
@click.option("-a", "--all", "show_all", is_flag=True, help="Also those in which nothing runs any more.")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@_common
def ps(show_all: bool, quiet: bool, state: str | None, as_json: bool, debug: bool) -> int:
    """List sandboxes. With --json also what became of those that a crash has left behind ("recovered")."""

    async def main() -> int:
        import attrs

        from unisandbox.cli.sandboxes import SHORT_ID, Row, now, table
        from unisandbox.cli.state import opened

        if quiet and as_json:
            raise InvalidArgumentError("-q and --json cannot be used together", hint="Leave out one of them.")
        async with opened(state, create=False) as engine:
            rows = [Row.of(status) for status in await engine.list()] if engine is not None else []
            rows = [row for row in rows if show_all or not row.is_over]
            if as_json:
                report = engine.recovery if engine is not None else None
                told = {
                    "sandboxes": [row.as_json() for row in rows],
                    "recovered": [attrs.asdict(found) for found in report.sandboxes] if report else [],
                    "damaged": [attrs.asdict(bad) for bad in report.damaged] if report else [],
                }
                answer(json.dumps(told))
            else:
                lines = [row.status.id[:SHORT_ID] for row in rows] if quiet else table(rows, now())
                answer("".join(f"{line}\n" for line in lines), end="")
                for row in rows:
                    if row.status.unusable and not quiet:
                        say(f"sandbox {row.status.name or row.status.id[:SHORT_ID]!r}: {row.status.unusable}")
        return 0

    return _answer(main, as_json=as_json, debug=debug)


@click.command(short_help="Show what a program wrote.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what it writes, until it ends or is removed.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Begin with the last N lines of each stream.")
@click.option("--stdout", "only_stdout", is_flag=True, help="Only its standard output.")
@click.option("--stderr", "only_stderr", is_flag=True, help="Only its standard error.")
@click.argument("name")
@_common
def logs(
    name: str,
    follow: bool,
    tail: int | None,
    only_stdout: bool,
    only_stderr: bool,
    state: str | None,
    as_json: bool,
    debug: bool,
) -> int:
    """Show what the program of NAME wrote: its output to standard output, its errors to standard error.

    The last MiB of each is kept, also after its end, until the sandbox is removed or started again. Without -f its
    output comes first and then its errors; with -f both as they come. With --json both are in one object, as of run.
    """

    async def main() -> int:
        import anyio

        from unisandbox.cli.local import STDERR, STDOUT, LocalOutput
        from unisandbox.cli.options import text
        from unisandbox.cli.sandboxes import find, main_container
        from unisandbox.cli.state import opened

        if follow and as_json:
            raise InvalidArgumentError("-f and --json cannot be used together", hint="Leave out one of them.")
        wanted: list[Literal["stdout", "stderr"]] = []
        wanted += ["stdout"] if only_stdout or not only_stderr else []
        wanted += ["stderr"] if only_stderr or not only_stdout else []
        outputs = {"stdout": LocalOutput(STDOUT), "stderr": LocalOutput(STDERR)}

        async def show(container: Container, stream: Literal["stdout", "stderr"]) -> None:
            async for piece in container.follow(stream, tail=tail):
                await outputs[stream].write(piece)

        async with opened(state, create=False) as engine:
            container = await main_container(await find(engine, name), name)
            if follow:
                async with anyio.create_task_group() as group:
                    for stream in wanted:
                        group.start_soon(show, container, stream)
                return 0
            kept = {stream: await container.logs(stream, tail=tail) for stream in wanted}
        if as_json:
            answer(json.dumps(dict(pair for stream, data in kept.items() for pair in text(stream, data).items())))
        else:
            for stream, data in kept.items():
                await outputs[stream].write(data)
        return 0

    return _answer(main, as_json=as_json, debug=debug)


@click.command(
    "exec",
    context_settings={"allow_interspersed_args": False},
    short_help="Run a program in a sandbox that runs.",
    epilog="Exit codes as of run.",
)
@process_options
@click.argument("name")
@click.argument("argv", nargs=-1, required=True, metavar="PROGRAM [ARGUMENT]...", type=click.UNPROCESSED)
@_common
def exec_command(
    name: str,
    argv: tuple[str, ...],
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    state: str | None,
    as_json: bool,
    debug: bool,
) -> int:
    """Run PROGRAM in the sandbox NAME, beside what runs there. Output, exit code and signals pass through.

    It has the environment, working directory and user that run -d was given, where the options do not say otherwise.
    What it leaves in the background goes on. It also goes on itself when this command is killed (kill -9).
    What signals and keys do is as with run.
    """

    def work() -> int:
        from unisandbox.cli.options import LARGEST_OUTPUT, attend
        from unisandbox.cli.run import KnownSandbox, Request

        program = argv[1:] if argv[0] == "--" else argv  # as kubectl's: exec NAME -- PROGRAM
        if not program:
            raise InvalidArgumentError("there is no program to run after --", hint="unisandbox exec NAME PROGRAM")
        return attend(
            Request(
                argv=program,
                place=KnownSandbox(state, name),
                env=own_terminal(pairs(env), tty=tty, as_json=as_json),
                cwd=workdir,
                user=user,
                interactive=interactive,
                tty=tty,
                collect=LARGEST_OUTPUT if as_json else None,
            )
        )

    return with_json_errors(work, as_json=as_json, debug=debug)


def _each(
    names: Sequence[str],
    action: Callable[[Sandbox, str], Awaitable[str | int | None]],
    *,
    state: str | None,
    as_json: bool,
    debug: bool,
) -> int:
    """Do it with each sandbox, one after the other; what fails with one keeps nobody from the others.

    Prints what the action returns, or the name.
    """

    async def main() -> int:
        from unisandbox.cli.sandboxes import find
        from unisandbox.cli.state import opened

        answers: list[Mapping[str, object]] = []
        code = 0
        async with opened(state, create=False) as engine:
            for name in names:
                try:
                    result = await action(await find(engine, name), name)
                except SandboxError as error:
                    explain(error, debug=debug)
                    code = OWN_ERROR
                    answers.append({"name": name, "error": as_dict(error)})
                    continue
                answers.append({"name": name} | ({} if result is None else {"result": result}))
                if not as_json:
                    answer(name if result is None else str(result))
        if as_json:
            answer(json.dumps({"exit_code": code, "sandboxes": answers}))
        return code

    return _answer(main, as_json=as_json, debug=debug)


@click.command(short_help="End what runs in a sandbox; its files stay.")
@click.option(
    "-t", "--time", "grace", type=click.FloatRange(0), default=10.0, show_default=True, metavar="SECONDS",
    help="After SIGTERM, before SIGKILL.",
)  # fmt: skip
@_names
@_common
def stop(names: tuple[str, ...], grace: float, state: str | None, as_json: bool, debug: bool) -> int:
    """End the program of each NAME, and all that runs beside it. Its files, and what it wrote, stay until rm."""

    async def action(sandbox: Sandbox, _ref: str) -> None:
        from unisandbox.cli.sandboxes import stop

        await stop(sandbox, grace)

    return _each(names, action, state=state, as_json=as_json, debug=debug)


@click.command(short_help="Start the program of a sandbox again.")
@_names
@_common
def start(names: tuple[str, ...], state: str | None, as_json: bool, debug: bool) -> int:
    """Start the program of each NAME again after its end, with the files as they are."""

    async def action(sandbox: Sandbox, ref: str) -> None:
        from unisandbox.cli.sandboxes import start

        await start(sandbox, ref)

    return _each(names, action, state=state, as_json=as_json, debug=debug)


@click.command(short_help="Remove a sandbox and its files.")
@click.option("-f", "--force", is_flag=True, help="Also one in which something runs.")
@_names
@_common
def rm(names: tuple[str, ...], force: bool, state: str | None, as_json: bool, debug: bool) -> int:
    """Remove each NAME: nothing of it is left."""

    async def action(sandbox: Sandbox, ref: str) -> None:
        from unisandbox.cli.sandboxes import remove

        await remove(sandbox, ref, force=force)

    return _each(names, action, state=state, as_json=as_json, debug=debug)


@click.command(short_help="Send a signal to the program of a sandbox.")
@click.option("-s", "--signal", "number", default="KILL", show_default=True, metavar="SIGNAL", help="Name or number.")
@_names
@_common
def kill(names: tuple[str, ...], number: str, state: str | None, as_json: bool, debug: bool) -> int:
    """Send a signal to the program of each NAME. With that program everything that runs beside it ends."""

    async def action(sandbox: Sandbox, ref: str) -> None:
        from unisandbox.cli.sandboxes import kill, signal_number

        await kill(sandbox, ref, signal_number(number))

    return _each(names, action, state=state, as_json=as_json, debug=debug)


@click.command(short_help="Wait for the end of a program, and print its exit code.")
@_names
@_common
def wait(names: tuple[str, ...], state: str | None, as_json: bool, debug: bool) -> int:
    """Wait until the program of each NAME has ended, and print its exit code: 0-255, 128 + n for signal n."""

    async def action(sandbox: Sandbox, ref: str) -> int:
        from unisandbox.cli.sandboxes import wait

        return (await wait(sandbox, ref)).code

    return _each(names, action, state=state, as_json=as_json, debug=debug)


@click.command(short_help="Hold everything in a sandbox.")
@_names
@_common
def pause(names: tuple[str, ...], state: str | None, as_json: bool, debug: bool) -> int:
    """Hold everything that runs in each NAME, until unpause."""

    async def action(sandbox: Sandbox, ref: str) -> None:
        from unisandbox.cli.sandboxes import pause

        await pause(sandbox, ref)

    return _each(names, action, state=state, as_json=as_json, debug=debug)


@click.command(short_help="Let a paused sandbox go on.")
@_names
@_common
def unpause(names: tuple[str, ...], state: str | None, as_json: bool, debug: bool) -> int:
    """Let everything that runs in each NAME go on."""

    async def action(sandbox: Sandbox, ref: str) -> None:
        from unisandbox.cli.sandboxes import unpause

        await unpause(sandbox, ref)

    return _each(names, action, state=state, as_json=as_json, debug=debug)


@click.command(short_help="Say all that is known of a sandbox, as JSON.")
@click.argument("name")
@_common
def inspect(name: str, state: str | None, as_json: bool, debug: bool) -> int:
    """Say all that is known of the sandbox NAME: JSON for people, or with --json in one line."""

    async def main() -> int:
        import attrs

        from unisandbox.cli.sandboxes import Row, find
        from unisandbox.cli.state import opened

        async with opened(state, create=False) as engine:
            status = await (await find(engine, name)).status()
        row = Row.of(status)
        told = attrs.asdict(status) | {
            "word": row.word,
            "program": row.program._asdict() if row.program else None,
            "exit": attrs.asdict(row.exit) if row.exit else None,
        }
        answer(json.dumps(told, indent=None if as_json else 2))
        return 0

    return _answer(main, as_json=as_json, debug=debug)


@click.command(short_help="Show what happens, as it happens.")
@click.option("--after", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Begin after event N.")
@_common
def events(after: int, state: str | None, as_json: bool, debug: bool) -> int:
    """Show what happened since event number N and what happens, one line each, until it is interrupted.

    The last 4096 are kept while there are sandboxes. Where there are none there is nothing to show. With --json each
    event is one JSON object in a line.
    """

    async def main() -> int:
        import attrs

        from unisandbox.cli.state import opened

        async with opened(state, create=False) as engine:
            if engine is None:
                return 0
            stream: AsyncIterator[Any] = engine.events(after)
            async for event in stream:
                answer(json.dumps(attrs.asdict(event)) if as_json else _line(event))
        return 0

    return _answer(main, as_json=as_json, debug=debug)


def _line(event: Any) -> str:
    import time

    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(event.at))
    words = [str(event.seq), at, event.kind, event.sandbox_id, event.container_id, event.exec_id]
    words += [f"code={event.exit.code} reason={event.exit.reason}"] if event.exit else []
    words += [f"{name}={value}" for name, value in event.detail.items()]
    return " ".join(filter(None, words))


COMMANDS: Final = (ps, logs, exec_command, stop, start, rm, kill, wait, pause, unpause, inspect, events)
