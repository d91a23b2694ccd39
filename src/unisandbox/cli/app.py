"""The options of the command line, and how errors are shown: one line, and a hint."""

from __future__ import annotations

import base64
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from unisandbox import __version__
from unisandbox.api import InvalidArgumentError, Mount, Resources, SandboxError
from unisandbox.api.units import parse_size

if TYPE_CHECKING:
    from unisandbox.cli.run import Ended
    from unisandbox.sandbox.sandbox import SandboxOptions

OWN_ERROR: Final = 125
"""The exit code for our own errors, as docker run's; 126 and 127 are for programs that cannot be started."""

_INTERRUPTED: Final = 130
_STDOUT_GONE: Final = 141  # 128 + SIGPIPE: what a shell says of a program whose reader has left
_SETTINGS: Final = {"max_content_width": 110}


def run_app(args: Sequence[str]) -> int:
    """Run the command line.

    Args:
        args: without the program's name.

    Returns:
        The exit code.
    """
    try:
        code = cli.main(list(args), prog_name="unisandbox", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        return _INTERRUPTED
    except click.ClickException as error:
        return _complain(error, error.format_message().rstrip("."), _help_hint(error), debug=False)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)  # what is buffered cannot be written at exit either
        return _STDOUT_GONE
    return code if isinstance(code, int) else 0


def _explain(error: Exception, *, debug: bool) -> int:
    if isinstance(error, SandboxError):
        code = OWN_ERROR
        if isinstance(error, InvalidArgumentError) and error.exit_code is not None:
            code = error.exit_code
        hint = error.hint
        if getattr(error, "log", "") and not debug:
            hint = f"{hint} --debug shows the backend's log.".strip()
        _complain(error, error.message, hint, debug=debug)
        return code
    text = f"unexpected {type(error).__name__}: {error}"
    return _complain(error, text, "This is a bug in unisandbox; --debug shows where it happened.", debug=debug)


