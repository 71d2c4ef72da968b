"""Command line shared by ``gradreg`` and ``python -m studies``.

A command is a module with ``Config``, ``run``, ``table`` and ``plot``. This module imports neither
JAX nor a command before one is chosen, so that ``--help`` and ``--version`` answer at once.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradreg_optax.experiments.common import CommandError


class Command(NamedTuple):
    """One line of the listing, and two of the command's own help.

    Attributes:
      summary: what the command shows.
      duration: how long it takes with its defaults.
      example: arguments of an example.
    """

    summary: str
    duration: str
    example: str


class Program(NamedTuple):
    """A set of commands.

    Attributes:
      name: how a user calls it.
      package: the package that holds a module for each command.
      summary: what the commands have in common.
      commands: the commands by name.
    """

    name: str
    package: str
    summary: str
    commands: Mapping[str, Command]

    def module(self, command: str) -> Any:
        """Import the module of a command."""
        return importlib.import_module(f"{self.package}.{command.replace('-', '_')}")


def main(program: Program) -> None:
    """Run the command line of this process; Ctrl-C ends it with exit code 130.

    Args:
      program: the commands.
    """
    signal.signal(signal.SIGINT, _interrupted)
    run(program, sys.argv[1:])


def run(program: Program, arguments: Sequence[str]) -> None:
    """Parse a command line, run the experiment, print its table, and write results and figures.

    Args:
      program: the commands.
      arguments: the command line without the program's name.

    Raises:
      SystemExit: after ``--help`` and ``--version``; or the command line is wrong, a package or
        data are missing, or settings do not fit together. Any other error is a bug and keeps its
        traceback.
    """
    try:
        _execute(program, *parse(program, arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe; all files are written by then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except CommandError as error:
        raise SystemExit(f"{program.name} {arguments[0]}: {error}") from error
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("gradreg_optax", "studies")):  # a bug of our own
            raise
        raise SystemExit(
            f"{program.name} {arguments[0]} needs the experiments extra ({error}). Run pip install"
            ' "gradreg-optax[experiments]".'
        ) from error


def parse(program: Program, arguments: Sequence[str]) -> tuple[str, Any]:
    """Return the command and its configuration."""
    parser = argparse.ArgumentParser(
        program.name,
        description=program.summary,
        epilog=f"Run {program.name} COMMAND --help for the options of a command.",
    )
    version = f"{program.name} {importlib.metadata.version('gradreg-optax')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name")
    for name, command in program.commands.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2, f"\n{program.name}: a command is required.\n")
    for known in difflib.get_close_matches(arguments[0], program.commands, n=1):
        if known != arguments[0]:
            parser.error(f"no command {arguments[0]!r}. Did you mean {known!r}?")
    chosen: str = parser.parse_args(arguments[:1]).name
    return chosen, _config(program, chosen, arguments[1:])


def _config(program: Program, command: str, arguments: Sequence[str]) -> Any:
    """Parse the options of a command."""
    import tyro

    summary, duration, example = program.commands[command]
    called = f"{program.name} {command}"
    text = f"{summary}\n\nTakes about {duration}.\n\nExample: {called} {example}"
    config = program.module(command).Config
    try:
        return tyro.cli(config, prog=called, description=text, args=arguments)
    except CommandError as error:
        print(f"{called}: {error} See {called} --help.", file=sys.stderr)
        sys.exit(2)


def _execute(program: Program, command: str, config: Any) -> None:
    """Run a command with its configuration, or draw its results again."""
    from gradreg_optax.experiments import results

    module, called = program.module(command), f"{program.name} {command}"
    if not config.redraw:
        results.check_writable(config.output)
        path = results.save(config.output, called, config, module.run(config))
        print(f"results: {path}")
    found = results.load(config.output, command)
    try:  # figures before anything is printed: a closed pipe loses none
        figures = module.plot(found, config.output, config.format)
        table = module.table(found)
    except (LookupError, TypeError, ValueError) as error:
        if not config.redraw:
            raise
        raise CommandError(
            f"{config.output} does not hold results of this version of {called} ({error!r}). Run"
            " the command without --redraw."
        ) from error
    (config.output / "table.csv").write_text(table.csv())
    lines = [table, f"table: {config.output / 'table.csv'}"]
    print("\n".join([*lines, *(f"figure: {figure}" for figure in figures)]))


def _interrupted(*_: Any) -> None:
    """Leave at once: threads that still compile must not outlive the interpreter."""
    os.write(2, b"\ninterrupted: finished parts are kept. Run the same command to resume.\n")
    os._exit(130)
