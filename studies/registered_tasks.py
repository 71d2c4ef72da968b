"""Tasks that had no part in choosing the rule of ``relative_gradreg(strength=None)``.

The list was committed before the first run on any of them, together with the rule, the command
``python -m studies unseen`` and the criterion:

- a *gain* is that of the best constant strength over plain training, if it is at least one point
  of the score; the best strength is chosen on tuning seeds;
- the rule must keep at least 80 % of the gain in three quarters of the tasks that have one, with
  the full and with the lazy penalty, and must not end below plain training by more than a standard
  error in any task.

The score is the test accuracy in percent; for regression 100 R², the percentage of the variance of
the targets that is explained. Learning rates are those of ``studies strength``. No network,
number of steps or noise level was changed after a run.
"""

import functools
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from gradreg_optax.experiments import models
from gradreg_optax.experiments.data import Array, Dataset
from studies import fashion_mnist, networks

GRID = np.arange(-8, 8.125, 0.25)  # the targets of regression, in standard deviations
MODULES = ("argparse", "dataclasses", "difflib", "inspect", "pickle", "tarfile", "turtle", "typing")
LEARNING_RATES = {"sgd": 0.2, "momentum": 0.02, "adam": 2e-3, "adamw": 2e-3}
_POOL, _LENGTH = 6000, 64  # made samples, and the length of a series or a text


class Task(NamedTuple):
    """Something to learn.

    Attributes:
      kind: what kind of task it is.
      make: makes the data set, from the folder of Fashion-MNIST.
      recipe: what differs from the usual recipe. Of the ``train_size`` samples, ``held_out`` serve
        the self-tuned strength, and no method trains on them.
      regression: the score is R² instead of the accuracy.
    """

    kind: str
    make: Callable[[Path | None], Dataset]
    recipe: Mapping[str, Any]
    regression: bool = False


def split(name: str, x: Array, y: Array, classes: int) -> Dataset:
    """Return standardised features as a data set that every seed splits anew."""
    x = ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)
    half, y = len(x) // 2, np.asarray(y, np.int32)
    return Dataset(name, x[:half], y[:half], x[half:], y[half:], classes, 1.0, resplit=True)


def breast_cancer(_: Path | None) -> Dataset:
    """Return the Wisconsin breast cancer data."""
    found = datasets.load_breast_cancer()
    return split("breast cancer", found.data, found.target, 2)


def made_features(_: Path | None, *, samples: int = _POOL) -> Dataset:
    """Return Gaussian clusters in 30 dimensions, of which 15 are informative, in four classes."""
    x, y = datasets.make_classification(
        samples, 30, n_informative=10, n_redundant=5, n_classes=4, class_sep=1.5, random_state=0
    )
    return split("made features", x, y, 4)


def moons(_: Path | None) -> Dataset:
    """Return two interleaved half circles in the plane."""
    x, y = datasets.make_moons(_POOL, noise=0.2, random_state=0)
    return split("moons", x, y, 2)


def series(_: Path | None) -> Dataset:
    """Return autoregressive series of order two; the class is the pair of coefficients."""
    coefficients = np.array([[0.5, 0.0], [0.9, 0.0], [0.5, 0.3], [1.2, -0.5], [0.3, -0.6]])
    rng = np.random.default_rng(0)
    y = rng.integers(len(coefficients), size=_POOL)
    x = rng.normal(size=(_POOL, 2 * _LENGTH))
    for t in range(2, x.shape[1]):
        x[:, t] += np.sum(coefficients[y] * x[:, t - 2 : t][:, ::-1], axis=1)
    return split("series", x[:, _LENGTH:], y, len(coefficients))


def regression(make: Callable[[], tuple[Array, Array]], name: str) -> Dataset:
    """Return a regression data set; targets are standardised and rounded to the grid."""
    x, y = make()
    y = (y - y.mean()) / y.std()
    return split(name, x, np.round((np.clip(y, -8, 8) + 8) / 0.25), len(GRID))


def diabetes(_: Path | None) -> Dataset:
    """Return the diabetes data: disease progression from ten measurements."""
    return regression(functools.partial(datasets.load_diabetes, return_X_y=True), "diabetes")


