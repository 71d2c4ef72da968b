"""Command line shared by ``gradreg`` and ``python -m studies``.

A command is a module with ``Config``, ``run``, ``table`` and ``plot``. This module imports neither
JAX nor a command before one is chosen, so that ``--help`` and ``--version`` answer at once.
"""

import difflib
import functools
import importlib
import importlib.metadata
import os
import signal
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


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
        """Import the module of a command.

        Raises:
          SystemExit: a package of the ``experiments`` extra is missing.
        """
        try:
            importlib.import_module("tyro")
            return importlib.import_module(f"{self.package}.{command.replace('-', '_')}")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith(("gradreg_optax", "studies")):  # a bug of our own
                raise
            raise SystemExit(
                f"{self.name} {command} needs the experiments extra ({error}). Run pip install"
                ' "gradreg-optax[experiments]".'
            ) from error

    def listing(self) -> str:
        """Text of ``--help``."""
        width = max(len("--version"), *map(len, self.commands))
        lines = [f"usage: {self.name} COMMAND [OPTIONS]", "", textwrap.fill(self.summary, 100), ""]
        lines += ["commands:"]
        lines += [f"  {name:<{width}}  {one.summary}" for name, one in self.commands.items()]
        lines += ["", "options:", f"  {'--help':<{width}}  Show this message."]
        lines += [f"  {'--version':<{width}}  Show the version.", ""]
        return "\n".join([*lines, f"Run {self.name} COMMAND --help for the options of a command."])

    def unknown(self, command: str) -> str:
        """Error for a name that is not a command."""
        close = difflib.get_close_matches(command, self.commands, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return (
            f"{self.name}: unknown command {command!r}.{hint} Run {self.name} --help for the list."
        )


def main(program: Program) -> None:
    """Run the command line of this process; Ctrl-C ends it with exit code 130.

    Args:
      program: the commands.
    """
    signal.signal(signal.SIGINT, functools.partial(_interrupted, None))
    chosen = parse(program, sys.argv[1:])
    if chosen is not None:
        signal.signal(signal.SIGINT, functools.partial(_interrupted, chosen[1].output))
        execute(program, *chosen)


def run(program: Program, arguments: Sequence[str]) -> None:
    """Parse a command line, run the experiment, print its table, and write results and figures.

    Args:
      program: the commands.
      arguments: the command line without the program's name.

    Raises:
      SystemExit: the command line is wrong, data are missing, or settings do not fit together. Any
        other error is a bug and keeps its traceback.
    """
    chosen = parse(program, arguments)
    if chosen is not None:
        execute(program, *chosen)


def parse(program: Program, arguments: Sequence[str]) -> tuple[str, Any] | None:
    """Return the command and its configuration; None after ``--help`` or ``--version``."""
    if not arguments:
        sys.exit(f"{program.listing()}\n\n{program.name}: a command is required.")
    command, *rest = arguments
    if command in ("--help", "-h", "--version"):
        version = f"{program.name} {importlib.metadata.version('gradreg-optax')}"
        print(version if command == "--version" else program.listing())
        return None
    if command not in program.commands:
        print(program.unknown(command), file=sys.stderr)
        sys.exit(2)
    return command, _config(program, command, rest)


def _config(program: Program, command: str, arguments: Sequence[str]) -> Any:
    """Parse the options of a command."""
    module, (summary, duration, example) = program.module(command), program.commands[command]
    import tyro

    from gradreg_optax.experiments.common import CommandError

    called = f"{program.name} {command}"
    text = f"{summary}\n\nTakes about {duration}.\n\nExample: {called} {example}"
    options = tyro.cli(_unchecked(module.Config), prog=called, description=text, args=arguments)
    try:
        return module.Config(**vars(options))
    except CommandError as error:
        print(f"{called}: {error} See {called} --help.", file=sys.stderr)
        sys.exit(2)


def _unchecked(config: Any) -> Any:
    """Return a subclass without validation, whose errors tyro would print with the class's name."""
    return type(
        "Options", (config,), {"__post_init__": lambda self: None, "__doc__": config.__doc__}
    )


def execute(program: Program, command: str, config: Any) -> None:
    """Run a command with its configuration, or draw its results again."""
    from gradreg_optax.experiments.common import CommandError

    try:
        _execute(program, command, config)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe; all files are written by then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except CommandError as error:
        raise SystemExit(f"{program.name} {command}: {error}") from error


def _execute(program: Program, command: str, config: Any) -> None:
    from gradreg_optax.experiments import results
    from gradreg_optax.experiments.common import CommandError

    module, called = program.module(command), f"{program.name} {command}"
    if config.redraw:
        found = results.load(config.output, command)
    else:
        results.prepare(config.output)
        path = results.save(config.output, called, config, module.run(config))
        found = results.load(path, command)
        print(f"results: {path}")
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


def _interrupted(output: Path | None, *_: Any) -> None:
    """Leave at once: threads that still compile must not outlive the interpreter."""
    message = "\ninterrupted"
    if output is not None:
        parts = output / "parts"
        count = len(list(parts.glob("*.json")))
        message += f": {count} finished parts are in {parts}. Run the same command to resume"
    os.write(2, f"{message}.\n".encode())
    os._exit(130)
