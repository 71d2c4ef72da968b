"""Fashion-MNIST: the published files, found on this machine or downloaded once."""

import gzip
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.data import Array, Dataset, from_arrays

_NAME = "fashion-mnist"
_DEBIAN = Path("/usr/share/datasets")
_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_MD5 = {  # of each published file, and of its content
    "train-images-idx3": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
    "train-labels-idx1": ("25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
    "t10k-images-idx3": ("bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
    "t10k-labels-idx1": ("bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
}


def load(root: Path | str | None = None) -> Dataset:
    """Read the data set.

    Args:
      root: the directory with the files, or one with a directory ``fashion-mnist``; by default
        ``$GRADREG_DATA``, the Debian package ``dataset-fashion-mnist`` or the cache
        ``~/.cache/gradreg_optax``, into which missing files are downloaded.

    Raises:
      CommandError: the files do not exist and cannot be downloaded, or have unexpected content.
    """
    return from_arrays(_NAME, *(_idx(name, root) for name in _MD5), classes=10)


def cache() -> Path:
    """Return the directory for downloaded files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradreg_optax"


def _idx(name: str, root: Path | str | None) -> Array:
    """Read unsigned bytes in the idx format: a header and the data."""
    path = _find(name, root)
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise CommandError(f"{_NAME}: cannot unpack {path} ({error}).") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != _MD5[name][1]:
        raise CommandError(f"{_NAME}: {path} is not the published file: its checksum differs.")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _find(name: str, root: Path | str | None) -> Path:
    """Return the path of a published file, downloaded if necessary."""
    given = root or os.environ.get("GRADREG_DATA")
    folders = [Path(given) / part for part in (_NAME, "FashionMNIST/raw", "")] if given else []
    folders += [] if root else [_DEBIAN / _NAME, cache() / _NAME]
    for folder in folders:
        if (folder / f"{name}-ubyte.gz").is_file():
            return folder / f"{name}-ubyte.gz"
    if root is not None:
        raise CommandError(
            f"{_NAME}: no {name}-ubyte.gz in {', '.join(map(str, folders))}. Put the published"
            " files there, or omit --data-dir."
        )
    return _download(f"{name}-ubyte.gz", _MD5[name][0])


def _download(file: str, md5: str) -> Path:
    import pooch

    try:
        load = pooch.HTTPDownloader(timeout=(5, 30))
        path = pooch.retrieve(_URL + file, f"md5:{md5}", file, cache() / _NAME, downloader=load)
    except (OSError, ValueError) as error:
        files = ", ".join(f"{name}-ubyte.gz" for name in _MD5)
        raise CommandError(
            f"{_NAME}: cannot download {_URL}{file} ({type(error).__name__}). Put {files} into a"
            " directory and pass it as --data-dir (or set $GRADREG_DATA), or install the Debian"
            " package dataset-fashion-mnist."
        ) from error
    return Path(path)
