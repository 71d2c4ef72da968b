"""The trainer that the experiments share: many runs of one method side by side, in one compiled
program.

A *lane* is one run: a seed and the values of the hyperparameters. Lanes are stacked along a leading
axis and advance together, so a sweep compiles once per method. A seed decides on the data split,
the wrong labels, the initial parameters and the batches, whatever the
method: runs of several methods with one seed are paired.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_Score: TypeAlias = Callable[
    [jax.Array, jax.Array], jax.Array
]  # (logits, label) of one sample -> number
OptimizerName: TypeAlias = Literal["sgd", "momentum", "adam"]

METRICS = ("accuracy", "train_loss", "grad_norm", "eigenvalue", "eigenvalue_residual", "diverged")
_CHUNK = 100  # steps between two updates of the progress bar
_EVALUATION_BATCH = 500
# a run has diverged when its training loss is that many times that of a uniform guess, or not
# finite
_BLOWN_UP = 10
_CURVATURE_SAMPLES = (
    1000  # gradient norm and eigenvalue are those of the loss on so many training samples at most
)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to regularize.

    Attributes:
      label: its name in tables and figures.
      settings: the hyperparameters that ``regularizer`` reads, besides an optional "interval".
      regularizer: makes the transformation from their values, which are tracers; None for the plain
        gradient.
      gradients: gradient evaluations per step, the plain one included; a Hessian-vector product
        counts as two, and shares half of one with the plain gradient.
    """

    label: str
    settings: tuple[str, ...]
    regularizer: Callable[[Settings], optax.GradientTransformation | None]
    gradients: float


def _difference(scheme: Any) -> Callable[[Settings], optax.GradientTransformation]:
    return lambda s: fd_gradreg(
        gamma=s["gamma"], epsilon=s["epsilon"], scheme=scheme, interval=s.get("interval", 1)
    )