def _complain(error: Exception, message: str, hint: str, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"unisandbox: {_one_line(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {_one_line(hint)}", file=sys.stderr)
    return OWN_ERROR


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _help_hint(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"see {context.command_path if context else 'unisandbox'} --help"


def _the_one(error: Exception) -> Exception:
    """What is in a group of one: the task groups below wrap what goes wrong in them."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


@click.group(context_settings=_SETTINGS)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Run programs in sandboxes on this machine: no daemon, nothing is left behind."""


def _pairs(values: Sequence[str]) -> dict[str, str]:
    """Of -e: NAME=VALUE, or NAME for the caller's value; one that the caller does not have is left out."""
    env: dict[str, str] = {}
    for value in values:
        name, sign, text = value.partition("=")
        if not name:
            raise InvalidArgumentError(
                f"-e {value!r} has no name", hint="Write NAME=VALUE, or NAME for your own value."
            )
        if sign:
            env[name] = text
        elif name in os.environ:
            env[name] = os.environ[name]
    return env


def _mount(value: str) -> Mount:
    """Of -v: SOURCE:TARGET, SOURCE:TARGET:ro or SOURCE:TARGET:rw."""
    parts = value.split(":")
    if len(parts) not in {2, 3} or not all(parts) or (len(parts) == 3 and parts[2] not in {"ro", "rw"}):
        raise InvalidArgumentError(f"-v {value!r} is not valid", hint="Write SOURCE:TARGET, and ':ro' or ':rw'.")
    if not os.path.exists(parts[0]):
        raise InvalidArgumentError(f"-v {value!r}: {parts[0]!r} does not exist on this host", hint="Make it first.")
    return Mount.bind(parts[0], parts[1], readonly=parts[2:] == ["ro"])


def _resources(
    *, unlimited: bool, memory: str | None, cpus: float | None, pids: int | None, disk: str | None
) -> Resources:
    sizes = {"memory": memory, "disk": disk}
    given: dict[str, Any] = {
        **{name: parse_size(size, f"--{name}") for name, size in sizes.items() if size is not None},
        **{name: number for name, number in (("cpu", cpus), ("pids", pids)) if number is not None},
    }
    if unlimited:
        nothing: dict[str, Any] = dict.fromkeys(("memory", "swap", "cpu", "pids", "disk", "nofile", "core"))
        given = nothing | given
    return Resources(**given)


@cli.command(
    "run",
    context_settings={"allow_interspersed_args": False},
    short_help="Run a program in a new sandbox.",
    epilog="Exit code: the program's own; 128 + n when signal n ended it; 124 after --timeout; 127 when there is no "
    "such program, 126 when it cannot be executed; 125 for an error of unisandbox.",
)
@click.option("-i", "--interactive", is_flag=True, help="Pass standard input on; otherwise the program has none.")
@click.option("-t", "--tty", is_flag=True, help="Give the program a terminal.")
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="A variable; NAME alone takes your own value.")
@click.option("-w", "--workdir", metavar="DIR", help="Working directory inside.")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Names or numbers inside.  [default: root inside]")
@click.option(
    "-v", "--volume", multiple=True, metavar="SOURCE:TARGET[:ro|rw]", help="Show a file or directory of this host."
)
@click.option(
    "--rootfs", default="host", show_default=True, metavar="host|DIR", help="This host's programs, or a directory."
)
@click.option("--isolation", default="auto", show_default=True, metavar="NAME", help="A backend; see doctor.")
@click.option("--memory", metavar="SIZE", help="Bytes, or as in 256M.  [default: 512M]")
@click.option("--cpus", type=float, metavar="N", help="Processor cores; 0.5 is half of one.  [default: all]")
@click.option("--pids", type=int, metavar="N", help="Processes and threads at one time.  [default: 256]")
@click.option("--disk", metavar="SIZE", help="What may be written.  [default: half of the memory, at most 1G]")
@click.option("--unlimited", is_flag=True, help="No limits but those given.")
@click.option("--network", default="none", show_default=True, metavar="none|host|PATH", help="PATH: of a namespace.")
@click.option("--hostname", metavar="NAME", help="Inside.  [default: the sandbox's id]")
@click.option("--name", metavar="NAME", help="What messages call the sandbox.")
@click.option(
    "--userns",
    type=click.Choice(["private", "host"]),
    default="private",
    show_default=True,
    help="host: root inside is this host's root.",
)
@click.option("--timeout", type=float, metavar="SECONDS", help="Kill the program after that long; exit code 124.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object at the end, with the output in it.")
@click.option("--debug", is_flag=True, help="Show a traceback and the backend's log with an error.")
@click.argument("argv", nargs=-1, required=True, metavar="PROGRAM [ARGUMENT]...", type=click.UNPROCESSED)
def run_command(
    argv: tuple[str, ...],
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    volume: tuple[str, ...],
    rootfs: str,
    isolation: str,
    memory: str | None,
    cpus: float | None,
    pids: int | None,
    disk: str | None,
    unlimited: bool,
    network: str,
    hostname: str | None,
    name: str | None,
    userns: str,
    timeout: float | None,
    as_json: bool,
    debug: bool,
) -> int:
    """Run PROGRAM in a new sandbox, which is removed at its end. Output, exit code and signals pass through.

    The program sees this host's /usr and nothing of your files, has no network and limited memory, processes and disk;
    the options below change that. Its files are /tmp, /run and /home, or with --rootfs DIR a private layer over DIR.
    """

    def work() -> int:
        import anyio

        from unisandbox.cli.run import Request, run

        if tty and as_json:
            raise InvalidArgumentError("-t and --json cannot be used together", hint="Leave out one of them.")
        if timeout is not None and not timeout > 0:
            raise InvalidArgumentError(f"--timeout must be > 0 seconds, got {timeout:g}")
        variables = _pairs(env)
        if tty:
            variables = {"TERM": os.environ.get("TERM", "xterm")} | variables
        options: SandboxOptions = {
            "rootfs": rootfs,
            "isolation": isolation,
            "name": name,
            "resources": _resources(unlimited=unlimited, memory=memory, cpus=cpus, pids=pids, disk=disk),
            "network": network,
            "mounts": [_mount(value) for value in volume],
            "userns": "host" if userns == "host" else "private",
            "hostname": hostname,
        }
        request = Request(
            argv=argv,
            sandbox=options,
            env=variables,
            cwd=workdir,
            user=user,
            interactive=interactive,
            tty=tty,
            timeout=timeout,
            collect=_LARGEST_OUTPUT if as_json else None,
        )
        ended = anyio.run(run, request)
        if as_json:
            print(json.dumps(_as_json(argv, ended)))
        elif ended.timed_out:
            print(f"unisandbox: {argv[0]!r} did not end within {timeout:g} s; it was killed", file=sys.stderr)
        elif ended.exit is not None and ended.exit.reason == "oom":
            print(f"unisandbox: {argv[0]!r} was killed: it reached the memory limit", file=sys.stderr)
            print("hint: give it more with --memory", file=sys.stderr)
        elif ended.exit is not None and ended.exit.reason == "lost":
            print(f"unisandbox: {argv[0]!r} is gone, and how it ended could not be learned", file=sys.stderr)
        return ended.code

    return _with_json_errors(work, as_json=as_json, debug=debug)


