"""What the commands share: fields of their configurations, their errors, and their progress bar."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from tqdm import tqdm


class CommandError(ValueError):
    """Settings, data or files that a command cannot work with; one sentence says what to do."""


class MissingError(FileNotFoundError, CommandError):
    """A file that is not there and cannot be had; one sentence says what to do."""


@dataclasses.dataclass(frozen=True)
class Common:
    """What every command takes."""

    output: Path = Path("results")
    """Folder for results.json, the figures and the finished parts, where a second start goes on."""
    seed: int = 0
    """The first seed."""
    redraw: bool = False
    """Print the table and draw the figures from the results on disk, without a run."""
    format: tuple[Literal["png", "pdf", "svg"], ...] = ("png",)
    """File formats of the figures."""

    from_zero: ClassVar[tuple[str, ...]] = ("seed",)
    """The whole numbers that may be zero; all others count something."""

    def __post_init__(self) -> None:
        """Checks the whole numbers."""
        whole = [field.name for field in dataclasses.fields(self) if field.type in _WHOLE]
        at_least(self, 0, *self.from_zero)
        at_least(self, 1, *(name for name in whole if name not in self.from_zero))


_WHOLE = (int, int | None, tuple[int, ...])


@dataclasses.dataclass(frozen=True)
class Training(Common):
    """What every command takes that trains networks on a data set."""

    train_size: int | None = None
    """Number of training samples; by default 300 of digits, 1000 of fashion-mnist, else all."""
    test_size: int | None = None
    """Number of test samples; by default 1000 of digits, else all."""
    label_noise: float | None = None
    """Share of the training samples with a wrong label; by default 0.3 for digits, none for
    others."""
    steps: int = 3000
    """Training steps."""

    def sizes(self, dataset: str) -> dict[str, Any]:
        """Sizes, share of wrong labels and steps, for :class:`trainer.Recipe`."""
        usual = {"train_size": None, "test_size": None, "label_noise": 0.0}
        usual |= _SIZES.get(dataset, {}) | {"steps": self.steps}
        given = {name: getattr(self, name) for name in usual}
        return usual | {name: value for name, value in given.items() if value is not None}


_SIZES: dict[str, dict[str, Any]] = {
    "digits": {"train_size": 300, "test_size": 1000, "label_noise": 0.3},
    "fashion-mnist": {"train_size": 1000},
}


@dataclasses.dataclass(frozen=True)
class OnData(Training):
    """What every command takes that trains on a data set to choose."""

    dataset: str = "digits"
    """digits, mnist1d, fashion-mnist, or the path of an .npz file with x_train, y_train, x_test,
    y_test."""
    data_dir: Path | None = None
    """Folder with the files of fashion-mnist; by default $GRADREG_DATA, the Debian package, the
    cache, the network."""


def at_least(config: Any, least: float, *names: str) -> None:
    """Checks that fields, or all values in them, are not below ``least``.

    Raises:
      CommandError: one is, or a field of several values has none.
    """
    for name in names:
        values = getattr(config, name)
        values = values if isinstance(values, tuple) else (values,)
        if not values:
            raise CommandError(f"{name} must hold at least one value: leave --{option(name)} away.")
        for value in values:
            if value is not None and not least <= value < float("inf"):
                raise CommandError(f"{name} must be at least {least:g}, got {value:g}.")


def above_zero(config: Any, *names: str) -> None:
    """Checks that all values of fields are positive.

    Raises:
      CommandError: one is not, or a field has none.
    """
    at_least(config, 0, *names)
    for name in names:
        if not np.all(getattr(config, name)):
            raise CommandError(f"{name} must be above 0, got 0: use DB for the limit of zero.")


def some_of(name: str, values: Iterable[str], known: Iterable[str], remedy: str = "") -> None:
    """Checks names.

    Raises:
      CommandError: none, or one that is not known.
    """
    known, values = list(known), list(values)
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        got = ", ".join(unknown) or "none"
        raise CommandError(f"{name} must be some of {', '.join(known)}, got {got}{remedy}.")


def settings(config: Any) -> dict[str, Any]:
    """The fields that numbers depend on."""
    left = ("output", "redraw", "format")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in left}


def option(name: str) -> str:
    """A field as the command line spells it."""
    return name.replace("_", "-")


def progress(total: int, what: str, unit: str) -> "tqdm[Any]":
    """A progress bar on a terminal, and nothing in a log."""
    return tqdm(total=total, desc=what, unit=unit, disable=None, leave=False)
