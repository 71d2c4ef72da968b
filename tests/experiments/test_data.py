import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax.experiments import data

SHAPES = {
    "train-images-idx3-ubyte": (12, 4, 5),
    "train-labels-idx1-ubyte": (12,),
    "t10k-images-idx3-ubyte": (6, 4, 5),
    "t10k-labels-idx1-ubyte": (6,),
}


def idx(array):
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def idx_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 256 if len(shape) == 3 else 10, shape)
        for name, shape in SHAPES.items()
    }


def write_idx(folder, arrays, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array), mtime=0))
        else:
            (folder / name).write_bytes(idx(array))


def python2_pickle(images, labels):
    """A batch as Python 2 pickled it (protocol 2): a dict of byte strings, a list of labels and a
    uint8 array."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    shape = b"".join(b"J" + struct.pack("<i", n) for n in images.shape) + b"\x86"
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    content = b"T" + struct.pack("<i", images.size) + images.astype(np.uint8).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + text(b"b")
        + b"\x87R(K\x01"
        + shape
        + dtype
        + b"\x89"
        + content
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return (
        b"\x80\x02}("
        + text(b"batch_label")
        + text(b"batch 1 of 5")
        + text(b"labels")
        + numbers
        + text(b"data")
        + array
        + b"u."
    )


def archive(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar_batches():
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {name: (rng.integers(0, 256, (3, 3072)), rng.integers(0, 10, 3)) for name in names}


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """Nothing on this machine, and nobody to fetch it from."""
    monkeypatch.setattr(data, "_DEBIAN", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GRADREG_DATA", raising=False)
    for name, source in data._SOURCES.items():
        monkeypatch.setitem(
            data._SOURCES, name, source._replace(url="http://127.0.0.1:9/")
        )  # the discard port: refused at once


def small(samples=40, classes=10):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(samples, 3)), rng.integers(0, classes, samples)
    return data.Dataset("small", x[:30], y[:30], x[30:], y[30:], classes, 1.0)


@given(share=st.floats(0, 1), seed=st.integers(0, 2**31), classes=st.integers(2, 10))
def test_exactly_the_given_share_of_labels_is_wrong(share, seed, classes):
    dataset = small(classes=classes)
    split = data.draw(dataset, seed, 20, 5, share)
    wrong = split.train_labels != dataset.labels[split.train]
    assert wrong.sum() == round(20 * share)
    assert ((split.train_labels >= 0) & (split.train_labels < classes)).all()


@given(seed=st.integers(0, 2**31))
def test_a_seed_draws_the_same_split_and_the_next_seed_another(seed):
    dataset = small()
    first, again, other = (data.draw(dataset, s, 20, 5, 0.3) for s in (seed, seed, seed + 1))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.train != other.train).any()


@pytest.mark.parametrize("resplit", [False, True])
def test_no_sample_is_drawn_twice_and_an_official_test_set_stays_one(resplit):
    dataset = small()
    dataset = data.Dataset(
        dataset.name,
        dataset.train_x,
        dataset.train_y,
        dataset.test_x,
        dataset.test_y,
        10,
        1.0,
        resplit,
    )
    split = data.draw(dataset, 0, 20)
    assert len(set(split.train) | set(split.test)) == len(split.train) + len(split.test)
    assert len(split.test) == (20 if resplit else 10)
    assert resplit or (split.test >= 30).all()


def test_the_digits_are_those_of_scikit_learn():
    dataset = data.load("digits")
    assert dataset.inputs.shape == (1797, 8, 8, 1)
    assert dataset.train_x.max() == dataset.scale == 16
    assert sorted(set(dataset.labels)) == list(range(10))
    assert len(data.draw(dataset, 0, 300, 1000).test) == 1000


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("way", ["root", "environment"])
def test_idx_files_are_read_as_they_were_written(tmp_path, monkeypatch, way, folder, packed):
    arrays = idx_arrays()
    write_idx(tmp_path / "files" / folder, arrays, packed)
    if way == "environment":
        monkeypatch.setenv("GRADREG_DATA", str(tmp_path / "files"))
    found = data.load("fashion-mnist", tmp_path / "files" if way == "root" else None)
    np.testing.assert_array_equal(found.train_x[..., 0], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(found.test_y, arrays["t10k-labels-idx1-ubyte"])
    assert (found.shape, found.classes, found.scale) == ((4, 5, 1), 10, 255)
    assert found.mean == pytest.approx(arrays["train-images-idx3-ubyte"].mean() / 255)


def test_the_debian_folder_comes_before_the_cache(tmp_path):
    write_idx(tmp_path / "debian" / "fashion-mnist", idx_arrays(seed=1))
    write_idx(data.cache() / "fashion-mnist", idx_arrays(seed=2))
    np.testing.assert_array_equal(
        data.load("fashion-mnist").train_x[..., 0], idx_arrays(seed=1)["train-images-idx3-ubyte"]
    )


def test_files_of_another_data_set_with_the_same_names_are_refused(tmp_path, monkeypatch):
    arrays = idx_arrays()
    write_idx(tmp_path, arrays)
    digest = hashlib.md5(idx(arrays["train-images-idx3-ubyte"])).hexdigest()
    monkeypatch.setitem(
        data._SOURCES, "fashion-mnist", data._SOURCES["fashion-mnist"]._replace(contents=(digest,))
    )
    with pytest.raises(ValueError, match="is a file of fashion-mnist: use --dataset fashion-mnist"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b[:-1],
        lambda b: b[:3],
        lambda b: b"\0\0\x0d" + b[3:],
        lambda b: gzip.compress(b)[:-9],
    ],
)
def test_a_spoilt_idx_file_is_refused(tmp_path, spoil):
    arrays = idx_arrays()
    write_idx(tmp_path, arrays, packed=False)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(spoil(idx(arrays["t10k-labels-idx1-ubyte"])))
    with pytest.raises(
        ValueError, match=r"t10k-labels-idx1-ubyte.gz (is no idx file|cannot be unpacked)"
    ):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("unpacked", [False, True])
def test_cifar_is_read_in_its_original_format(tmp_path, unpacked):
    batches = cifar_batches()
    members = {name: python2_pickle(*batch) for name, batch in batches.items()}
    if unpacked:
        (tmp_path / "cifar-10-batches-py").mkdir()
        for name, content in members.items():
            (tmp_path / "cifar-10-batches-py" / name).write_bytes(content)
    else:
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive(members))
    found = data.load("cifar10", tmp_path)
    assert found.train_x.shape == (15, 32, 32, 3)
    images, labels = batches["data_batch_2"]
    np.testing.assert_array_equal(found.train_y[3:6], labels)
    for channel in range(
        3
    ):  # a row of a batch holds the red plane, then the green one, then the blue one
        plane = images[1, 1024 * channel : 1024 * (channel + 1)].reshape(32, 32)
        np.testing.assert_array_equal(found.train_x[4, :, :, channel], plane)
    np.testing.assert_array_equal(found.test_y, batches["test_batch"][1])


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_pickle_that_would_run_code_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = {name: pickle.dumps({"data": Harmful()}, protocol=2) for name in cifar_batches()}
    Path("cifar-10-python.tar.gz").write_bytes(archive(members))
    with pytest.raises(
        ValueError, match=r"may hold arrays only, and this one refers to .*mkdir: it was not read"
    ):
        data.load("cifar10", tmp_path)
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive({}), "holds no cifar-10-batches-py/data_batch_1"),
        (b"no archive", "cannot be unpacked"),
    ],
    ids=["another archive", "no archive"],
)
def test_another_archive_is_refused(tmp_path, content, message):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load("cifar10", tmp_path)


def test_a_file_of_the_users_is_read(tmp_path):
    path, arrays = (
        tmp_path / "mine.npz",
        {"x_train": np.ones((5, 4, 4), np.uint8), "y_train": np.arange(5) % 3},
    )
    np.savez(path, **arrays, x_test=np.zeros((2, 4, 4), np.uint8), y_test=np.array([2, 0]))
    found = data.load(str(path))
    assert (found.name, found.shape, found.classes, found.scale) == ("mine", (4, 4, 1), 3, 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.ones((4, 3))}, "do not fit together"),
        ({"y_test": np.array([0.5, 1.5])}, "whole numbers from 0"),
        ({"x_test": np.ones((2, 4))}, r"training inputs have shape \(3,\), test inputs \(4,\)"),
        ({"y_train": None}, "has no y_train"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    arrays = {
        "x_train": np.ones((5, 3)),
        "y_train": np.arange(5),
        "x_test": np.ones((2, 3)),
        "y_test": np.array([0, 1]),
    } | change
    np.savez(
        tmp_path / "mine.npz",
        **{name: array for name, array in arrays.items() if array is not None},
    )
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / "mine.npz"))


@pytest.mark.parametrize("name", ["mnist", "cifar10", "fashion-mnist"])
def test_without_a_network_the_error_names_the_remedies(name):
    with pytest.raises(
        FileNotFoundError, match=r"could not be fetched .*--data-dir \(or set \$GRADREG_DATA\)"
    ) as caught:
        data.load(name)
    assert ("dataset-fashion-mnist" in str(caught.value)) == (name == "fashion-mnist")


def test_a_folder_without_the_files_is_not_replaced_by_another_source(tmp_path):
    write_idx(tmp_path / "debian" / "fashion-mnist", idx_arrays())
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte\.gz in"):
        data.load("fashion-mnist", tmp_path / "empty")


@pytest.mark.parametrize("name", ["imagenet", "Digits", "missing.npz"])
def test_an_unknown_data_set_is_named(name):
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        data.load(name)


@pytest.mark.parametrize(
    "sizes", [{"train_size": 31}, {"train_size": 0}, {"test_size": 11}, {"label_noise": 1.5}]
)
def test_more_than_there_is_cannot_be_drawn(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        data.draw(small(), 0, **sizes)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A publisher on this machine; the fixture is the list of files that were asked for."""
    arrays, asked = idx_arrays(), []
    files = {f"{name}.gz": gzip.compress(idx(array), mtime=0) for name, array in arrays.items()}

    def answer(request):
        asked.append(request.path.strip("/"))
        content = files[asked[-1]]
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    handler = type(
        "Handler",
        (http.server.BaseHTTPRequestHandler,),
        {"do_GET": answer, "log_message": lambda *args: None},
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as publisher:
        thread = threading.Thread(target=publisher.serve_forever)
        thread.start()
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
        source = data._SOURCES["mnist"]._replace(
            url=f"http://127.0.0.1:{publisher.server_port}/", md5=md5
        )
        monkeypatch.setitem(data._SOURCES, "mnist", source)
        yield asked
        publisher.shutdown()
        thread.join()


def test_files_are_fetched_once(server):
    first, again = data.load("mnist"), data.load("mnist")
    np.testing.assert_array_equal(first.train_x, again.train_x)
    np.testing.assert_array_equal(first.train_x[..., 0], idx_arrays()["train-images-idx3-ubyte"])
    assert sorted(server) == sorted(f"{name}.gz" for name in SHAPES)


def test_a_fetched_file_with_another_checksum_is_not_kept(server, monkeypatch):
    source = data._SOURCES["mnist"]
    monkeypatch.setitem(
        data._SOURCES, "mnist", source._replace(md5=dict.fromkeys(source.md5, "0" * 32))
    )
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        data.load("mnist")
    assert not list(data.cache().rglob("*.gz"))
