"""Real data sets in their original formats, and what a seed makes of them: a subset, wrong labels,
a test set.
"""

import dataclasses
import functools
import gzip
import hashlib
import io
import math
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Name: TypeAlias = Literal["digits", "fashion-mnist", "mnist", "cifar10"]
Array: TypeAlias = npt.NDArray[Any]

_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_DEBIAN = Path("/usr/share/datasets")
_CIFAR = "cifar-10-python.tar.gz"
_CIFAR_FOLDER = "cifar-10-batches-py"
_CIFAR_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, as it is stored.

    Attributes:
      name: its name, or the name of the user's file.
      train_x: training inputs, shape (samples, ...); images are (samples, height, width, channels).
      train_y: training labels, shape (samples,), whole numbers from 0.
      test_x: test inputs.
      test_y: test labels.
      classes: number of classes.
      scale: the largest value that an input can take; 1 for inputs that are no whole numbers.
      resplit: there is no official test set, so every seed splits the samples anew.
    """

    name: str
    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array
    classes: int
    scale: float
    resplit: bool = False

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


class _Source(NamedTuple):
    """Where a data set can be fetched.

    Attributes:
      url: the folder that its publisher keeps it in.
      md5: the md5 sum of each file there.
      folders: names of the folder that holds them on disk.
      contents: md5 sums of the files once unpacked.
    """

    url: str
    md5: dict[str, str]
    folders: tuple[str, ...]
    contents: tuple[str, ...]


_FASHION_MNIST = _Source(
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    {
        _IDX[0]: "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        _IDX[1]: "25c81989df183df01b3e8a0aad5dffbe",
        _IDX[2]: "bef4ecab320f06d8554ea6380940ec79",
        _IDX[3]: "bb300cfdad3c16e7a12a480ee83cd310",
    },
    ("fashion-mnist", "FashionMNIST/raw"),
    (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
)
_MNIST = _Source(
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    {
        _IDX[0]: "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        _IDX[1]: "d53e105ee54ea40749a09fcbcd1e9432",
        _IDX[2]: "9fb629c4189551a2d022fa330f9573f3",
        _IDX[3]: "ec29112dd5afa0611ce80d1b7f02629c",
    },
    ("mnist", "MNIST/raw"),
    (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
)
_CIFAR10 = _Source(
    "https://www.cs.toronto.edu/~kriz/",
    {_CIFAR: "c58f30108f718f92721af3b95e74349a"},
    ("cifar10", "CIFAR10"),
    (),
)
_SOURCES = {"fashion-mnist": _FASHION_MNIST, "mnist": _MNIST, "cifar10": _CIFAR10}


def load(name: str, root: Path | str | None = None) -> Dataset:
    """Reads a data set.

    ``digits`` comes with scikit-learn. The others are looked for, in their publishers' files, in
    ``root`` if it is given; otherwise in ``$GRADREG_DATA``, in the folder of the Debian package
    ``dataset-fashion-mnist``, in the cache ``~/.cache/gradreg_optax``, and are then fetched into
    that cache once, with a checksum. A path that ends in ``.npz`` is a file of the user's, with the
    arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test``.

    Args:
      name: "digits", "fashion-mnist", "mnist", "cifar10", or the path of an ``.npz`` file.
      root: the folder that holds the files, themselves or in a folder of the data set's name.

    Returns:
      The data set.

    Raises:
      FileNotFoundError: the files are not there and cannot be fetched.
      ValueError: an unknown name, or a file that is not what it should be.
    """
    if name == "digits":
        return _digits()
    if name.endswith(".npz"):
        return _npz(Path(name))
    if name not in _SOURCES:
        raise ValueError(
            f"unknown data set {name!r}: choose one of 'digits', {', '.join(map(repr, _SOURCES))},"
            " or a path to an .npz file."
        )
    return _cifar(root) if name == "cifar10" else _idx(name, root)


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
      ValueError: more samples than there are, or a share outside [0, 1].
    """
    if not 0 <= label_noise <= 1:
        raise ValueError(
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
    labels[wrong] = (labels[wrong] + rng.integers(1, dataset.classes, len(wrong))) % dataset.classes
    return Split(train.astype(np.int32), labels.astype(np.int32), test.astype(np.int32))


def cache() -> Path:
    """The folder that keeps fetched files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradreg_optax"


def _first(name: str, order: Array, size: int | None) -> Array:
    size = len(order) if size is None else size
    if not 0 < size <= len(order):
        raise ValueError(
            f"{name} must lie between 1 and {len(order)}, the samples there are, got {size}."
        )
    return order[:size]


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'digits come with scikit-learn: pip install "gradreg-optax[experiments]".'
        ) from error
    found = load_digits()
    x, y = found.images.astype(np.uint8)[..., None], found.target.astype(np.int32)
    return Dataset(
        "digits", x[:-1000], y[:-1000], x[-1000:], y[-1000:], classes=10, scale=16.0, resplit=True
    )


def _npz(path: Path) -> Dataset:
    if not path.exists():
        raise FileNotFoundError(
            f"no file {path}: --dataset takes a name or the path of an .npz file."
        )
    with np.load(path, allow_pickle=False) as file:
        missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in file]
        if missing:
            raise ValueError(
                f"{path} has no {', '.join(missing)}: it must hold x_train, y_train, x_test and"
                " y_test."
            )
        arrays = [file[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    x_train, y_train, x_test, y_test = arrays
    if x_train.ndim == 3:  # grey images without a channel
        x_train, x_test = x_train[..., None], x_test[..., None]
    scale = 255.0 if x_train.dtype == np.uint8 else 1.0
    return _checked(path.stem, x_train, y_train, x_test, y_test, scale)


def _idx(name: str, root: Path | str | None) -> Dataset:
    x_train, y_train, x_test, y_test = (
        _parse_idx(name, file, _read(name, file, root)) for file in _IDX
    )
    return _checked(name, x_train[..., None], y_train, x_test[..., None], y_test, 255.0, classes=10)


def _cifar(root: Path | str | None) -> Dataset:
    batches = [_cifar_batch(content) for content in _cifar_contents(root)]
    *train, test = [(x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), y) for x, y in batches]
    x_train, y_train = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return _checked("cifar10", x_train, y_train, *test, 255.0, classes=10)


def _cifar_contents(root: Path | str | None) -> list[bytes]:
    """The six batches, from the unpacked folder or from the archive, which is read in memory and
    never unpacked.
    """
    for folder in _folders("cifar10", root):
        if all((folder / _CIFAR_FOLDER / batch).exists() for batch in _CIFAR_BATCHES):
            return [(folder / _CIFAR_FOLDER / batch).read_bytes() for batch in _CIFAR_BATCHES]
    try:
        with tarfile.open(fileobj=io.BytesIO(_read("cifar10", _CIFAR, root))) as archive:
            return [_member(archive, f"{_CIFAR_FOLDER}/{batch}") for batch in _CIFAR_BATCHES]
    except tarfile.ReadError as error:
        raise ValueError(f"cifar10: {_CIFAR} cannot be unpacked ({error}).") from error


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise ValueError(
            f"{_CIFAR} holds no {name}: it is not the archive of the python version of CIFAR-10."
        )
    return file.read()


def _cifar_batch(content: bytes) -> tuple[Array, Array]:
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    return np.asarray(batch[b"data"], np.uint8), np.asarray(batch[b"labels"], np.int32)


class _Unpickler(pickle.Unpickler):
    """Reads pickled NumPy arrays and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names that an array's pickle refers to."""
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        allowed["numpy.core.multiarray", "_reconstruct"] = np.ndarray(0).__reduce__()[
            0
        ]  # NumPy has moved it since
        if (module, name) not in allowed:
            raise ValueError(
                f"a pickled batch may hold arrays only, and this one refers to {module}.{name}: it"
                " was not read."
            )
        return allowed[module, name]


def _read(name: str, file: str, root: Path | str | None) -> bytes:
    """The content of a publisher's file: found, or else fetched."""
    for folder in _folders(name, root):
        for path in (folder / file, folder / file.removesuffix(".gz")):
            if path.is_file():
                return path.read_bytes()
    if root is not None:
        looked = ", ".join(str(folder) for folder in _folders(name, root))
        raise FileNotFoundError(
            f"{name}: no {file} in {looked}: put the publisher's files there, or leave --data-dir"
            " away."
        )
    return _fetch(name, file).read_bytes()


def _folders(name: str, root: Path | str | None) -> list[Path]:
    """Where to look, first place first."""
    chosen = root or os.environ.get("GRADREG_DATA")
    folders = [Path(chosen) / folder for folder in (*_SOURCES[name].folders, "")] if chosen else []
    return folders if root else [*folders, _DEBIAN / name, cache() / name]


def _check_not_another(name: str, file: str, content: bytes) -> None:
    """MNIST and Fashion-MNIST use the same file names: do not take the one for the other."""
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    for other, source in _SOURCES.items():
        if other != name and digest in source.contents:
            raise ValueError(
                f"{name}: {file} is a file of {other}: use --dataset {other}, or give each data set"
                " a folder of its own."
            )


def _fetch(name: str, file: str) -> Path:
    """Fetches a file into the cache, once, and checks it."""
    source = _SOURCES[name]
    debian = (
        " or install the Debian package dataset-fashion-mnist" if name == "fashion-mnist" else ""
    )
    remedy = (
        f"put {', '.join(source.md5)} into a folder and pass it as --data-dir (or set"
        f" $GRADREG_DATA){debian}"
    )
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            f"{name} is not on this machine, and pooch is not there to fetch it: pip install"
            f' "gradreg-optax[experiments]", or {remedy}.'
        ) from error
    try:
        downloader = pooch.HTTPDownloader(timeout=(5, 30))
        found = pooch.retrieve(
            source.url + file,
            f"md5:{source.md5[file]}",
            file,
            cache() / name,
            downloader=downloader,
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: {source.url}{file} could not be fetched ({type(error).__name__}): {remedy}."
        ) from error
    return Path(found)