_LARGEST_OUTPUT: Final = 16 << 20  # as of `Sandbox.run`


def _with_json_errors(work: Callable[[], int], *, as_json: bool, debug: bool) -> int:
    """Also an error is one JSON object then, beside the line on standard error."""
    try:
        return work()
    except BrokenPipeError:  # our own standard output: whoever read it has left
        raise
    except Exception as raised:
        error = _the_one(raised)
        code = _explain(error, debug=debug)
        if as_json:
            message = error.message if isinstance(error, SandboxError) else str(error)
            hint = error.hint if isinstance(error, SandboxError) else ""
            kind = type(error).__name__
            print(json.dumps({"exit_code": code, "error": {"type": kind, "message": message, "hint": hint}}))
        return code


def _as_json(argv: Sequence[str], ended: Ended) -> dict[str, object]:
    end = ended.exit
    return {
        "argv": list(argv),
        "exit_code": ended.code,
        "code": end.code if end else None,
        "signal": end.signal if end else ended.signal,
        "reason": end.reason if end else "interrupted",
        "oom_kills": end.oom_kills if end else 0,
        "timed_out": ended.timed_out,
        "duration": round(ended.duration, 6),
        "truncated": ended.truncated,
        **_text("stdout", ended.stdout),
        **_text("stderr", ended.stderr),
    }


def _text(name: str, data: bytes) -> dict[str, str]:
    """As text where it is UTF-8, else as base64; `*_encoding` says which."""
    try:
        return {name: data.decode(), f"{name}_encoding": "utf-8"}
    except UnicodeDecodeError:
        return {name: base64.b64encode(data).decode(), f"{name}_encoding": "base64"}


@cli.command(short_help="Say what can run on this host, and what to do where something cannot.")
@click.option("--deep", is_flag=True, help="Run something for real, instead of only looking.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def doctor(deep: bool, as_json: bool, debug: bool) -> int:
    """Say what this host is, which backends can run on it, and what to do where one cannot.

    Exit code: 0 when at least one backend can run, else 1.
    """

    def work() -> int:
        import anyio

        from unisandbox.cli.doctor import examine

        async def main() -> int:
            report = await examine(deep=deep)
            click.echo(json.dumps(report.as_json()) if as_json else "\n".join(report.lines()))
            return report.code

        return anyio.run(main)

    return _with_json_errors(work, as_json=as_json, debug=debug)


@cli.command(short_help="Measure sandboxes on this host against plain processes.")
@click.option("--rounds", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How often.")
@click.option("--isolation", default="auto", show_default=True, metavar="NAME", help="A backend; see doctor.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object; times are in seconds.")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def bench(rounds: int, isolation: str, as_json: bool, debug: bool) -> int:
    """Measure how long sandboxes take here, against a plain process (and bwrap, where it is installed) in one run."""

    def work() -> int:
        import anyio

        from unisandbox.cli.bench import measure

        async def main() -> None:
            results = await measure(rounds=rounds, isolation=isolation)
            print(json.dumps(results.as_json()) if as_json else "\n".join(results.lines()))

        anyio.run(main)
        return 0

    return _with_json_errors(work, as_json=as_json, debug=debug)
