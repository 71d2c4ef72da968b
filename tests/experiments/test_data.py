import dataclasses
import io
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax.experiments import data
from gradreg_optax.experiments.common import CommandError


def small(samples=40, classes=10):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(samples, 3)), rng.integers(0, classes, samples)
    return data.Dataset("small", x[:30], y[:30], x[30:], y[30:], classes, 1.0)


@given(share=st.floats(0, 1), seed=st.integers(0, 2**31), classes=st.integers(2, 10))
def test_a_seed_draws_one_split_with_exactly_the_given_fraction_of_noisy_labels(
    share, seed, classes
):
    dataset = small(classes=classes)
    first, again, other = (data.draw(dataset, s, 20, 5, share) for s in (seed, seed, seed + 1))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.train != other.train).any()
    assert (first.train_labels != dataset.labels[first.train]).sum() == round(20 * share)
    assert ((first.train_labels >= 0) & (first.train_labels < classes)).all()


@pytest.mark.parametrize("resplit", [False, True])
def test_no_sample_is_drawn_twice_and_an_official_test_set_stays_one(resplit):
    split = data.draw(dataclasses.replace(small(), resplit=resplit), 0, 20)
    assert len(set(split.train) | set(split.test)) == len(split.train) + len(split.test)
    assert len(split.test) == (20 if resplit else 10)
    assert resplit or (split.test >= 30).all()


def test_the_digits_are_those_of_scikit_learn():
    dataset = data.load("digits")
    assert dataset.inputs.shape == (1797, 8, 8, 1)
    assert dataset.train_x.max() == dataset.scale == 16
    assert sorted(set(dataset.labels)) == list(range(10))
    assert len(data.draw(dataset, 0, 300, 1000).test) == 1000


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002 (the global one)


@pytest.mark.slow
def test_mnist1d_is_generated_once_and_leaves_the_global_generators_alone():
    before = global_states()
    first = data.load("mnist1d")
    sizes = len(first.train_x), len(first.test_x)
    assert (first.shape, first.classes, sizes) == ((40,), 10, (4000, 1000))
    # the set of its authors is centred, and has a standard deviation of one
    assert abs(first.inputs.mean()) < 1e-3
    assert first.inputs.std() == pytest.approx(1, abs=1e-3)
    assert data.load("mnist1d") is first
    assert global_states() == before


def test_a_file_of_the_user_is_read(tmp_path):
    path = tmp_path / "mine.npz"
    arrays = {"x_train": np.ones((5, 4, 4), np.uint8), "y_train": np.arange(5) % 3}
    np.savez(path, **arrays, x_test=np.zeros((2, 4, 4), np.uint8), y_test=np.array([2, 0]))
    found = data.load(str(path))
    assert (found.name, found.shape, found.classes, found.scale) == ("mine", (4, 4, 1), 3, 255)


OWN = {"x_train": np.ones((5, 3)), "y_train": np.arange(5)}
OWN |= {"x_test": np.ones((2, 3)), "y_test": np.arange(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.ones((4, 3))}, "do not match"),
        ({"x_train": np.ones((0, 3)), "y_train": np.arange(0)}, "or are empty"),
        ({"x_train": np.float64(1.0)}, "do not match"),
        ({"y_test": np.array([0.5, 1.5])}, "test inputs .* labels integers from 0"),
        ({"y_train": np.array([-1, 0, 1, 2, 3])}, "training inputs .* labels integers from 0"),
        ({"y_train": np.array([0, 1, 2, 3, 2**63], np.uint64)}, "labels integers from 0"),
        ({"y_train": np.array([0, 1, 2, 3, 7])}, "and below 7, the number of classes or of all"),
        ({"x_train": np.ones((5, 3), np.uint8)}, "type uint8, test inputs .* float64"),
        ({"x_train": np.ones((5, 3), np.uint16)}, "must be uint8 from 0 to 255, or floats"),
        ({"x_train": np.full((5, 3), np.nan)}, "that are finite in float32"),
        ({"x_test": np.full((2, 3), 1e300)}, "that are finite in float32"),
        ({"x_test": np.ones((2, 4))}, r"training inputs have shape \(3,\) .* inputs \(4,\)"),
        ({"y_train": None}, "y_train is not a file"),
        (
            {"y_train": np.array([0, "a", 1, 2, 3], object)},
            "must be an .npz file of the plain arrays",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_its_name(tmp_path, change, message):
    arrays = {name: array for name, array in (OWN | change).items() if array is not None}
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(CommandError, match=rf"mine\.npz.*{message}"):
        data.load(str(tmp_path / "mine.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive_is_refused_by_its_name(tmp_path, save):
    path = tmp_path / "mine.npz"
    save(path, **OWN)
    whole = path.read_bytes()
    cut = [whole[:end] for end in (0, 100, len(whole) // 2, -30)]
    array = io.BytesIO()
    np.save(array, np.ones(3))
    damaged = whole[:200] + b"\xff" * 20 + whole[220:]
    for content in [*cut, b"no archive", damaged, array.getvalue()]:
        path.write_bytes(content)
        with pytest.raises(CommandError, match=r"mine\.npz"):
            data.load(str(path))


@pytest.mark.parametrize("name", ["imagenet", "Digits", "missing.npz"])
def test_an_unknown_data_set_is_named(name):
    with pytest.raises(CommandError, match=name):
        data.load(name)


@pytest.mark.parametrize(
    "sizes", [{"train_size": 31}, {"train_size": 0}, {"test_size": 11}, {"label_noise": 1.5}]
)
def test_more_samples_than_exist_cannot_be_drawn(sizes):
    with pytest.raises(CommandError, match=next(iter(sizes))):
        data.draw(small(), 0, **sizes)
