"""The subcommands of ``gradreg``: each is a module with ``Config``, ``run``, ``table`` and
``plot``.
"""

import functools
import operator
import os
import sys
from types import ModuleType
from typing import Annotated, Any

import tyro

from gradreg_optax.experiments import (
    common,
    compare,
    cost,
    flatness,
    flooding,
    frontier,
    implicit_bias,
    language,
    late,
    results,
    strength,
    sweep,
)
from gradreg_optax.experiments.common import CommandError

_MODULES: tuple[ModuleType, ...] = (compare, sweep, cost, implicit_bias, flooding)
_MODULES += (frontier, strength, late, flatness, language)
# each by the name of its module
COMMANDS = {common.option(module.__name__.rpartition(".")[2]): module for module in _MODULES}


def run(arguments: list[str] | None = None) -> None:
    """Parses the command line, runs the experiment, prints its table, and writes ``results.json``
    and the figures.

    Args:
      arguments: the command line, by default that of the process.

    Raises:
      SystemExit: the command line is wrong, the data are not there, settings do not fit together,
        or the run is interrupted. Any other error is a fault of the program, and keeps its trace.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = f"gradreg {arguments[0]}" if arguments else "gradreg"
    try:
        if arguments == ["--version"]:
            print(f"gradreg {results.versions()['gradreg-optax']}")
        else:
            _run(*parse(arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; all files are written by then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except CommandError as error:
        raise SystemExit(f"{name}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def parse(arguments: list[str]) -> tuple[str, ModuleType, Any]:
    """The command, its module and its configuration."""
    choices: list[Any] = []
    for name, module in COMMANDS.items():
        summary = " ".join((module.__doc__ or "").split("\n\n")[0].split())
        choice = tyro.conf.subcommand(name, description=summary)
        choices.append(Annotated[module.Config, choice])
    config = tyro.cli(
        functools.reduce(operator.or_, choices),
        prog="gradreg",
        description=(
            "The experiments of 'Understanding Gradient Regularization in Deep Learning' (Karakida"
            " et al., ICML 2023). gradreg --version prints the version."
        ),
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    command = next(name for name, made in COMMANDS.items() if type(config) is made.Config)
    return command, COMMANDS[command], config


def _run(command: str, module: ModuleType, config: Any) -> None:
    if config.redraw:
        found = results.load(config.output, command)
    else:
        results.prepare(config.output)
        path = results.save(config.output, command, config, _interruptible(module, config))
        found = results.load(path, command)
        print(f"results: {path}")
    try:  # figures before anything is printed: a closed pipe loses none
        figures, text = module.plot(found, config.output), module.table(found)
    except (LookupError, TypeError, ValueError) as error:
        if not config.redraw:
            raise
        raise CommandError(
            f"{config.output} does not hold what gradreg {command} draws ({error!r}): run the"
            " command without --redraw."
        ) from error
    print("\n".join([text, *(f"figure: {figure}" for figure in figures)]))


def _interruptible(module: ModuleType, config: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = module.run(config)
    except KeyboardInterrupt:
        parts = config.output / "parts"
        kept = f"{len(list(parts.glob('*.json')))} finished parts are in {parts}"
        said = f"\ninterrupted; {kept}: the same command goes on where it stopped."
        print(said, file=sys.stderr)
        raise
    return found
