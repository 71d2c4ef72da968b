"""The trainer that the experiments share: many runs of one method side by side, in one compiled program.

A *lane* is one run: a seed and the values of the hyperparameters. Lanes are stacked along a leading axis and advance together, so a
sweep compiles once per method. A seed decides on the data split, the wrong labels, the initial parameters and the batches, whatever the
method: runs of several methods with one seed are paired.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from tqdm import tqdm

from gradreg_optax import curvature
from gradreg_optax._typing import PyTree
from gradreg_optax.experiments import data, models
from gradreg_optax.penalty import global_norm
from gradreg_optax.training import TrainState, TrainStep, make_train_step
from gradreg_optax.transforms import dbp_gradreg, fd_gradreg, flooding, sam

Array: TypeAlias = npt.NDArray[Any]
Settings: TypeAlias = Mapping[str, Any]
_Pool: TypeAlias = tuple[jax.Array, jax.Array]  # all inputs and all labels of the data set
_Score: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]  # (logits, label) of one sample -> number
OptimizerName: TypeAlias = Literal["sgd", "momentum", "adam"]

METRICS = ("accuracy", "train_loss", "grad_norm", "eigenvalue", "eigenvalue_residual", "diverged")
_CHUNK = 100  # steps between two updates of the progress bar
_EVALUATION_BATCH = 500
_CURVATURE_SAMPLES = 1000  # gradient norm and eigenvalue are those of the loss on so many training samples at most


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to regularize.

    Attributes:
      label: its name in tables and figures.
      settings: the hyperparameters that ``regularizer`` reads, besides an optional "interval".
      regularizer: makes the transformation from their values, which are tracers; None for the plain gradient.
      gradients: gradient evaluations per step, the plain one included; a Hessian-vector product counts as two, and shares half of one
        with the plain gradient.
    """

    label: str
    settings: tuple[str, ...]
    regularizer: Callable[[Settings], optax.GradientTransformation | None]
    gradients: float


def _difference(scheme: Any) -> Callable[[Settings], optax.GradientTransformation]:
    return lambda s: fd_gradreg(gamma=s["gamma"], epsilon=s["epsilon"], scheme=scheme, interval=s.get("interval", 1))


