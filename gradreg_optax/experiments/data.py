"""Data sets, and the training and test samples and label noise that a seed draws from them."""

import dataclasses
import functools
import importlib.metadata
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from gradreg_optax.experiments import common
from gradreg_optax.experiments.common import CommandError

Array: TypeAlias = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
      name: its name, or the name of the user's file.
      train_x: training inputs, shape (samples, ...); images are (samples, height, width, channels).
      train_y: training labels, integers from 0, shape (samples,); for sequences with a label at
        every position, (samples, length).
      test_x: test inputs.
      test_y: test labels.
      classes: number of classes.
      scale: the largest possible value of an input; 1 for floats.
      resplit: there is no official test set, so every seed splits the samples anew.
      tokens: inputs are token ids, which are passed to the network unchanged.
    """

    name: str
    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    classes: int
    scale: float
    resplit: bool = False
    tokens: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train_x.shape[1:])

    @functools.cached_property
    def mean(self) -> float:
        """Mean of the training inputs divided by ``scale``; models see ``x / scale - mean``."""
        return float(np.mean(self.train_x, dtype=np.float64) / self.scale)

    @property
    def inputs(self) -> Array:
        """All inputs, training before test; a :class:`Split` indexes them."""
        return np.concatenate([self.train_x, self.test_x])

    @property
    def labels(self) -> Array:
        """All labels, training before test."""
        return np.concatenate([self.train_y, self.test_y]).astype(np.int32)


class Split(NamedTuple):
    """The samples that one seed draws from a data set.

    Attributes:
      train: indices of the training samples in ``Dataset.inputs``; shape (train_size,).
      train_labels: their labels, with label noise.
      test: indices of the test samples; shape (test_size,). Their labels have no noise.
    """

    train: Any
    train_labels: Any
    test: Any


def load(name: str) -> Dataset:
    """Read a data set.

    ``digits`` is part of scikit-learn. ``mnist1d`` is generated once by the package of that name.
    A path that ends in ``.npz`` is a file with the arrays ``x_train``, ``y_train``, ``x_test`` and
    ``y_test``, see :func:`from_arrays`.

    Args:
      name: "digits", "mnist1d", or the path of an ``.npz`` file.

    Raises:
      CommandError: an unknown name, or a file that is missing or has unexpected content.
    """
    if name.endswith(".npz"):
        return dataclasses.replace(from_arrays(name, *_npz(Path(name))), name=Path(name).stem)
    readers = {"digits": _digits, "mnist1d": _mnist1d}
    common.some_of("dataset", [name], readers, " Or pass the path of an .npz file.")
    return readers[name]()


def draw(
    dataset: Dataset,
    seed: int,
    train_size: int | None = None,
    test_size: int | None = None,
    label_noise: float = 0.0,
) -> Split:
    """Draw a training set with label noise and a test set, determined by the seed.

    Args:
      dataset: the data set.
      seed: a non-negative integer.
      train_size: number of training samples; all by default.
      test_size: number of test samples; all by default (all that are left, if the data set has no
        official test set).
      label_noise: fraction of the training samples whose label is replaced by another class,
        rounded to whole samples.

    Raises:
      CommandError: more samples than there are, or a fraction outside [0, 1].
    """
    if not 0 <= label_noise <= 1:
        raise CommandError(f"label_noise must be in [0, 1], got {label_noise}.")
    rng = np.random.default_rng([seed, 2023])
    known, held = len(dataset.train_x), len(dataset.test_x)
    if dataset.resplit:
        train_size = known if train_size is None else train_size
        order = rng.permutation(known + held)
        pool, rest = order[:train_size], order[train_size:]
    else:
        pool, rest = rng.permutation(known), known + rng.permutation(held)
    train, test = _first("train_size", pool, train_size), _first("test_size", rest, test_size)
    labels = dataset.labels[train]
    noisy = rng.permutation(len(labels))[: round(label_noise * len(labels))]
    shift = rng.integers(1, dataset.classes, labels[noisy].shape)
    labels[noisy] = (labels[noisy] + shift) % dataset.classes
    return Split(train.astype(np.int32), labels.astype(np.int32), test.astype(np.int32))


def cache() -> Path:
    """Return the directory for downloaded files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradreg_optax"


