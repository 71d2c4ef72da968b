"""The subcommands of ``gradreg``: each is a module with ``Config``, ``run``, ``table`` and
``plot``.
"""

import dataclasses
import functools
import operator
from types import ModuleType
from typing import Annotated, Any

import tyro

from gradreg_optax.experiments import results
from gradreg_optax.experiments.registry import COMMANDS


def run(arguments: list[str] | None = None) -> None:
    """Parses the command line, runs the experiment, prints its table, and writes ``results.json``
    and the figures.

    Args:
      arguments: the command line, by default that of the process.

    Raises:
      SystemExit: the command line is wrong, the data are not there, settings do not fit together,
        or the run is interrupted.
    """
    command, module, config = parse(arguments)
    try:
        _run(command, module, config)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"gradreg {command}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _run(command: str, module: ModuleType, config: Any) -> None:
    if config.redraw:
        found = results.load(config.output)
    else:
        found = results.plain(module.run(config))
        path = results.save(config.output, command, config, found)
        found = results.load(path)
        print(f"results: {path}")
    figures = module.plot(
        found, config.output
    )  # before anything is printed: a closed pipe loses no figure
    print(module.table(found))
    for figure in figures:
        print(f"figure: {figure}")


def parse(arguments: list[str] | None = None) -> tuple[str, ModuleType, Any]:
    """The command, its module and its configuration."""
    choices: list[Any] = [
        Annotated[
            module.Config,
            tyro.conf.subcommand(name, description=(module.__doc__ or "").strip().splitlines()[0]),
        ]
        for name, module in COMMANDS.items()
    ]
    config = tyro.cli(
        functools.reduce(operator.or_, choices),
        prog="gradreg",
        description=(
            "The experiments of 'Understanding Gradient Regularization in Deep Learning' (Karakida"
            " et al., ICML 2023)."
        ),
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    command, module = next(
        (name, module) for name, module in COMMANDS.items() if type(config) is module.Config
    )
    assert dataclasses.is_dataclass(config)
    return command, module, config
