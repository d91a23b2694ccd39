"""The command line as a whole, and the commands that need no sandbox to be there: run, doctor, bench."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
import click
from click.core import ParameterSource

from unisandbox import __version__
from unisandbox.api import FailedPreconditionError, InvalidArgumentError, Mount, Resources, UnavailableError
from unisandbox.api.units import parse_size
from unisandbox.cli.answering import answer, answering, fill_streams, forget_output
from unisandbox.cli.commands import COMMANDS, STATE, launch_detached
from unisandbox.cli.errors import STDOUT_GONE, explain, with_json_errors
from unisandbox.cli.options import LARGEST_OUTPUT, attend, own_terminal, pairs, process_options

if TYPE_CHECKING:
    from unisandbox.sandbox.sandbox import SandboxOptions

_INTERRUPTED: Final = 130
_SETTINGS: Final = {"max_content_width": 110}


def run_app(args: Sequence[str]) -> int:
    """Run the command line.

    Args:
        args: without the program's name.

    Returns:
        The exit code.
    """
    fill_streams()
    try:
        with answering():  # what is not inside of a command: --help
            code = cli.main(list(args), prog_name="unisandbox", standalone_mode=False)
            sys.stdout.flush()
    except click.exceptions.Abort:
        return _INTERRUPTED
    except click.ClickException as error:
        return _refused(error, args)
    except BrokenPipeError:
        forget_output()
        return STDOUT_GONE
    except FailedPreconditionError as error:
        return explain(error, debug=False)
    return code if isinstance(code, int) else 0


def _refused(error: click.ClickException, args: Sequence[str]) -> int:
    """Say what is wrong with the arguments, also as JSON: what was not parsed is looked for by its name."""
    own = args[: args.index("--")] if "--" in args else args

    def raising() -> int:
        raise InvalidArgumentError(error.format_message().rstrip("."), hint=_help_hint(error)) from error

    return with_json_errors(raising, as_json="--json" in own, debug=False)


def _help_hint(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"see {context.command_path if context else 'unisandbox'} --help"


@click.group(context_settings=_SETTINGS, invoke_without_command=True)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Run programs in sandboxes on this machine: no daemon, nothing is left behind."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


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
        return attrs.evolve(Resources.unlimited(), **given)
    return Resources(**given)


@cli.command(
    "run",
    context_settings={"allow_interspersed_args": False},
    short_help="Run a program in a new sandbox.",
    epilog="Exit code: the program's own; 128 + n when signal n ended it; 124 after --timeout; 127 when there is no "
    "such program, 126 when it cannot be executed; 125 for an error of unisandbox.",
)
@click.option("-d", "--detach", is_flag=True, help="Leave it running, and print its name or id.")
@click.option("--rm", "remove", is_flag=True, help="Remove the sandbox at the end: without -d that is so anyway.")
@process_options
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
@click.option(
    "--network", default="none", show_default=True, metavar="none|user|host|PATH", help="PATH: of a namespace."
)
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
@click.option("--ttl", type=float, metavar="SECONDS", help="With -d: remove the sandbox after that long.")
@STATE
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object at the end, with the output in it.")
@click.option("--debug", is_flag=True, help="Show a traceback and the backend's log with an error.")
@click.argument("argv", nargs=-1, required=True, metavar="PROGRAM [ARGUMENT]...", type=click.UNPROCESSED)
@click.pass_context
def run_command(
    context: click.Context,
    argv: tuple[str, ...],
    detach: bool,
    remove: bool,
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
    ttl: float | None,
    state: str | None,
    as_json: bool,
    debug: bool,
) -> int:
    """Run PROGRAM in a new sandbox, which is removed at its end. Output, exit code and signals pass through.

    With -d it runs on when this command has ended: see ps, logs, exec, stop and rm.

    The program sees this host's /usr and nothing of your files, has no network and limited memory, processes and disk;
    the options below change that. Its files are /tmp, /run and /home, or with --rootfs DIR a private layer over DIR.

    Signals go to the program, which decides what they do; SIGINT (Ctrl-C) three times within 2 seconds kills it. Ctrl-Z
    stops this command only. With -it keys are the program's own, Ctrl-C and Ctrl-Z too.
    """

    def work() -> int:
        import anyio

        from unisandbox.cli.run import NewSandbox, Request
        from unisandbox.cli.sandboxes import Program

        variables = own_terminal(pairs(env), tty=tty, as_json=as_json)
        if timeout is not None and not timeout > 0:
            raise InvalidArgumentError(f"--timeout must be > 0 seconds, got {timeout:g}")
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
        if detach:
            _refuse("-d", {"-i": interactive, "-t": tty}, "A detached program has no standard input and no terminal.")
            _refuse("-d", {"--timeout": timeout is not None}, "--ttl ends it in time.")
            _refuse("-d", {"--rm": remove}, "--ttl removes it in time, unisandbox rm -f at once.")
            if ttl is not None and not ttl > 0:
                raise InvalidArgumentError(f"--ttl must be > 0 seconds, got {ttl:g}")
            program = Program(argv, variables, workdir, user)
            # For what exec runs beside it, too.
            options |= {"env": variables, "cwd": "/" if workdir is None else workdir, "user": user, "ttl": ttl}
            return anyio.run(launch_detached(state, options, program, as_json=as_json))
        # The environment's word is for the commands that use it.
        told = context.get_parameter_source("state") is ParameterSource.COMMANDLINE
        _refuse("run without -d", {"--ttl": ttl is not None, "--state": told}, "Leave it out, or give -d.")
        return attend(
            Request(
                argv=argv,
                place=NewSandbox(options),
                env=variables,
                cwd=workdir,
                user=user,
                interactive=interactive,
                tty=tty,
                timeout=timeout,
                collect=LARGEST_OUTPUT if as_json else None,
            )
        )

    return with_json_errors(work, as_json=as_json, debug=debug)


def _refuse(what: str, options: Mapping[str, bool], hint: str) -> None:
    for name, given in options.items():
        if given:
            raise InvalidArgumentError(f"{name} cannot be used with {what}", hint=hint)


@cli.command(short_help="Say what can run on this host, and what to do where something cannot.")
@click.option("--deep", is_flag=True, help="Run something for real, instead of only looking.")
@click.option("--fix", is_flag=True, help="Remove what crashes have left over.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def doctor(deep: bool, fix: bool, as_json: bool, debug: bool) -> int:
    """Say what this host is, which backends can run on it, and what to do where one cannot.

    Also what crashes have left over: what has the mark of an engine that does not live any more. With --fix that is
    removed, and never anything else. Exit code: 0 when at least one backend can run and nothing that --fix was to
    remove is left, else 1.
    """

    def work() -> int:
        import anyio

        from unisandbox.cli.doctor import examine

        async def main() -> int:
            report = await examine(deep=deep, fix=fix)
            with answering():
                click.echo(json.dumps(report.as_json()) if as_json else "\n".join(report.lines()))
            return report.code

        return anyio.run(main)

    return with_json_errors(work, as_json=as_json, debug=debug)


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
            answer(json.dumps(results.as_json()) if as_json else "\n".join(results.lines()))

        anyio.run(main)
        return 0

    return with_json_errors(work, as_json=as_json, debug=debug)


@cli.command(short_help="Serve pods to containerd and iSulad.")
@click.option("--root", metavar="DIR", help="State of the pods.  [default: /run/unisandbox-serve]")
@click.option("--socket", metavar="PATH", help="Of the controller.  [default: /run/unisandbox/serve/sandboxer.sock]")
@click.option("--config", metavar="FILE", help="TOML; the options above count more.")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def serve(root: str | None, socket: str | None, config: str | None, debug: bool) -> int:
    """Serve the Sandbox API to container engines on unix sockets, until SIGTERM. The pods live on after that.

    Works as a systemd service (Type=notify), also with socket activation. See docs/serve.md.
    """

    def work() -> int:
        from importlib import import_module

        # Another face, which needs packages of its own and is nothing that this one builds on.
        try:
            daemon, settings = import_module("unisandbox.serve.daemon"), import_module("unisandbox.serve.config")
        except ModuleNotFoundError as error:
            raise UnavailableError(
                f"serving needs {error.name}, which is missing", hint="pip install 'unisandbox[cli,serve]'"
            ) from error
        given = {name: value for name, value in (("root", root), ("socket", socket)) if value is not None}
        daemon.main(attrs.evolve(settings.read(config) if config else settings.ServeConfig(), **given))
        return 0

    return with_json_errors(work, as_json=False, debug=debug)


for _command in COMMANDS:
    cli.add_command(_command)