def _first(name: str, order: Array, size: int | None) -> Array:
    size = len(order) if size is None else size
    if not 0 < size <= len(order):
        raise CommandError(
            f"{name} must be between 1 and {len(order)}, the number of samples, got {size}."
        )
    return order[:size]


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = digits.images.astype(np.uint8)[..., None], digits.target.astype(np.int32)
    parts = x[:-1000], y[:-1000], x[-1000:], y[-1000:]
    return Dataset("digits", *parts, classes=10, scale=16.0, resplit=True)


def _mnist1d() -> Dataset:
    """Generate the data set with the package of its authors, in some seconds, and cache it."""
    path = cache() / f"mnist1d-{importlib.metadata.version('mnist1d')}.npz"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.npz")
        try:  # in a process of its own, because the package seeds the global generators
            path.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, "-c", _MAKE_MNIST1D, partial], check=True, text=True)
            partial.replace(path)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CommandError(f"mnist1d: cannot generate {path} ({error}).") from error
    return from_arrays("mnist1d", *_npz(path))


# The published data set: 4000 training and 1000 test samples of 40 numbers.
_MAKE_MNIST1D = """
import sys, numpy
from mnist1d.data import get_dataset_args, make_dataset
made = make_dataset(get_dataset_args())
x, x_test = (made[name].astype("float32") for name in ("x", "x_test"))
numpy.savez(sys.argv[1], x_train=x, y_train=made["y"], x_test=x_test, y_test=made["y_test"])
"""


def _npz(path: Path) -> list[Array]:
    if not path.exists():
        raise CommandError(f"no file {path}: --dataset takes a name or the path of an .npz file.")
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            return [file[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    except (OSError, EOFError, LookupError, ValueError, TypeError, BadZipFile, zlib.error) as error:
        raise CommandError(
            f"{path} must be an .npz file of the plain arrays x_train, y_train, x_test and y_test"
            f" ({error})."
        ) from error


def from_arrays(
    name: str, x_train: Array, y_train: Array, x_test: Array, y_test: Array, *, classes: int = 0
) -> Dataset:
    """Make a data set from arrays.

    Args:
      name: its name in errors and tables.
      x_train: training inputs, shape (samples, ...), uint8 from 0 to 255 or finite floats; a
        channel axis is added to grey images (samples, height, width).
      y_train: training labels, integers from 0, shape (samples,).
      x_test: test inputs, of the same type and shape.
      y_test: test labels.
      classes: number of classes; by default (0) one more than the largest label.

    Raises:
      CommandError: inconsistent arrays.
    """
    arrays = (np.asarray(array) for array in (x_train, y_train, x_test, y_test))
    x_train, y_train, x_test, y_test = arrays
    most = classes or len(y_train) + len(y_test)
    for part, x, y in (("training", x_train, y_train), ("test", x_test, y_test)):
        if y.ndim != 1 or x.ndim < 2 or len(x) != len(y) or not x.size:
            raise CommandError(
                f"{name}: {part} inputs of shape {x.shape} and labels of shape {y.shape} do not"
                " match, or are empty."
            )
        finite = x.dtype.kind == "f" and np.max(np.abs(x)) <= np.finfo(np.float32).max
        integers = y.dtype.kind in "iu" and y.min() >= 0 and y.max() < most
        if not integers or not (finite or x.dtype == np.uint8):
            raise CommandError(
                f"{name}: {part} inputs must be uint8 from 0 to 255, or floats that are finite in"
                f" float32, and labels integers from 0 and below {most}, the number of classes or"
                f" of all samples. Got {x.dtype} and {y.dtype}."
            )
    if (x_train.shape[1:], x_train.dtype) != (x_test.shape[1:], x_test.dtype):
        raise CommandError(
            f"{name}: training inputs have shape {x_train.shape[1:]} and type {x_train.dtype}, test"
            f" inputs {x_test.shape[1:]} and {x_test.dtype}. Both must agree."
        )
    if x_train.ndim == 3:  # grey images without a channel
        x_train, x_test = x_train[..., None], x_test[..., None]
    scale = 255.0 if x_train.dtype == np.uint8 else 1.0
    classes = classes or int(max(y_train.max(), y_test.max())) + 1
    y_train, y_test = y_train.astype(np.int32), y_test.astype(np.int32)
    return Dataset(name, x_train, y_train, x_test, y_test, classes, scale)
