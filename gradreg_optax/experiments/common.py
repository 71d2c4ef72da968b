"""Options, errors, checks and the progress bar that the commands share."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal


class CommandError(Exception):
    """An error of the user: settings, data or files that a command cannot use."""


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every command."""

    output: Path = Path("results")
    """Output directory. Rerun with the same directory to resume."""
    seed: int = 0
    """First seed."""
    redraw: bool = False
    """Print the table and draw the figures from existing results."""
    format: tuple[Literal["png", "pdf", "svg"], ...] = ("png",)
    """File formats of the figures."""

    from_zero: ClassVar[tuple[str, ...]] = ("seed",)
    """Integer options that may be 0; all others must be positive."""

    def __post_init__(self) -> None:
        """Check the integers."""
        integers = (int, int | None, tuple[int, ...])
        names = [field.name for field in dataclasses.fields(self) if field.type in integers]
        at_least(self, 0, *self.from_zero)
        at_least(self, 1, *(name for name in names if name not in self.from_zero))


@dataclasses.dataclass(frozen=True)
class Training(Common):
    """Options of every command that trains networks on a data set."""

    train_size: int | None = None
    """Number of training samples; by default 300 for digits, else all."""
    test_size: int | None = None
    """Number of test samples; by default 1000 for digits, else all."""
    label_noise: float | None = None
    """Fraction of training samples with label noise; by default 0.3 for digits, else 0."""
    steps: int = 3000
    """Number of training steps."""

    def sizes(self, dataset: str) -> dict[str, Any]:
        """Return sizes, label noise and steps, as arguments of :class:`trainer.Recipe`."""
        values = {"train_size": None, "test_size": None, "label_noise": 0.0, "steps": self.steps}
        values |= _DIGITS if dataset == "digits" else {}
        given = {name: getattr(self, name) for name in values}
        return values | {name: value for name, value in given.items() if value is not None}


_DIGITS = {"train_size": 300, "test_size": 1000, "label_noise": 0.3}


def at_least(config: Any, least: float, *names: str) -> None:
    """Check that fields, or all values in them, are finite and at least ``least``.

    Raises:
      CommandError: a value is smaller, or a field with several values is empty.
    """
    _check(config, names, lambda value: least <= value < math.inf, f"at least {least:g}")


def at_most(config: Any, most: float, *names: str) -> None:
    """Check that fields are at most ``most``.

    Raises:
      CommandError: a value is larger.
    """
    _check(config, names, lambda value: value <= most, f"at most {most:g}")


def above_zero(config: Any, *names: str) -> None:
    """Check that all values of fields are positive and finite.

    Raises:
      CommandError: a value is not, or a field with several values is empty.
    """
    _check(config, names, lambda value: 0 < value < math.inf, "above 0")


def _check(config: Any, names: Iterable[str], allowed: Callable[[Any], bool], what: str) -> None:
    for name in names:
        values = getattr(config, name)
        if values == ():
            option = name.replace("_", "-")
            raise CommandError(
                f"{name} must hold at least one value. Omit --{option} for the default."
            )
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not allowed(value):
                raise CommandError(f"{name} must be {what}, got {value:g}.")


def some_of(name: str, values: Iterable[str], known: Iterable[str], remedy: str = "") -> None:
    """Check that values are known.

    Raises:
      CommandError: there are none, or one is unknown.
    """
    known, values = list(known), list(values)
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        got = ", ".join(unknown) or "none"
        raise CommandError(f"{name} must be some of {', '.join(known)}, got {got}.{remedy}")


def settings(config: Any) -> dict[str, Any]:
    """Return the fields that the numbers depend on."""
    presentation = ("output", "redraw", "format")
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in presentation}


def progress(what: str, unit: str, over: Iterable[Any], total: int | None = None) -> Any:
    """Iterate with a progress bar, which is hidden where stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(over, what, total, unit=unit, disable=None, leave=False)