METHODS = {
    method.label: method
    for method in (
        Method("SGD", (), lambda s: None, 1),
        Method("DB", ("gamma",), lambda s: dbp_gradreg(gamma=s["gamma"], interval=s.get("interval", 1)), 3),
        Method("B-GR", ("gamma", "epsilon"), _difference("backward"), 2),
        Method("C-GR", ("gamma", "epsilon"), _difference("central"), 3),
        Method("F-GR", ("gamma", "epsilon"), _difference("forward"), 2),
        Method("SAM", ("rho",), lambda s: sam(rho=s["rho"], interval=s.get("interval", 1)), 2),
        Method("flooding", ("level",), lambda s: flooding(level=s["level"]), 1),
    )
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all methods of an experiment have in common.

    Attributes:
      model: "mlp", "cnn" or "resnet".
      width: see :func:`gradreg_optax.experiments.models.build`.
      depth: see there.
      train_size: number of training samples, None for all.
      test_size: number of test samples, None for all.
      label_noise: share of the training samples with a wrong label.
      batch_size: samples per step, drawn without replacement in every epoch.
      steps: number of steps.
      learning_rate: the first learning rate; it falls to zero along a cosine.
      optimizer: "sgd", "momentum" (0.9) or "adam".
      penalty_fraction: share of the batch that the penalty is taken on.
      eigenvalue: measure the top Hessian eigenvalue at the end.
    """

    model: models.Name = "mlp"
    width: int = 64
    depth: int = 1
    train_size: int | None = 300
    test_size: int | None = 1000
    label_noise: float = 0.3
    batch_size: int = 32
    steps: int = 3000
    learning_rate: float = 0.2
    optimizer: OptimizerName = "sgd"
    penalty_fraction: float = 1.0
    eigenvalue: bool = True

    def __post_init__(self) -> None:
        """Checks what does not depend on the data."""
        for name in ("width", "depth", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.optimizer not in ("sgd", "momentum", "adam"):
            raise ValueError(f"unknown optimizer {self.optimizer!r}: choose one of 'sgd', 'momentum', 'adam'.")


class Trainer:
    """Trains lanes of one method; every call with the same number of lanes runs the same compiled program.

    Attributes:
      method: the method.
      traces: how often the loss of a training step has been traced; it stays as it is after the first call.
    """

    def __init__(self, dataset: data.Dataset, method: Method, recipe: Recipe) -> None:
        """Puts the data on the device; nothing is compiled yet.

        Args:
          dataset: the data.
          method: the method.
          recipe: the rest.

        Raises:
          ValueError: a batch larger than the training set, or more samples than there are.
        """
        size = len(data.draw(dataset, 0, recipe.train_size, recipe.test_size).train)
        if recipe.batch_size > size:
            raise ValueError(f"batch_size must not exceed the {size} training samples, got {recipe.batch_size}.")
        self.method, self.traces = method, 0
        self._dataset, self._recipe, self._batches = dataset, recipe, size // recipe.batch_size
        self._model = models.build(recipe.model, dataset.shape, dataset.classes, width=recipe.width, depth=recipe.depth)
        self._pool = (jnp.asarray(dataset.inputs), jnp.asarray(dataset.labels))
        self._begin = jax.jit(jax.vmap(self._start))
        self._advance = jax.jit(self._steps, donate_argnums=0)
        self._finish = jax.jit(self._measure)

    def __call__(self, settings: Settings, seeds: Sequence[int] | Array, *, progress: bool = False) -> dict[str, Array]:
        """Trains one run per lane.

        Args:
          settings: the method's hyperparameters, each a number or an array of shape (lanes,); "interval" may be among them.
          seeds: one seed per lane.
          progress: show a progress bar.

        Returns:
          Arrays of shape (lanes,): "accuracy" on the test samples, "train_loss" on the (noisy) training labels, "grad_norm" and
          "eigenvalue" (with its "eigenvalue_residual") of that loss, and "diverged": whether the loss or a parameter is not finite,
          in which case the others are NaN.

        Raises:
          ValueError: settings other than the method's.
        """
        lanes, split = self._lanes(settings, np.asarray(seeds)), self._draw(seeds)
        states, steps = self._begin(lanes), self._recipe.steps
        with tqdm(total=steps, desc=self.method.label, unit="step", disable=not progress, leave=False) as bar:
            for first in range(0, steps, _CHUNK):
                states = self._advance(states, lanes, split, self._pool, first)
                states.step.block_until_ready()
                bar.update(min(_CHUNK, steps - first))
        found = {name: np.asarray(value) for name, value in self._finish(states.params, lanes, split, self._pool).items()}
        diverged = found["diverged"]
        return {name: value if name == "diverged" else np.where(diverged, np.nan, value) for name, value in found.items()}

    def flops(self) -> float:
        """Floating-point operations of one step of one run, as XLA counts them."""
        init, step = self._train_step(dict.fromkeys(self.method.settings, 1.0))
        state = jax.eval_shape(lambda: init(self._model.init(jax.random.key(0))))
        size = self._recipe.batch_size
        batch = jnp.zeros((size, *self._dataset.shape)), jnp.zeros(size, jnp.int32)
        analysis: Any = jax.jit(step).lower(state, batch).compile().cost_analysis()
        return float(analysis["flops"])

    def _lanes(self, settings: Settings, seeds: Array) -> dict[str, jax.Array]:
        wanted, given = set(self.method.settings), set(settings) - {"interval"}
        if wanted != given:
            raise ValueError(f"{self.method.label} needs settings for {sorted(wanted)}, got {sorted(given)}.")
        dtypes = {name: jnp.int32 if name == "interval" else jnp.float32 for name in settings}
        lanes = {name: jnp.broadcast_to(jnp.asarray(value, dtypes[name]), seeds.shape) for name, value in settings.items()}
        return lanes | {"seed": jnp.asarray(seeds, jnp.uint32)}

    def _draw(self, seeds: Sequence[int] | Array) -> data.Split:
        recipe = self._recipe
        draw = functools.cache(lambda seed: data.draw(self._dataset, seed, recipe.train_size, recipe.test_size, recipe.label_noise))
        split: data.Split = jax.tree.map(lambda *parts: jnp.stack(parts), *[draw(int(seed)) for seed in seeds])
        return split

    def _train_step(self, lane: Settings) -> TrainStep:
        regularizer = self.method.regularizer(lane)
        fraction = 1.0 if regularizer is None else self._recipe.penalty_fraction
        return make_train_step(self._loss, _optimizer(self._recipe), regularizer, penalty_fraction=fraction, donate=False)

    def _loss(self, params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, labels = batch
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(self._model.apply(params, x), labels))

    def _take(self, pool: _Pool, rows: jax.Array) -> jax.Array:
        return pool[0][rows].astype(jnp.float32) / self._dataset.scale - self._dataset.mean

    def _start(self, lane: Settings) -> TrainState:
        return self._train_step(lane).init(self._model.init(_key(lane, 0)))

    def _steps(self, states: TrainState, lanes: Settings, split: data.Split, pool: _Pool, first: jax.Array) -> TrainState:
        """Up to ``_CHUNK`` steps of all lanes, from step ``first`` on."""
        size, epoch = self._recipe.batch_size, first // self._batches
        epochs = epoch + jnp.arange(_CHUNK // self._batches + 2)
        samples = split.train.shape[-1]

        def shuffle(lane: Settings) -> jax.Array:
            return jax.vmap(lambda e: jax.random.permutation(jax.random.fold_in(_key(lane, 1), e), samples))(epochs)

        orders = jax.vmap(shuffle)(lanes)

        def one(state: TrainState, lane: Settings, split: data.Split, rows: jax.Array) -> TrainState:
            batch = self._take(pool, split.train[rows]), split.train_labels[rows]
            return self._train_step(lane).step(state, batch)[0]

        def advance(step: jax.Array, states: TrainState) -> TrainState:
            order = orders[:, step // self._batches - epoch]
            rows = jax.lax.dynamic_slice_in_dim(order, step % self._batches * size, size, axis=1)
            return jax.vmap(one)(states, lanes, split, rows)

        self.traces += 1
        last: TrainState = jax.lax.fori_loop(first, jnp.minimum(first + _CHUNK, self._recipe.steps), advance, states)
        return last

    def _measure(self, params: PyTree, lanes: Settings, split: data.Split, pool: _Pool) -> dict[str, jax.Array]:
        """The metrics of all lanes, one lane after the other for the sake of memory."""

        def one(arguments: tuple[PyTree, Settings, data.Split]) -> dict[str, jax.Array]:
            params, lane, split = arguments
            loss = self._mean(params, pool, split.train, split.train_labels, _cross_entropy)
            found = {
                "accuracy": self._mean(params, pool, split.test, pool[1][split.test], _correct),
                "train_loss": loss,
                "diverged": ~jnp.isfinite(global_norm(params) + loss),
            }
            rows = slice(min(split.train.shape[0], _CURVATURE_SAMPLES))
            batch = self._take(pool, split.train[rows]), split.train_labels[rows]
            return found | self._curvature(lambda p: self._loss(p, batch), params, lane)

        measured: dict[str, jax.Array] = jax.lax.map(one, (params, lanes, split))
        return measured

    def _curvature(self, value_fn: Any, params: PyTree, lane: Settings) -> dict[str, jax.Array]:
        found = {"grad_norm": curvature.gradient_norm(value_fn, params)}
        if not self._recipe.eigenvalue:
            return found
        value, residual = curvature.top_hessian_eigenvalue(value_fn, params, _key(lane, 2))
        return found | {"eigenvalue": value, "eigenvalue_residual": residual}

    def _mean(self, params: PyTree, pool: _Pool, rows: jax.Array, labels: jax.Array, score: _Score) -> jax.Array:
        """The mean score over samples, a few hundred at a time."""

        def one(sample: tuple[jax.Array, jax.Array]) -> jax.Array:
            row, label = sample
            return score(self._model.apply(params, self._take(pool, row[None]))[0], label)

        return jnp.mean(jax.lax.map(one, (rows, labels), batch_size=min(_EVALUATION_BATCH, rows.shape[0])))


def mean_and_error(values: Array) -> tuple[float, float]:
    """The mean and its standard error over the runs that did not diverge; the error of a single run is NaN."""
    finite = values[np.isfinite(values)]
    mean = float(np.mean(finite)) if len(finite) else float("nan")
    return mean, float(np.std(finite, ddof=1) / np.sqrt(len(finite))) if len(finite) > 1 else float("nan")


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps)
    if recipe.optimizer == "adam":
        return optax.adam(rate)
    return optax.sgd(rate, momentum=0.9 if recipe.optimizer == "momentum" else None)


def _key(lane: Settings, purpose: int) -> jax.Array:
    """A key of the lane's seed alone, so that methods and settings are paired."""
    return jax.random.fold_in(jax.random.key(lane["seed"]), purpose)


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    loss: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return loss


def _correct(logits: jax.Array, label: jax.Array) -> jax.Array:
    return (jnp.argmax(logits) == label).astype(jnp.float32)