METHODS = {
    method.label: method
    for method in (
        Method("SGD", (), lambda s: None, 1),
        Method(
            "DB",
            ("gamma",),
            lambda s: dbp_gradreg(gamma=s["gamma"], interval=s.get("interval", 1)),
            3,
        ),
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
      warmup_steps: steps at the start over which the learning rate rises from zero along a line.
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
    warmup_steps: int = 0
    optimizer: OptimizerName = "sgd"
    penalty_fraction: float = 1.0
    eigenvalue: bool = True

    def __post_init__(self) -> None:
        """Checks what does not depend on the data."""
        for name in ("width", "depth", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps must be at least 0 and below the {self.steps} steps, got"
                f" {self.warmup_steps}."
            )
        if self.optimizer not in ("sgd", "momentum", "adam"):
            raise ValueError(
                f"unknown optimizer {self.optimizer!r}: choose one of 'sgd', 'momentum', 'adam'."
            )


class Problem:
    """What every method solves: the data, the network, the loss, and the metrics of a result.

    Attributes:
      dataset: the data.
      recipe: what the methods have in common.
      model: the network.
      pool: all inputs and labels, on the device.
      batches: number of batches in an epoch.
    """

    def __init__(self, dataset: data.Dataset, recipe: Recipe) -> None:
        """Builds the network and puts the data on the device.

        Args:
          dataset: the data.
          recipe: the rest.

        Raises:
          ValueError: a batch larger than the training set, or more samples than there are.
        """
        size = len(data.draw(dataset, 0, recipe.train_size, recipe.test_size).train)
        if recipe.batch_size > size:
            raise ValueError(
                f"batch_size must not exceed the {size} training samples, got {recipe.batch_size}."
            )
        self.dataset, self.recipe, self.batches = dataset, recipe, size // recipe.batch_size
        self.model = models.build(
            recipe.model, dataset.shape, dataset.classes, width=recipe.width, depth=recipe.depth
        )
        self.pool = (jnp.asarray(dataset.inputs), jnp.asarray(dataset.labels))
        self._init = jax.jit(lambda seed: self.model.init(_key(seed, 0)))
        self._measure = jax.jit(self._metrics)

    def init(self, seeds: jax.Array) -> PyTree:
        """The initial parameters of some seeds, stacked."""
        return jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *[self._init(seed) for seed in seeds]
        )

    def draw(self, seeds: Sequence[int] | Array) -> data.Split:
        """The splits of some seeds, stacked."""
        recipe = self.recipe
        draw = functools.cache(
            lambda seed: data.draw(
                self.dataset, seed, recipe.train_size, recipe.test_size, recipe.label_noise
            )
        )
        split: data.Split = jax.tree.map(
            lambda *parts: jnp.stack(parts), *[draw(int(seed)) for seed in seeds]
        )
        return split

    def loss(self, params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The mean cross-entropy of a batch ``(inputs, labels)``."""
        x, labels = batch
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(self.model.apply(params, x), labels)
        )

    def take(self, pool: _Pool, rows: jax.Array) -> jax.Array:
        """The inputs at some positions, as the network sees them."""
        return pool[0][rows].astype(jnp.float32) / self.dataset.scale - self.dataset.mean

    def measure(self, params: PyTree, seeds: jax.Array, split: data.Split) -> dict[str, Array]:
        """The metrics of all lanes, one after the other for the sake of memory; NaN where a run has
        diverged.
        """

        def lane(tree: PyTree, i: int) -> PyTree:
            return jax.tree.map(lambda x: x[i], tree)

        lanes = [
            self._measure(lane(params, i), seeds[i], lane(split, i), self.pool)
            for i in range(len(seeds))
        ]
        found = {name: np.array([metrics[name] for metrics in lanes]) for name in lanes[0]}
        diverged = found["diverged"]
        return {
            name: value if name == "diverged" else np.where(diverged, np.nan, value)
            for name, value in found.items()
        }

    def _metrics(
        self, params: PyTree, seed: jax.Array, split: data.Split, pool: _Pool
    ) -> dict[str, jax.Array]:
        loss = self._mean(params, pool, split.train, split.train_labels, _cross_entropy)
        rows = slice(min(split.train.shape[0], _CURVATURE_SAMPLES))
        batch = self.take(pool, split.train[rows]), split.train_labels[rows]
        found = {
            "accuracy": self._mean(params, pool, split.test, pool[1][split.test], _correct),
            "train_loss": loss,
            "grad_norm": curvature.gradient_norm(lambda p: self.loss(p, batch), params),
            "diverged": ~(
                jnp.isfinite(global_norm(params))
                & (loss < _BLOWN_UP * math.log(self.dataset.classes))
            ),
        }
        if self.recipe.eigenvalue:
            top = curvature.top_hessian_eigenvalue(
                lambda p: self.loss(p, batch), params, _key(seed, 2)
            )
            found |= {"eigenvalue": top.value, "eigenvalue_residual": top.residual}
        return found

    def _mean(
        self, params: PyTree, pool: _Pool, rows: jax.Array, labels: jax.Array, score: _Score
    ) -> jax.Array:
        """The mean score over samples, a few hundred at a time."""

        def one(sample: tuple[jax.Array, jax.Array]) -> jax.Array:
            row, label = sample
            return score(self.model.apply(params, self.take(pool, row[None]))[0], label)

        return jnp.mean(
            jax.lax.map(one, (rows, labels), batch_size=min(_EVALUATION_BATCH, rows.shape[0]))
        )


def problem(dataset: data.Dataset, recipe: Recipe) -> Problem:
    """The problem of a data set and a recipe; recipes that differ in the training alone share its
    data and its compiled metrics.
    """
    same: dict[str, Any] = {
        "steps": Recipe.steps,
        "learning_rate": Recipe.learning_rate,
        "warmup_steps": 0,
        "penalty_fraction": 1.0,
    }
    return _problem(dataset, dataclasses.replace(recipe, optimizer=Recipe.optimizer, **same))


@functools.lru_cache(maxsize=2)
def _problem(dataset: data.Dataset, recipe: Recipe) -> Problem:
    return Problem(dataset, recipe)


class Trainer:
    """Trains lanes of one method; every call with the same number of lanes runs the same compiled
    program.

    Attributes:
      method: the method.
      traces: how often the training loop has been traced; after the first call it stays 1.
    """

    def __init__(self, dataset: data.Dataset, method: Method, recipe: Recipe) -> None:
        """Prepares the programs; nothing is compiled yet.

        Args:
          dataset: the data.
          method: the method.
          recipe: the rest.

        Raises:
          ValueError: a batch larger than the training set, or more samples than there are.
        """
        self.method, self.traces = method, 0
        self._problem, self._recipe = problem(dataset, recipe), recipe
        self._begin = jax.jit(jax.vmap(self._start))
        self._advance = jax.jit(self._steps, donate_argnums=0)

    def __call__(
        self, settings: Settings, seeds: Sequence[int] | Array, *, progress: bool = False
    ) -> dict[str, Array]:
        """Trains one run per lane.

        Args:
          settings: the method's hyperparameters, each a number or an array of shape (lanes,);
            "interval" may be among them.
          seeds: one seed per lane.
          progress: show a progress bar.

        Returns:
          Arrays of shape (lanes,): "accuracy" on the test samples, "train_loss" on the (noisy)
          training labels, "grad_norm" and "eigenvalue" (with its "eigenvalue_residual") of that
          loss, and "diverged": whether the training loss is ten times that of a uniform guess or
          the parameters are not finite, in which case the others are NaN.

        Raises:
          ValueError: settings other than the method's.
        """
        last = functools.reduce(
            lambda _, states: states, self.states(settings, seeds, progress=progress)
        )
        return self._problem.measure(
            last.params, jnp.asarray(seeds, jnp.uint32), self._problem.draw(seeds)
        )

    def states(
        self, settings: Settings, seeds: Sequence[int] | Array, *, progress: bool = False
    ) -> Iterator[TrainState]:
        """The states of all lanes along the training: the initial one, one after every 100 steps,
        and the last one.

        Args:
          settings: as for a call.
          seeds: as for a call.
          progress: as for a call.

        Yields:
          States with a leading axis of lanes; the memory of each is used again for the next.

        Raises:
          ValueError: settings other than the method's.
        """
        lanes, split = self._lanes(settings, np.asarray(seeds)), self._problem.draw(seeds)
        states, steps = self._begin(lanes, self._problem.init(lanes["seed"])), self._recipe.steps
        yield states
        with tqdm(
            total=steps, desc=self.method.label, unit="step", disable=not progress, leave=False
        ) as bar:
            for first in range(0, steps, _CHUNK):
                states = self._advance(states, lanes, split, self._problem.pool, first)
                states.step.block_until_ready()
                bar.update(min(_CHUNK, steps - first))
                yield states

    def flops(self) -> float:
        """Floating-point operations of one step of one run, as XLA counts them."""
        init, step = self._train_step(dict.fromkeys(self.method.settings, 1.0))
        state = jax.eval_shape(lambda: init(self._problem.model.init(jax.random.key(0))))
        size = self._recipe.batch_size
        batch = jnp.zeros((size, *self._problem.dataset.shape)), jnp.zeros(size, jnp.int32)
        analysis: Any = jax.jit(step).lower(state, batch).compile().cost_analysis()
        return float(analysis["flops"])

    def _lanes(self, settings: Settings, seeds: Array) -> dict[str, jax.Array]:
        wanted, given = set(self.method.settings), set(settings) - {"interval"}
        if wanted != given:
            raise ValueError(
                f"{self.method.label} needs settings for {sorted(wanted)}, got {sorted(given)}."
            )
        dtypes = {name: jnp.int32 if name == "interval" else jnp.float32 for name in settings}
        lanes = {
            name: jnp.broadcast_to(jnp.asarray(value, dtypes[name]), seeds.shape)
            for name, value in settings.items()
        }
        return lanes | {"seed": jnp.asarray(seeds, jnp.uint32)}

    def _train_step(self, lane: Settings) -> TrainStep:
        regularizer = self.method.regularizer(lane)
        fraction = 1.0 if regularizer is None else self._recipe.penalty_fraction
        return make_train_step(
            self._problem.loss,
            _optimizer(self._recipe),
            regularizer,
            penalty_fraction=fraction,
            donate=False,
        )

    def _start(self, lane: Settings, params: PyTree) -> TrainState:
        return self._train_step(lane).init(params)

    def _steps(
        self, states: TrainState, lanes: Settings, split: data.Split, pool: _Pool, first: jax.Array
    ) -> TrainState:
        """Up to ``_CHUNK`` steps of all lanes, from step ``first`` on."""
        self.traces += 1
        size, batches = self._recipe.batch_size, self._problem.batches
        epochs = first // batches + jnp.arange(_CHUNK // batches + 2)
        orders = jax.vmap(lambda seed: _shuffles(seed, epochs, split.train.shape[-1]))(
            lanes["seed"]
        )

        def one(
            state: TrainState, lane: Settings, split: data.Split, rows: jax.Array
        ) -> TrainState:
            batch = self._problem.take(pool, split.train[rows]), split.train_labels[rows]
            return self._train_step(lane).step(state, batch)[0]

        def advance(step: jax.Array, states: TrainState) -> TrainState:
            order = orders[:, step // batches - first // batches]
            rows = jax.lax.dynamic_slice_in_dim(order, step % batches * size, size, axis=1)
            return jax.vmap(one)(states, lanes, split, rows)

        last: TrainState = jax.lax.fori_loop(
            first, jnp.minimum(first + _CHUNK, self._recipe.steps), advance, states
        )
        return last


def _shuffles(seed: jax.Array, epochs: jax.Array, samples: int) -> jax.Array:
    """An order of the training samples for each epoch."""
    return jax.vmap(
        lambda epoch: jax.random.permutation(jax.random.fold_in(_key(seed, 1), epoch), samples)
    )(epochs)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps - recipe.warmup_steps)
    if recipe.warmup_steps:
        rising = optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup_steps)
        rate = optax.join_schedules([rising, rate], [recipe.warmup_steps])
    if recipe.optimizer == "adam":
        return optax.adam(rate)
    return optax.sgd(rate, momentum=0.9 if recipe.optimizer == "momentum" else None)


def _key(seed: jax.Array, purpose: int) -> jax.Array:
    """A key that depends on the seed alone, so that methods and settings are paired."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    loss: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return loss


def _correct(logits: jax.Array, label: jax.Array) -> jax.Array:
    return (jnp.argmax(logits) == label).astype(jnp.float32)