def friedman(_: Path | None) -> Dataset:
    """Return Friedman's first function of five of ten inputs, with noise."""
    make = functools.partial(datasets.make_friedman1, _POOL, noise=1.0, random_state=0)
    return regression(make, "friedman")


def source_code(_: Path | None) -> Dataset:
    """Return windows of Python's source code; the class is the module that a window is from."""
    root = Path(sysconfig.get_paths()["stdlib"])
    windows = []
    for name in MODULES:
        text = np.frombuffer((root / f"{name}.py").read_bytes(), np.uint8)
        whole = len(text) // _LENGTH * _LENGTH
        windows.append(np.minimum(text[:whole], 127).astype(np.int32).reshape(-1, _LENGTH))
    y = np.repeat(np.arange(len(windows)), [len(one) for one in windows]).astype(np.int32)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = np.concatenate(windows)[order], y[order]
    half = len(x) // 2
    parts = (x[:half], y[:half], x[half:], y[half:])
    return Dataset("modules", *parts, len(MODULES), 1.0, resplit=True, tokens=True)


def fashion(folder: Path | None) -> Dataset:
    """Return Fashion-MNIST."""
    return fashion_mnist.load(folder)


def _recipe(train: int, held_out: int, optimizer: str = "sgd", **given: Any) -> dict[str, Any]:
    made = {"train_size": train + held_out, "held_out": held_out, "optimizer": optimizer}
    made |= {"learning_rate": LEARNING_RATES[optimizer], "label_noise": 0.0, "steps": 2000}
    return made | {"test_size": None, "eigenvalue": False} | given


def _output(features: int) -> models.Model:
    return networks.regression(models.build("mlp", (features,), 1, width=64), GRID)


_CNN: dict[str, Any] = {"test_size": 3000, "steps": 1000, "batch_size": 32}
_PLANE: dict[str, Any] = {"label_noise": 0.3, "width": 128, "depth": 2}
TASKS = {
    "breast cancer, 20 % label noise": Task(
        "tabular", breast_cancer, _recipe(200, 60, "adam", label_noise=0.2)
    ),
    "made features, 30 % label noise": Task(
        "tabular", made_features, _recipe(400, 80, label_noise=0.3)
    ),
    "moons, 30 % label noise": Task("tabular", moons, _recipe(300, 60, "momentum", **_PLANE)),
    "series, 20 labels a class": Task(
        "time series", series, _recipe(100, 30, "adam", model="cnn", width=8, depth=1, steps=1500)
    ),
    "diabetes": Task("regression", diabetes, _recipe(200, 50, "adam", model=_output(10)), True),
    "Friedman": Task("regression", friedman, _recipe(200, 50, "momentum", model=_output(10)), True),
    "Fashion-MNIST, CNN, 50 labels a class": Task(
        "images",
        fashion,
        _recipe(500, 100, model=networks.strided_cnn(10, (16, 32), norm=False), **_CNN),
    ),
    "Fashion-MNIST, CNN with batch norm, 20 % label noise": Task(
        "images",
        fashion,
        _recipe(
            1000, 200, "momentum", model=networks.strided_cnn(10, (16, 32)), label_noise=0.2, **_CNN
        ),
    ),
    "source code, 50 windows a class": Task(
        "text",
        source_code,
        _recipe(400, 100, "adamw", model=networks.text_classifier(128, len(MODULES)), steps=1000),
    ),
    "made features, one pass": Task(
        "one pass",
        functools.partial(made_features, samples=46000),
        _recipe(40000, 1000, steps=1250),
    ),
    "Fashion-MNIST, one pass": Task(
        "one pass", fashion, _recipe(59000, 1000, "adam", test_size=5000, steps=1843)
    ),
}


def score(task: Task, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the score of predictions, in percent."""
    if not task.regression:
        return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    grid = jnp.asarray(GRID, jnp.float32)
    targets = grid[labels]
    error = jnp.mean((jax.nn.softmax(logits) @ grid - targets) ** 2)
    return 100 * (1 - error / jnp.var(targets))
