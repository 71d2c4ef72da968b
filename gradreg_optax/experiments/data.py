"""Real data sets in their original formats, the user's own arrays, and what a seed makes of them: a
subset, wrong labels, a test set.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import math
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gradreg_optax.experiments.common import CommandError, MissingError

Array: TypeAlias = npt.NDArray[Any]

NAMES = ("digits", "mnist1d", "fashion-mnist")
_PARTS = ("x_train", "y_train", "x_test", "y_test")
_FASHION = "fashion-mnist"
_FOLDERS = (_FASHION, "FashionMNIST/raw")
_DEBIAN = Path("/usr/share/datasets")
_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
# MNIST's files have the same names; md5 sums of them, unpacked.
_MNIST = (
    "6bbc9ace898e44ae57da46a324031adb",
    "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea",
    "27ae3e4e09519cfbb04c329615203637",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, as it is stored.

    Attributes:
      name: its name, or the name of the user's file.
      train_x: training inputs, shape (samples, ...); images are (samples, height, width, channels).
      train_y: training labels, shape (samples,), whole numbers from 0; of sequences that have a
        label at every place, (samples, length).
      test_x: test inputs.
      test_y: test labels.
      classes: number of classes.
      scale: the largest value that an input can take; 1 for inputs that are no whole numbers.
      resplit: there is no official test set, so every seed splits the samples anew.
      tokens: inputs are whole numbers that stand for something, and networks see them as they are.
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
        """The mean over all training inputs and their entries, divided by ``scale``: models see ``x
        / scale - mean``.
        """
        return float(np.mean(self.train_x, dtype=np.float64) / self.scale)

    @property
    def inputs(self) -> Array:
        """All inputs, training before test; :class:`Split` points into them."""
        return np.concatenate([self.train_x, self.test_x])

    @property
    def labels(self) -> Array:
        """All labels, training before test."""
        return np.concatenate([self.train_y, self.test_y]).astype(np.int32)


class Split(NamedTuple):
    """What one seed draws from a data set.

    Attributes:
      train: positions of the training samples in ``Dataset.inputs``; shape (train_size,).
      train_labels: their labels, some of them wrong.
      test: positions of the test samples; shape (test_size,). Their labels are those of the data
        set.
    """

    train: Any
    train_labels: Any
    test: Any


def load(name: str, root: Path | str | None = None) -> Dataset:
    """Reads a data set.

    ``digits`` comes with scikit-learn, and ``mnist1d`` is made by the package of that name, once.
    The files of ``fashion-mnist`` are looked for in ``root`` if it is given; otherwise in
    ``$GRADREG_DATA``, in the folder of the Debian package ``dataset-fashion-mnist``, in the cache
    ``~/.cache/gradreg_optax``, and are then fetched into that cache once, with a checksum. A path
    that ends in ``.npz`` is a file of the user's, with the arrays ``x_train``, ``y_train``,
    ``x_test`` and ``y_test``, see :func:`from_arrays`.

    Args:
      name: "digits", "mnist1d", "fashion-mnist", or the path of an ``.npz`` file.
      root: the folder that holds the files of fashion-mnist, themselves or in a folder of its name.

    Returns:
      The data set.

    Raises:
      MissingError: the files are not there and cannot be fetched.
      CommandError: an unknown name, or a file that is not what it should be.
    """
    if name.endswith(".npz"):
        made = from_arrays(name, *_npz(Path(name)))
        return dataclasses.replace(made, name=Path(name).stem)
    if name not in NAMES:
        raise CommandError(
            f"unknown data set {name!r}: choose one of {', '.join(map(repr, NAMES))}, or a path to"
            " an .npz file."
        )
    return {"digits": _digits, "mnist1d": _mnist1d}.get(name, lambda: _fashion_mnist(root))()


def draw(
    dataset: Dataset,
    seed: int,
    train_size: int | None = None,
    test_size: int | None = None,
    label_noise: float = 0.0,
) -> Split:
    """Draws a training set, wrong labels and a test set; the same seed draws the same.

    Args:
      dataset: the data set.
      seed: a whole number.
      train_size: number of training samples, by default all of them.
      test_size: number of test samples, by default all of them (all that are left, where the data
        set has no official test set).
      label_noise: the share of the training samples that get a label other than their own, rounded
        to whole samples.

    Returns:
      The split.

    Raises:
      CommandError: more samples than there are, or a share outside [0, 1].
    """
    if not 0 <= label_noise <= 1:
        raise CommandError(
            f"label_noise must lie in [0, 1], got {label_noise}: it is the share of wrong training"
            " labels."
        )
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
    wrong = rng.permutation(len(labels))[: round(label_noise * len(labels))]
    other = rng.integers(1, dataset.classes, labels[wrong].shape)
    labels[wrong] = (labels[wrong] + other) % dataset.classes
    return Split(train.astype(np.int32), labels.astype(np.int32), test.astype(np.int32))


def cache() -> Path:
    """The folder that keeps fetched files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradreg_optax"


