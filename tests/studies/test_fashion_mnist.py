"""Fashion-MNIST: which files are read, and which are an error."""

import gzip
import hashlib
import struct

import numpy as np
import pytest

from gradreg_optax.experiments.common import CommandError
from studies import fashion_mnist

SHAPES = {
    "train-images-idx3": (12, 4, 5),
    "train-labels-idx1": (12,),
    "t10k-images-idx3": (6, 4, 5),
    "t10k-labels-idx1": (6,),
}


def idx(array):
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def idx_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 10, shape) for name, shape in SHAPES.items()}


def write_idx(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(idx(array), mtime=0))


def checksums(array):
    return tuple(
        hashlib.md5(content).hexdigest()
        for content in (gzip.compress(idx(array), mtime=0), idx(array))
    )


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data on this machine, and no server to download it from."""
    monkeypatch.setattr(fashion_mnist, "_DEBIAN", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GRADREG_DATA", raising=False)
    # the discard port: refused at once
    monkeypatch.setattr(fashion_mnist, "_URL", "http://127.0.0.1:9/")
    md5 = {name: checksums(array) for name, array in idx_arrays().items()}
    monkeypatch.setattr(fashion_mnist, "_MD5", md5)


@pytest.mark.parametrize("folder", ["", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("named", [True, False])
def test_idx_files_are_read_as_they_were_written(tmp_path, monkeypatch, folder, named):
    arrays, root = idx_arrays(), tmp_path / "files"
    write_idx(root / folder, arrays)
    if named:
        monkeypatch.setenv("GRADREG_DATA", str(root))
    found = fashion_mnist.load(None if named else root)
    np.testing.assert_array_equal(found.train_x[..., 0], arrays["train-images-idx3"])
    np.testing.assert_array_equal(found.test_y, arrays["t10k-labels-idx1"])
    assert (found.shape, found.classes, found.scale) == ((4, 5, 1), 10, 255)
    assert found.mean == pytest.approx(arrays["train-images-idx3"].mean() / 255)


PACKED = bytearray(gzip.compress(idx(np.arange(6) % 10), mtime=0))
PACKED[12] ^= 0xFF  # within the deflated data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # as MNIST's of that name
        (gzip.compress(idx(np.arange(6)), mtime=0), "is not the published file"),
        (bytes(PACKED), "cannot unpack"),
    ],
)
def test_a_damaged_idx_file_is_refused_by_its_name(tmp_path, content, message):
    write_idx(tmp_path, idx_arrays())
    name = "t10k-labels-idx1-ubyte.gz"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CommandError, match=f"{name} {message}|{message} .*{name}"):
        fashion_mnist.load(tmp_path)


def test_without_a_network_the_error_names_the_remedies():
    remedies = r"--data-dir \(or set \$GRADREG_DATA\), or install the Debian package"
    with pytest.raises(CommandError, match=f"cannot download .*{remedies}"):
        fashion_mnist.load()