def _parse_idx(name: str, file: str, content: bytes) -> Array:
    """Unsigned bytes in the idx format: 0, 0, 8, number of dimensions, the dimensions in big
    endian, the data.
    """
    if content[:2] == b"\x1f\x8b":
        content = _gunzip(name, file, content)
    _check_not_another(name, file, content)
    dimensions = int.from_bytes(content[3:4]) if content[:3] == b"\x00\x00\x08" else 0
    start = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    if not dimensions or len(shape) != dimensions or len(content) != start + math.prod(shape):
        raise ValueError(f"{name}: {file} is no idx file of unsigned bytes, or is cut short.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _gunzip(name: str, file: str, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (EOFError, OSError) as error:
        raise ValueError(f"{name}: {file} cannot be unpacked ({error}).") from error


def _checked(
    name: str,
    x_train: Array,
    y_train: Array,
    x_test: Array,
    y_test: Array,
    scale: float,
    classes: int | None = None,
) -> Dataset:
    """The data set, once its shapes and labels fit together."""
    for part, x, y in (("training", x_train, y_train), ("test", x_test, y_test)):
        if y.ndim != 1 or len(x) != len(y) or x.ndim < 2:
            raise ValueError(
                f"{name}: {part} inputs of shape {x.shape} and labels of shape {y.shape} do not fit"
                " together."
            )
        if not np.issubdtype(y.dtype, np.integer) or y.min(initial=0) < 0:
            raise ValueError(f"{name}: {part} labels must be whole numbers from 0.")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"{name}: training inputs have shape {x_train.shape[1:]}, test inputs"
            f" {x_test.shape[1:]}."
        )
    largest = int(max(y_train.max(), y_test.max())) + 1
    return Dataset(
        name,
        x_train,
        y_train.astype(np.int32),
        x_test,
        y_test.astype(np.int32),
        classes or largest,
        scale,
    )
