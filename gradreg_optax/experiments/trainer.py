"""Trainer of the experiments: many runs of one method in one compiled program.

A *lane* is one run: a seed and the values of the hyperparameters. Lanes are stacked along a leading
axis and advance together, so a sweep compiles once per method. The seed alone determines the data
split, the label noise, the initial parameters and the batches. So runs of different methods with
one seed are paired.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradreg_optax as gr
from gradreg_optax import curvature
from gradreg_optax.experiments import common, data, models
from gradreg_optax.experiments.models import Model, PyTree

Transformation: TypeAlias = optax.GradientTransformation
Pool: TypeAlias = tuple[jax.Array, jax.Array]  # all inputs and all labels of the data set
Metrics: TypeAlias = Callable[
    ["Problem", PyTree, jax.Array, data.Split, Pool], dict[str, jax.Array]
]  # (problem, params, seed, split, pool) of one lane -> its metrics, including "diverged"
Seeds: TypeAlias = Sequence[int] | data.Array
OptimizerName: TypeAlias = Literal["sgd", "momentum", "adam", "adamw"]
OPTIMIZERS: dict[str, Callable[[Any], Transformation]] = {
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
}

_CHUNK = 100  # steps of a program
_EVALUATION_BATCH = 500
_DIVERGED = 10  # training loss of a diverged run, relative to that of uniform predictions
_CURVATURE_SAMPLES = 1000  # at most, for gradient norm and eigenvalue


class Method(NamedTuple):
    """A regularizer.

    Attributes:
      label: its name in tables and figures.
      make: function from the values of ``settings`` (traced keyword arguments), and from "interval"
        if a run has one, to the transformation. None for the plain gradient.
      settings: names of the hyperparameters.
      gradients: gradient evaluations per step, including the plain one. A Hessian-vector product
        counts as two.
      evaluations: held-out evaluations of the loss per penalised step. Each is a forward pass,
        which costs a third of a gradient.
    """

    label: str
    make: Callable[..., Transformation] | None
    settings: tuple[str, ...] = ()
    gradients: float = 1
    evaluations: int = 0

    def cost(self, fraction: float = 1.0, interval: float = 1) -> float:
        """Return the gradients per step, with the penalty on a fraction of the batch."""
        extra = self.gradients - 1
        penalty = extra if fraction == 1 or not extra else self.gradients * fraction
        return 1 + (penalty + self.evaluations / 3) / interval


# The sweep takes the values of a hyperparameter from the option with its name in the plural.
METHODS = {
    method.label: method
    for method in (
        Method("SGD", None),
        Method("DB", gr.dbp_gradreg, ("gamma",), 3),
        Method("B-GR", partial(gr.fd_gradreg, scheme="backward"), ("gamma", "epsilon"), 2),
        Method("C-GR", partial(gr.fd_gradreg, scheme="central"), ("gamma", "epsilon"), 3),
        Method("F-GR", gr.fd_gradreg, ("gamma", "epsilon"), 2),
        Method("SAM", gr.sam, ("rho",), 2),
        Method("ASAM", gr.asam, ("rho",), 2),
        Method("GNP", gr.gradient_norm_penalty, ("gamma", "epsilon"), 2),
        Method("relative", gr.relative_gradreg, ("strength",), 2),
        Method("flooding", gr.flooding, ("level",), 1),
    )
}
SELF_TUNED = Method("self-tuned", partial(gr.relative_gradreg, strength=None), (), 2, 1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings that all methods of an experiment share.

    Attributes:
      model: "mlp", "cnn", "resnet", or your own network: a
        :class:`~gradreg_optax.experiments.models.Model` or any pair ``(init, apply)`` like it.
      width: see :func:`gradreg_optax.experiments.models.build`.
      depth: see there.
      train_size: number of training samples; None for all.
      test_size: number of test samples; None for all.
      label_noise: fraction of the training samples with label noise.
      batch_size: samples per step, drawn without replacement in every epoch.
      steps: number of steps.
      learning_rate: initial learning rate of a cosine schedule that ends at zero.
      optimizer: "sgd", "momentum" (0.9), "adam", "adamw", or a function from a learning-rate
        schedule to an Optax optimizer.
      penalty_fraction: fraction of the batch for the penalty.
      held_out: number of training samples that are held out. A self-tuned method evaluates a batch
        of them in every penalised step.
      eigenvalue: whether to measure the top Hessian eigenvalue at the end.
    """

    model: str | Model | tuple[Callable[..., Any], Callable[..., Any]] = "mlp"
    width: int = 64
    depth: int = 1
    train_size: int | None = 300
    test_size: int | None = 1000
    label_noise: float = 0.3
    batch_size: int = 32
    steps: int = 3000
    learning_rate: float = 0.2
    optimizer: str | Callable[[Any], Transformation] = "sgd"
    penalty_fraction: float = 1.0
    held_out: int = 0
    eigenvalue: bool = True

    def __post_init__(self) -> None:
        """Check all settings that do not depend on the data."""
        common.at_least(self, 1, "width", "depth", "batch_size", "steps")
        common.at_least(self, 0, "learning_rate", "held_out")
        if not callable(self.optimizer):
            common.some_of("optimizer", [self.optimizer], OPTIMIZERS)
        if not isinstance(self.model, str) and list(map(callable, self.model)) != [True, True]:
            raise common.CommandError(
                f"model must be a name or a pair of functions (init, apply), got {self.model}."
            )

    def describe(self) -> dict[str, Any]:
        """Return the fields, with functions replaced by their names."""
        model = self.model if isinstance(self.model, str) else name_of(self.model[1])
        optimizer = self.optimizer if isinstance(self.optimizer, str) else name_of(self.optimizer)
        return vars(self) | {"model": model, "optimizer": optimizer}