def _first(name: str, order: Array, size: int | None) -> Array:
    size = len(order) if size is None else size
    if not 0 < size <= len(order):
        raise CommandError(
            f"{name} must lie between 1 and {len(order)}, the samples there are, got {size}."
        )
    return order[:size]


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CommandError(_extra("digits", "scikit-learn")) from error
    found = load_digits()
    x, y = found.images.astype(np.uint8)[..., None], found.target.astype(np.int32)
    parts = x[:-1000], y[:-1000], x[-1000:], y[-1000:]
    return Dataset("digits", *parts, classes=10, scale=16.0, resplit=True)


def _mnist1d() -> Dataset:
    """Made by the package of its authors in some seconds, and kept."""
    try:
        path = cache() / f"mnist1d-{importlib.metadata.version('mnist1d')}.npz"
    except importlib.metadata.PackageNotFoundError as error:
        raise CommandError(_extra("mnist1d", "the package mnist1d")) from error
    with contextlib.suppress(CommandError):  # not there yet, or cut short
        return from_arrays("mnist1d", *_npz(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.npz")
    try:  # in a process of its own: the package seeds the global generators
        subprocess.run([sys.executable, "-c", _MAKE_MNIST1D, partial], check=True, text=True)
        partial.replace(path)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CommandError(f"mnist1d could not be made in {path.parent} ({error}).") from error
    finally:
        partial.unlink(missing_ok=True)
    return from_arrays("mnist1d", *_npz(path))


# The published set: 4000 training and 1000 test samples of 40 numbers.
_MAKE_MNIST1D = """
import sys, numpy
from mnist1d.data import get_dataset_args, make_dataset
made = make_dataset(get_dataset_args())
x, x_test = (made[name].astype("float32") for name in ("x", "x_test"))
numpy.savez(sys.argv[1], x_train=x, y_train=made["y"], x_test=x_test, y_test=made["y_test"])
"""


def _extra(name: str, what: str) -> str:
    return f'{name} comes with {what}: pip install "gradreg-optax[experiments]".'


def _npz(path: Path) -> list[Array]:
    if not path.exists():
        raise MissingError(f"no file {path}: --dataset takes a name or the path of an .npz file.")
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            missing = [name for name in _PARTS if name not in file]
            if missing:
                raise CommandError(
                    f"{path} has no {', '.join(missing)}: it must hold x_train, y_train, x_test and"
                    " y_test."
                )
            return [file[name] for name in _PARTS]
    except CommandError:
        raise
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise CommandError(
            f"{path} is broken or no .npz file of plain arrays ({error})."
        ) from error


def from_arrays(
    name: str,
    x_train: Array,
    y_train: Array,
    x_test: Array,
    y_test: Array,
    *,
    classes: int | None = None,
) -> Dataset:
    """A data set of the user's own.

    Args:
      name: what errors and tables call it.
      x_train: training inputs, shape (samples, ...), uint8 from 0 to 255 or finite floats; grey
        images (samples, height, width) get a channel.
      y_train: training labels, shape (samples,), whole numbers from 0.
      x_test: test inputs, of the same type and shape.
      y_test: test labels.
      classes: number of classes, by default one more than the largest label.

    Returns:
      The data set.

    Raises:
      CommandError: arrays that do not fit together.
    """
    arrays = (np.asarray(array) for array in (x_train, y_train, x_test, y_test))
    x_train, y_train, x_test, y_test = arrays
    for part, x, y in (("training", x_train, y_train), ("test", x_test, y_test)):
        if y.ndim != 1 or x.ndim < 2 or len(x) != len(y) or not x.size:
            raise CommandError(
                f"{name}: {part} inputs of shape {x.shape} and labels of shape {y.shape} do not fit"
                " together, or are empty."
            )
        _check_inputs(f"{name}: {part} inputs", x)
        _check_labels(f"{name}: {part} labels", y, classes or len(y_train) + len(y_test))
    if (x_train.shape[1:], x_train.dtype) != (x_test.shape[1:], x_test.dtype):
        raise CommandError(
            f"{name}: training inputs have shape {x_train.shape[1:]} and type {x_train.dtype}, test"
            f" inputs {x_test.shape[1:]} and {x_test.dtype}: store both alike."
        )
    if x_train.ndim == 3:  # grey images without a channel
        x_train, x_test = x_train[..., None], x_test[..., None]
    scale = 255.0 if x_train.dtype == np.uint8 else 1.0
    classes = classes or int(max(y_train.max(), y_test.max())) + 1
    labels = (y_train.astype(np.int32), y_test.astype(np.int32))
    return Dataset(name, x_train, labels[0], x_test, labels[1], classes, scale)


def _check_inputs(what: str, x: Array) -> None:
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise CommandError(f"{what} must be uint8, from 0 to 255, or floats, got {x.dtype}.")
    if x.dtype.kind == "f" and not np.max(np.abs(x)) <= np.finfo(np.float32).max:
        raise CommandError(f"{what} must be finite in float32: leave such samples away.")


def _check_labels(what: str, y: Array, classes: int) -> None:
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= classes:
        raise CommandError(
            f"{what} must be whole numbers from 0 and below {classes}, the number of classes or of"
            " all samples."
        )


def _fashion_mnist(root: Path | str | None) -> Dataset:
    arrays = [_parse_idx(file, *_read(file, root)) for file in _MD5]
    return from_arrays(_FASHION, *arrays, classes=10)


def _read(file: str, root: Path | str | None) -> tuple[Path, bytes]:
    """A publisher's file, found or else fetched: its path and its content."""
    chosen = root or os.environ.get("GRADREG_DATA")
    folders = [Path(chosen) / folder for folder in (*_FOLDERS, "")] if chosen else []
    looked = folders if root else [*folders, _DEBIAN / _FASHION, cache() / _FASHION]
    for folder in looked:
        for path in (folder / file, folder / file.removesuffix(".gz")):
            if path.is_file():
                return path, path.read_bytes()
    if root is not None:
        raise MissingError(
            f"{_FASHION}: no {file} in {', '.join(map(str, looked))}: put the publisher's files"
            " there, or leave --data-dir away."
        )
    path = _fetch(file)
    return path, path.read_bytes()


def _fetch(file: str) -> Path:
    """Fetches a file into the cache, once, and checks it."""
    remedy = (
        f"put {', '.join(_MD5)} into a folder and pass it as --data-dir (or set $GRADREG_DATA) or"
        " install the Debian package dataset-fashion-mnist"
    )
    try:
        import pooch
    except ImportError as error:
        raise CommandError(f"{_extra(_FASHION, 'pooch')[:-1]}, or {remedy}.") from error
    try:
        where, load = cache() / _FASHION, pooch.HTTPDownloader(timeout=(5, 30))
        kept = pooch.retrieve(_URL + file, f"md5:{_MD5[file]}", file, where, downloader=load)
    except (OSError, ValueError) as error:
        raise MissingError(
            f"{_FASHION}: {_URL}{file} could not be fetched ({type(error).__name__}): {remedy}."
        ) from error
    return Path(kept)


def _parse_idx(file: str, path: Path, content: bytes) -> Array:
    """Unsigned bytes in the idx format: 0, 0, 8, number of dimensions, the dimensions in big
    endian, the data.
    """
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise CommandError(f"{_FASHION}: {path} cannot be unpacked ({error}).") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() in _MNIST:
        raise CommandError(f"{_FASHION}: {path} is a file of MNIST: use another folder.")
    expected = int(file.split("-idx")[1][0])
    dimensions = int.from_bytes(content[3:4]) if content[:3] == b"\x00\x00\x08" else 0
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], ">u4").tolist() if len(content) >= start else []
    if dimensions != expected or not shape or len(content) != start + math.prod(shape):
        raise CommandError(
            f"{_FASHION}: {path} is no idx file of unsigned bytes in {expected} dimensions, or is"
            " cut short."
        )
    if expected == 1 and max(content[start:], default=0) > 9:
        raise CommandError(f"{_FASHION}: {path} holds a label above 9: it is not the publisher's.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
