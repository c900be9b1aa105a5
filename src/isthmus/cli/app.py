"""The root command. A command's module is imported when it is used, so that `isthmus --help` is quick."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import click

from .output import EXIT_FAILED, Problem

#: Command: where it is, and its line in the help.
COMMANDS: dict[str, tuple[str, str]] = {
    "broker": ("isthmus.cli.broker:broker", "Run the broker of this node in the foreground."),
    "switch": ("isthmus.cli.switch:switch", "Run the switch for guests; the broker starts it."),
    "card": ("isthmus.cli.card:card", "Lend a network interface to domains, for MX."),
    "agent": ("isthmus.cli.agent:agent", "Run the agent of a guest."),
    "vm": ("isthmus.cli.vm:vm", "Small guests, and how to attach your own."),
    "run": ("isthmus.cli.run:run", "Run an unmodified program, directly to its neighbours."),
    "forward": ("isthmus.cli.forward:forward", "Between this domain and Unix or TCP sockets."),
    "domain": ("isthmus.cli.domain:domain", "Add, list and remove domains."),
    "status": ("isthmus.cli.status:status", "Show domains, connections and their paths."),
    "explain": ("isthmus.cli.explain:explain", "Which path from one domain to another, and why."),
    "resolve": ("isthmus.cli.resolve:resolve", "The number of a domain, for AF_VSOCK."),
    "reload": ("isthmus.cli.reload:reload", "Read the policy file again."),
    "metrics": ("isthmus.cli.metrics:metrics", "Print the figures for Prometheus."),
    "mx": ("isthmus.cli.mx:mx", "MX: what C programs are compiled and linked with."),
    "doctor": ("isthmus.cli.doctor:doctor", "Check this machine, and say what to do."),
    "bench": ("isthmus.bench.cli:bench_group", "Measure, side by side with what you use today."),
    "demo": ("isthmus.demo:main", "Two isolated neighbours at work."),
    "completion": ("isthmus.cli.completion:completion", "Print the completion script for a shell."),
}


class LazyGroup(click.Group):
    """A group whose commands are known by name and imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module_name, _, attribute = COMMANDS[cmd_name][0].partition(":")
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing == module_name or module_name.startswith(missing + "."):
                raise Problem(f"{cmd_name}: not part of this installation") from None
            extra = "bench" if cmd_name in ("bench", "demo") else "cli"
            raise Problem(f"{cmd_name}: {missing} is not installed; pip install 'isthmus[{extra}]'") from None
        if isinstance(found, click.Command):
            return found
        return _wrapped(cmd_name, found)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _wrapped(name: str, function: Any) -> click.Command:
    """A command from a plain ``main(arguments) -> exit code``."""

    @click.command(
        name,
        help=COMMANDS[name][1],
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> None:
        code = function(list(arguments))
        if code:
            sys.exit(code)

    return command


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"isthmus {version('isthmus')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.option("--dir", "directory", type=click.Path(), help="Runtime directory of the broker [ISTHMUS_DIR].")
@click.pass_context
def root(ctx: click.Context, as_json: bool, directory: str | None) -> None:
    """A high-performance interconnect between isolated containers and virtual machines on one node.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no broker.
    """
    ctx.obj = {"json": as_json, "dir": directory}


def run() -> None:
    """Run the command line; errors are one line, or one JSON object with --json."""
    try:
        code = root.main(prog_name="isthmus", standalone_mode=False)
    except Problem as problem:
        if "--json" in sys.argv:
            print(json.dumps({"ok": False, "error": problem.message, "exit": problem.exit_code}))
        else:
            print(f"isthmus: {problem.message}", file=sys.stderr)
        sys.exit(problem.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Somebody looked at the first lines only.
        sys.stderr.close()
        sys.exit(EXIT_FAILED)
    sys.exit(code if isinstance(code, int) else 0)