def name_of(function: Any) -> str:
    """Return the name of a function or of a ``functools.partial`` of it."""
    function = getattr(function, "func", function)
    return str(getattr(function, "__name__", type(function).__name__))


class Problem:
    """The task that all methods share: data, network, loss and metrics.

    Attributes:
      dataset: the data.
      recipe: the shared settings.
      model: the network.
      loss: the mean cross-entropy, ``loss(params, (inputs, labels))``.
      pool: all inputs and labels, on the device.
      drawn: number of drawn training samples.
      size: number of drawn training samples that are not held out.
      batches: number of batches per epoch.
    """

    def __init__(self, dataset: data.Dataset, recipe: Recipe) -> None:
        """Build the network and copy the data to the device.

        Args:
          dataset: the data.
          recipe: the shared settings.

        Raises:
          CommandError: a batch larger than the training set, more samples than there are, or a
            network with an unexpected output shape.
        """
        self.drawn = len(data.draw(dataset, 0, recipe.train_size, recipe.test_size).train)
        self.size = self.drawn - recipe.held_out
        if recipe.batch_size > self.size:
            raise common.CommandError(
                f"batch_size must be at most {self.size}, the number of training samples, got"
                f" {recipe.batch_size}."
            )
        self.dataset, self.recipe, self.batches = dataset, recipe, self.size // recipe.batch_size
        self.model = _model(dataset, recipe)
        self.loss = cross_entropy(self.model.apply)
        self.pool = (jnp.asarray(dataset.inputs), jnp.asarray(dataset.labels))
        self._init = jax.jit(lambda seed: self.model.init(_key(seed, 0)))
        self._jitted = cache(lambda metrics: jax.jit(partial(metrics, self)))

    def init(self, seeds: jax.Array) -> PyTree:
        """Return the stacked initial parameters of some seeds."""
        return stacked(map(self._init, seeds))

    def draw(self, seeds: Seeds) -> data.Split:
        """Return the stacked splits of some seeds."""
        sizes = self.recipe.train_size, self.recipe.test_size, self.recipe.label_noise
        draw = cache(lambda seed: data.draw(self.dataset, seed, *sizes))
        return data.Split(*stacked(draw(int(seed)) for seed in seeds))

    def take(self, pool: Pool, rows: jax.Array) -> jax.Array:
        """Return inputs by index, scaled and centred."""
        x = pool[0][rows]
        if self.dataset.tokens:
            return x
        return x.astype(jnp.float32) / self.dataset.scale - self.dataset.mean

    def batch(self, pool: Pool, split: data.Split, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return training samples of a split by index, with their labels."""
        return self.take(pool, split.train[rows]), split.train_labels[rows]

    def measure(
        self, params: PyTree, seeds: jax.Array, split: data.Split, metrics: Metrics | None = None
    ) -> dict[str, data.Array]:
        """Return the metrics of all lanes, NaN for diverged runs.

        The lanes are measured one after another to save memory.
        """
        jitted, stacks = self._jitted(metrics or Problem.metrics), (params, seeds, split)
        lanes = (jax.tree.map(lambda x, i=i: x[i], stacks) for i in range(len(seeds)))
        rows = [jitted(*lane, self.pool) for lane in lanes]
        found = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        diverged = found.pop("diverged")
        found = {name: np.where(diverged, np.nan, values) for name, values in found.items()}
        return found | {"diverged": diverged}

    def lowered(self, metrics: Metrics) -> Any:
        """Return the lowered program of metrics."""
        params = jax.eval_shape(self.model.init, jax.random.key(0))
        split = jax.tree.map(lambda x: x[0], self.draw([0]))
        return self._jitted(metrics).lower(params, jnp.uint32(0), split, self.pool)

    def metrics(
        self, params: PyTree, seed: jax.Array, split: data.Split, pool: Pool
    ) -> dict[str, jax.Array]:
        """Return the metrics of one lane, see :class:`Trainer`."""
        train = split.train[: self.size], split.train_labels[: self.size]
        accuracy, test_loss = self._means(params, pool, (split.test, pool[1][split.test]))
        _, loss = self._means(params, pool, train)
        batch = self.batch(pool, split, jnp.arange(min(len(train[0]), _CURVATURE_SAMPLES)))
        finite, uniform = jnp.isfinite(optax.tree.norm(params)), math.log(self.dataset.classes)
        found = {
            "accuracy": accuracy,
            "test_loss": test_loss,
            "train_loss": loss,
            "grad_norm": curvature.gradient_norm(lambda p: self.loss(p, batch), params),
            "diverged": ~(finite & (loss < _DIVERGED * uniform)),
        }
        if self.recipe.eigenvalue:
            key = _key(seed, 2)
            top = curvature.top_hessian_eigenvalue(lambda p: self.loss(p, batch), params, key)
            found |= {"eigenvalue": top.value, "eigenvalue_residual": top.residual}
        return found

    def _means(self, params: PyTree, pool: Pool, samples: Pool) -> tuple[jax.Array, jax.Array]:
        """Return accuracy and mean cross-entropy over samples, given by index and label."""

        def one(sample: Pool) -> Pool:
            row, label = sample
            logits = self.model.apply(params, self.take(pool, row[None]))[0]
            correct = (jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)
            return jnp.mean(correct), _cross_entropy(logits, label)

        size = min(_EVALUATION_BATCH, len(samples[0]))
        return jax.tree.map(jnp.mean, jax.lax.map(one, samples, batch_size=size))


def stacked(trees: Iterable[PyTree]) -> PyTree:
    """Stack the leaves of trees along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def problem(dataset: data.Dataset, recipe: Recipe) -> Problem:
    """Return the problem of a data set and a recipe.

    Recipes that differ only in the training share its data and its compiled metrics.
    """
    training: dict[str, Any] = {"learning_rate": 0, "penalty_fraction": 1, "optimizer": "sgd"}
    return _problem(dataset, dataclasses.replace(recipe, steps=1, **training))


@lru_cache(maxsize=2)
def _problem(dataset: data.Dataset, recipe: Recipe) -> Problem:
    return Problem(dataset, recipe)


class Trainer:
    """Trains lanes of one method; calls with the same number of lanes share a compiled program.

    Attributes:
      method: the method.
      digest: see :meth:`_digest`; each program is lowered once.
    """

    def __init__(self, dataset: data.Dataset, method: Method, recipe: Recipe) -> None:
        """Prepare the programs without compiling them.

        Args:
          dataset: the data.
          method: the method.
          recipe: the shared settings.

        Raises:
          CommandError: a batch larger than the training set, or more samples than there are.
        """
        self.method = method
        self._problem, self._recipe = problem(dataset, recipe), recipe
        self._uses_held_out = bool(recipe.held_out and method.evaluations)
        self._begin = jax.jit(jax.vmap(lambda lane, params: self._train_step(lane).init(params)))
        self._advance = jax.jit(self._steps, donate_argnums=0)
        self.digest = cache(self._digest)

    def __call__(
        self, settings: Mapping[str, Any], seeds: Seeds, metrics: Metrics | None = None
    ) -> dict[str, data.Array]:
        """Train one run per lane.

        Args:
          settings: hyperparameters of the method, and optionally "interval", each a number or an
            array of shape (lanes,).
          seeds: one seed per lane.
          metrics: replacement for the metrics below.

        Returns:
          Arrays of shape (lanes,): "accuracy" and "test_loss" on the test samples; "train_loss" on
          the (noisy) training labels, with its "grad_norm" and top Hessian "eigenvalue" (and
          "eigenvalue_residual"); and "diverged", whether the training loss is ten times that of
          uniform predictions or the parameters are not finite. All others are NaN for diverged
          runs.

        Raises:
          CommandError: settings of another method.
        """
        for states in self.states(settings, seeds):
            params = states.params
        lanes = jnp.asarray(seeds, jnp.uint32), self._problem.draw(seeds)
        return self._problem.measure(params, *lanes, metrics)

    def states(self, settings: Mapping[str, Any], seeds: Seeds) -> Iterator[gr.TrainState]:
        """Yield the states of all lanes: at the start, after every 100 steps, and at the end.

        Args:
          settings: as for a call.
          seeds: as for a call.

        Yields:
          States with a leading axis of lanes; the next step reuses their memory.

        Raises:
          CommandError: settings of another method.
        """
        lanes = self._lanes(settings, np.asarray(seeds))
        samples = self._problem.draw(seeds), self._problem.pool
        states = self._begin(lanes, self._problem.init(lanes["seed"]))
        yield states
        for first in range(0, self._recipe.steps, _CHUNK):
            states = self._advance(states, lanes, samples, first)
            states.step.block_until_ready()
            yield states

    def flops(self) -> float:
        """Return XLA's count of floating-point operations of one step of one run."""
        lane = dict.fromkeys(self.method.settings, 1.0)
        step: Any = jax.jit(partial(self._step, lane))
        return float(step.lower(*self._example(lane)).compile().cost_analysis()["flops"])

    def _digest(self, settings: tuple[str, ...], metrics: Metrics | None = None) -> str:
        """Return a digest of initialization, step and metrics, including the user's own functions.

        Args:
          settings: names of the hyperparameters of the runs.
          metrics: as for a call.
        """
        lane = {name: _setting(name, 1) for name in settings}
        programs = [jax.jit(self._problem.model.init).lower(jax.random.key(0))]
        programs.append(jax.jit(self._step).lower(lane, *self._example(lane)))
        programs += [self._problem.lowered(metrics)] if metrics else []
        return hashlib.sha256("".join(one.as_text() for one in programs).encode()).hexdigest()

    def _step(self, lane: Mapping[str, Any], state: Any, batch: Any, held_out: Any) -> Any:
        return self._train_step(lane).step(state, batch, held_out=held_out)

    def _example(self, lane: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Return a state, a batch and held-out samples with the shapes of a step."""
        task, rows = self._problem, jnp.arange(self._recipe.batch_size)
        params = jax.eval_shape(task.model.init, jax.random.key(0))
        state = jax.eval_shape(self._train_step(lane).init, params)
        batch = task.batch(task.pool, jax.tree.map(lambda x: x[0], task.draw([0])), rows)
        return state, batch, batch if self._uses_held_out else None

    def _lanes(self, settings: Mapping[str, Any], seeds: data.Array) -> dict[str, jax.Array]:
        expected, given = set(self.method.settings), set(settings) - {"interval"}
        if expected != given:
            raise common.CommandError(
                f"{self.method.label} needs settings for {sorted(expected)}, got {sorted(given)}."
            )
        lanes = {name: _setting(name, value, seeds.shape) for name, value in settings.items()}
        return lanes | {"seed": jnp.asarray(seeds, jnp.uint32)}

    def _train_step(self, lane: Mapping[str, Any]) -> gr.TrainStep:
        chosen = {name: value for name, value in lane.items() if name != "seed"}
        fraction = self._recipe.penalty_fraction
        if self.method.gradients == 1:  # no penalty that could be lazy
            chosen.pop("interval", None)
            fraction = 1.0
        regularizer = None if self.method.make is None else self.method.make(**chosen)
        loss, optimizer = self._problem.loss, _optimizer(self._recipe)
        options: Any = {"penalty_fraction": fraction, "donate": False}
        return gr.make_train_step(loss, optimizer, regularizer, **options)

    def _steps(self, states: Any, lanes: Mapping[str, Any], samples: Any, first: Any) -> Any:
        """Take up to ``_CHUNK`` steps of all lanes, starting with step ``first``."""
        splits, pool = samples
        task, size, batches = self._problem, self._recipe.batch_size, self._problem.batches
        epochs = first // batches + jnp.arange(_CHUNK // batches + 2)
        orders = jax.vmap(lambda seed: _shuffles(seed, epochs, task.size))(lanes["seed"])

        def one(state: Any, lane: Mapping[str, Any], split: data.Split, rows: jax.Array) -> Any:
            held_out = None
            if self._uses_held_out:
                key = jax.random.fold_in(_key(lane["seed"], 3), state.step)
                drawn = jax.random.randint(key, (size,), task.size, task.drawn)
                held_out = task.batch(pool, split, drawn)
            return self._step(lane, state, task.batch(pool, split, rows), held_out)[0]

        def advance(step: jax.Array, states: Any) -> Any:
            order = orders[:, step // batches - first // batches]
            rows = jax.lax.dynamic_slice_in_dim(order, step % batches * size, size, axis=1)
            return jax.vmap(one)(states, lanes, splits, rows)

        end = jnp.minimum(first + _CHUNK, self._recipe.steps)
        return jax.lax.fori_loop(first, end, advance, states)


def _shuffles(seed: jax.Array, epochs: jax.Array, samples: int) -> jax.Array:
    """Return an order of the training samples for each epoch."""
    keys = jax.vmap(lambda epoch: jax.random.fold_in(_key(seed, 1), epoch))(epochs)
    return jax.vmap(lambda key: jax.random.permutation(key, samples))(keys)


def _setting(name: str, value: Any, shape: tuple[int, ...] = ()) -> jax.Array:
    dtype = jnp.int32 if name == "interval" else jnp.float32
    return jnp.broadcast_to(jnp.asarray(value, dtype), shape)


def _model(dataset: data.Dataset, recipe: Recipe) -> Model:
    """Return the network of a recipe, after a check of its output shape."""
    if isinstance(recipe.model, str):
        size: dict[str, Any] = {"width": recipe.width, "depth": recipe.depth}
        return models.build(recipe.model, dataset.shape, dataset.classes, **size)
    init, apply = recipe.model
    x = jnp.zeros((2, *dataset.shape), jnp.int32 if dataset.tokens else jnp.float32)
    shape = jax.eval_shape(lambda key, x: apply(init(key), x), jax.random.key(0), x).shape
    expected = (*dataset.train_y.shape[1:], dataset.classes)
    if shape != (2, *expected):
        raise common.CommandError(
            f"model must return logits of shape (batch, {', '.join(map(str, expected))}), got"
            f" {shape} for a batch of 2 inputs of shape {dataset.shape}."
        )
    return Model(init, apply)


def _optimizer(recipe: Recipe) -> Transformation:
    chosen, rate = recipe.optimizer, optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps)
    return chosen(rate) if callable(chosen) else OPTIMIZERS[chosen](rate)


def _key(seed: jax.Array, purpose: int) -> jax.Array:
    """Return a key that depends on the seed alone, so that methods and settings are paired."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def cross_entropy(apply: Callable[..., jax.Array]) -> Callable[[PyTree, Any], jax.Array]:
    """Return the mean cross-entropy of a network as ``loss(params, (inputs, labels))``."""
    return lambda params, batch: _cross_entropy(apply(params, batch[0]), batch[1])


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
