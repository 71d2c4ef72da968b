"""The trainer that the experiments share: many runs of one method side by side, in one compiled
program.

A *lane* is one run: a seed and the values of the hyperparameters. Lanes are stacked along a leading
axis and advance together, so a sweep compiles once per method. A seed decides on the data split,
the wrong labels, the initial parameters and the batches, whatever the
method: runs of several methods with one seed are paired.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from gradreg_optax import (
    TrainState,
    TrainStep,
    asam,
    curvature,
    dbp_gradreg,
    fd_gradreg,
    flooding,
    gradient_norm_penalty,
    make_train_step,
    relative_gradreg,
    sam,
)
from gradreg_optax.experiments import common, data, models
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.models import Model, PyTree

Array: TypeAlias = npt.NDArray[Any]
Settings: TypeAlias = Mapping[str, Any]
Transformation: TypeAlias = optax.GradientTransformation
Pool: TypeAlias = tuple[jax.Array, jax.Array]  # all inputs and all labels of the data set
# (problem, params, seed, split, pool) of one lane -> its metrics, "diverged" among them
Metrics: TypeAlias = Callable[
    ["Problem", PyTree, jax.Array, data.Split, Pool], dict[str, jax.Array]
]
# (logits, label) of one sample -> number
_Score: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
Seeds: TypeAlias = Sequence[int] | Array
Told: TypeAlias = Callable[[int], Any]  # is told how many steps have been taken
OptimizerName: TypeAlias = Literal["sgd", "momentum", "adam", "adamw"]
OPTIMIZERS: dict[str, Callable[[Any], Transformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
}

_CHUNK = 100  # steps between two updates of the progress bar
_EVALUATION_BATCH = 500
# a run has diverged when its training loss is that many times that of a uniform guess, or not
# finite
_BLOWN_UP = 10
# gradient norm and eigenvalue are those of the loss on so many training samples at most
_CURVATURE_SAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to regularize.

    Attributes:
      label: its name in tables and figures.
      make: makes the transformation from the values of ``settings``, given by name, which are
        tracers; from "interval" too, if a run has one. None for the plain gradient.
      settings: the names of its hyperparameters.
      gradients: gradient evaluations per step, the plain one included; a Hessian-vector product
        counts as two, and shares half of one with the plain gradient.
      evaluations: of the loss on a batch of held-out samples, in every step that takes the penalty;
        each is a forward pass, a third of a gradient.
    """

    label: str
    make: Callable[..., Transformation] | None
    settings: tuple[str, ...] = ()
    gradients: float = 1
    evaluations: int = 0

    def cost(self, fraction: float = 1.0, interval: float = 1) -> float:
        """Gradients per step, with the penalty on a fraction of the batch and on every
        ``interval``-th step.
        """
        extra = self.gradients - 1
        penalty = extra if fraction == 1 or not extra else self.gradients * fraction
        return 1 + (penalty + self.evaluations / 3) / interval

    def call(self, settings: Settings) -> str:
        """How its transformation is made, as code."""
        if self.make is None:
            return "no penalty"
        fixed = getattr(self.make, "keywords", {})
        given = [f"{name}={value!r}" for name, value in fixed.items()]
        given += [f"{name}={value:g}" for name, value in settings.items()]
        return f"{name_of(self.make)}({', '.join(given)})"


# One row a method; the sweep takes the values of a setting from the option of its name in plural.
METHODS = {
    method.label: method
    for method in (
        Method("SGD", None),
        Method("DB", dbp_gradreg, ("gamma",), 3),
        Method("B-GR", functools.partial(fd_gradreg, scheme="backward"), ("gamma", "epsilon"), 2),
        Method("C-GR", functools.partial(fd_gradreg, scheme="central"), ("gamma", "epsilon"), 3),
        Method("F-GR", fd_gradreg, ("gamma", "epsilon"), 2),
        Method("SAM", sam, ("rho",), 2),
        Method("ASAM", asam, ("rho",), 2),
        Method("GNP", gradient_norm_penalty, ("gamma", "epsilon"), 2),
        Method("relative", relative_gradreg, ("strength",), 2),
        Method("flooding", flooding, ("level",), 1),
    )
}
SELF_TUNED = Method("self-tuned", functools.partial(relative_gradreg, strength=None), (), 2, 1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all methods of an experiment have in common.

    Attributes:
      model: "mlp", "cnn", or a network of your own: a
        :class:`~gradreg_optax.experiments.models.Model` or any pair ``(init, apply)`` like it.
      width: see :func:`gradreg_optax.experiments.models.build`.
      depth: see there.
      train_size: number of training samples, None for all.
      test_size: number of test samples, None for all.
      label_noise: share of the training samples with a wrong label.
      batch_size: samples per step, drawn without replacement in every epoch.
      steps: number of steps.
      learning_rate: the first learning rate; it falls to zero along a cosine.
      warmup_steps: steps at the start over which the learning rate rises from zero along a line.
      optimizer: "sgd", "momentum" (0.9), "adam", "adamw", or any function of a learning-rate
        schedule that makes an Optax optimizer.
      penalty_fraction: share of the batch that the penalty is taken on.
      held_out: how many of the training samples no step trains on; a method that tunes itself
        looks at some of these in every step, as many as a batch has.
      eigenvalue: measure the top Hessian eigenvalue at the end.
      measured: the training loss, its gradient and its curvature are measured on so many training
        samples at most; by default on all, and on 1000.
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
    warmup_steps: int = 0
    optimizer: str | Callable[[Any], Transformation] = "sgd"
    penalty_fraction: float = 1.0
    held_out: int = 0
    eigenvalue: bool = True
    measured: int | None = None

    def __post_init__(self) -> None:
        """Checks what does not depend on the data."""
        common.at_least(self, 1, "width", "depth", "batch_size", "steps", "measured")
        common.at_least(self, 0, "learning_rate", "held_out")
        if not 0 <= self.warmup_steps < self.steps:
            raise CommandError(
                f"warmup_steps must be at least 0 and below the {self.steps} steps, got"
                f" {self.warmup_steps}."
            )
        if not callable(self.optimizer) and self.optimizer not in OPTIMIZERS:
            raise CommandError(
                f"unknown optimizer {self.optimizer!r}: choose one of"
                f" {', '.join(map(repr, OPTIMIZERS))}, or give a function of a schedule."
            )
        if not isinstance(self.model, str):
            pair: Any = tuple(self.model)
            if len(pair) != 2 or not all(map(callable, pair)):
                raise CommandError(
                    f"model must be a name or a pair of functions (init, apply), got {self.model}."
                )
            object.__setattr__(self, "model", Model(*pair))  # hashable, also if it was a list

    def describe(self) -> dict[str, Any]:
        """Its fields, with the names of functions in their place."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        model, optimizer = self.model, self.optimizer
        fields["model"] = model if isinstance(model, str) else name_of(model[1])
        fields["optimizer"] = optimizer if isinstance(optimizer, str) else name_of(optimizer)
        return fields


def name_of(function: Any) -> str:
    """A function's name, also where some of its arguments are fixed."""
    function = getattr(function, "func", function)
    return str(getattr(function, "__name__", type(function).__name__))


class Problem:
    """What every method solves: the data, the network, the loss, and the metrics of a result.

    Attributes:
      dataset: the data.
      recipe: what the methods have in common.
      model: the network.
      loss: the mean cross-entropy, ``loss(params, (inputs, labels))``.
      pool: all inputs and labels, on the device.
      drawn: number of samples that are drawn for training.
      size: number of those that are trained on.
      batches: number of batches in an epoch.
    """

    def __init__(self, dataset: data.Dataset, recipe: Recipe) -> None:
        """Builds the network and puts the data on the device.

        Args:
          dataset: the data.
          recipe: the rest.

        Raises:
          CommandError: a batch larger than the training set, more samples than there are, or a
            network that does not give one number for each sample and class.
        """
        self.drawn = len(data.draw(dataset, 0, recipe.train_size, recipe.test_size).train)
        self.size = self.drawn - recipe.held_out
        if recipe.batch_size > self.size:
            raise CommandError(
                f"batch_size must not exceed the {self.size} training samples, got"
                f" {recipe.batch_size}."
            )
        self.dataset, self.recipe, self.batches = dataset, recipe, self.size // recipe.batch_size
        self.model = _model(dataset, recipe)
        self.loss = cross_entropy(self.model.apply)
        self.pool = (jnp.asarray(dataset.inputs), jnp.asarray(dataset.labels))
        self._init = jax.jit(lambda seed: self.model.init(_key(seed, 0)))
        self._measure = functools.cache(lambda how: jax.jit(functools.partial(how, self)))
        self.program = functools.cache(self._program)

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

    def take(self, pool: Pool, rows: jax.Array) -> jax.Array:
        """The inputs at some positions, as the network sees them."""
        x = pool[0][rows]
        if self.dataset.tokens:
            return x
        return x.astype(jnp.float32) / self.dataset.scale - self.dataset.mean

    def batch(self, pool: Pool, split: data.Split, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Some of the samples that a seed drew for training, with their labels."""
        return self.take(pool, split.train[rows]), split.train_labels[rows]

    def measure(
        self, params: PyTree, seeds: jax.Array, split: data.Split, metrics: Metrics | None = None
    ) -> dict[str, Array]:
        """The metrics of all lanes, one after the other for the sake of memory; NaN where a run has
        diverged.
        """
        measure = self._measure(metrics or Problem.metrics)

        lanes = []
        for i in range(len(seeds)):
            lane = jax.tree.map(lambda x, i=i: x[i], (params, seeds, split))
            lanes.append(measure(*lane, self.pool))
        found = {name: np.array([metrics[name] for metrics in lanes]) for name in lanes[0]}
        diverged = found["diverged"]
        return {
            name: value if name == "diverged" else np.where(diverged, np.nan, value)
            for name, value in found.items()
        }

    def _program(self, metrics: Metrics) -> str:
        """Metrics as a program: what they depend on, also in a function of the user's own."""
        params = jax.eval_shape(self.model.init, jax.random.key(0))
        split = jax.tree.map(lambda x: x[0], self.draw([0]))
        return self._measure(metrics).lower(params, jnp.uint32(0), split, self.pool).as_text()

    def metrics(
        self, params: PyTree, seed: jax.Array, split: data.Split, pool: Pool
    ) -> dict[str, jax.Array]:
        """The metrics of one lane, see :class:`Trainer`."""
        size = min(self.size, self.recipe.measured or self.size)
        train = split.train[:size], split.train_labels[:size]
        test = split.test, pool[1][split.test]
        loss = self._mean(params, pool, train, _cross_entropy)
        batch = self.batch(pool, split, jnp.arange(min(size, _CURVATURE_SAMPLES)))
        finite, most = jnp.isfinite(optax.tree.norm(params)), math.log(self.dataset.classes)
        found = {
            "accuracy": self._mean(params, pool, test, _correct),
            "test_loss": self._mean(params, pool, test, _cross_entropy),
            "train_loss": loss,
            "grad_norm": curvature.gradient_norm(lambda p: self.loss(p, batch), params),
            "diverged": ~(finite & (loss < _BLOWN_UP * most)),
        }
        if self.recipe.eigenvalue:
            top = curvature.top_hessian_eigenvalue(
                lambda p: self.loss(p, batch), params, _key(seed, 2)
            )
            found |= {"eigenvalue": top.value, "eigenvalue_residual": top.residual}
        return found

    def _mean(
        self, params: PyTree, pool: Pool, samples: tuple[jax.Array, jax.Array], score: _Score
    ) -> jax.Array:
        """The mean score over samples, given by position and label, a few hundred at a time."""

        def one(sample: tuple[jax.Array, jax.Array]) -> jax.Array:
            row, label = sample
            return score(self.model.apply(params, self.take(pool, row[None]))[0], label)

        size = min(_EVALUATION_BATCH, len(samples[0]))
        return jnp.mean(jax.lax.map(one, samples, batch_size=size))


def problem(dataset: data.Dataset, recipe: Recipe) -> Problem:
    """The problem of a data set and a recipe; recipes that differ in the training alone share its
    data and its compiled metrics.
    """
    training = ("steps", "learning_rate", "warmup_steps", "penalty_fraction", "optimizer")
    same: dict[str, Any] = {name: getattr(Recipe, name) for name in training}
    return _problem(dataset, dataclasses.replace(recipe, **same))


@functools.lru_cache(maxsize=2)
def _problem(dataset: data.Dataset, recipe: Recipe) -> Problem:
    return Problem(dataset, recipe)


def _unheard(steps: int) -> None:
    """Nobody asked how far the training is."""


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
          CommandError: a batch larger than the training set, or more samples than there are.
        """
        self.method, self.traces = method, 0
        self._problem, self._recipe = problem(dataset, recipe), recipe
        self._begin = jax.jit(jax.vmap(self._start))
        self._advance = jax.jit(self._steps, donate_argnums=0)
        self._text = functools.cache(self._program)

    def __call__(
        self,
        settings: Settings,
        seeds: Seeds,
        advanced: Told = _unheard,
        metrics: Metrics | None = None,
    ) -> dict[str, Array]:
        """Trains one run per lane.

        Args:
          settings: the method's hyperparameters, each a number or an array of shape (lanes,);
            "interval" may be among them.
          seeds: one seed per lane.
          advanced: is told, along the way, how many steps of a run have been taken.
          metrics: what is measured at the end, in place of what is named below.

        Returns:
          Arrays of shape (lanes,): "accuracy" and "test_loss" on the test samples, "train_loss" on
          the (noisy) training labels, "grad_norm" and "eigenvalue" (with its "eigenvalue_residual")
          of that loss, and "diverged": whether the training loss is ten times that of a uniform
          guess or the parameters are not finite, in which case the others are NaN.

        Raises:
          CommandError: settings other than the method's.
        """
        last = functools.reduce(lambda _, states: states, self.states(settings, seeds, advanced))
        return self._problem.measure(
            last.params, jnp.asarray(seeds, jnp.uint32), self._problem.draw(seeds), metrics
        )

    def states(
        self, settings: Settings, seeds: Seeds, advanced: Told = _unheard
    ) -> Iterator[TrainState]:
        """The states of all lanes along the training: the initial one, one after every 100 steps,
        and the last one.

        Args:
          settings: as for a call.
          seeds: as for a call.
          advanced: as for a call.

        Yields:
          States with a leading axis of lanes; the memory of each is used again for the next.

        Raises:
          CommandError: settings other than the method's.
        """
        lanes, split = self._lanes(settings, np.asarray(seeds)), self._problem.draw(seeds)
        states, steps = self._begin(lanes, self._problem.init(lanes["seed"])), self._recipe.steps
        yield states
        for first in range(0, steps, _CHUNK):
            states = self._advance(states, lanes, (split, self._problem.pool), first)
            states.step.block_until_ready()
            advanced(len(seeds) * min(_CHUNK, steps - first))
            yield states

    def flops(self) -> float:
        """Floating-point operations of one step of one run, as XLA counts them."""
        lane = dict.fromkeys(self.method.settings, 1.0)
        step = jax.jit(functools.partial(self._step, lane))
        analysis: Any = step.lower(*self._example(lane)).compile().cost_analysis()
        return float(analysis["flops"])

    def digest(self, settings: tuple[str, ...], metrics: Metrics | None = None) -> str:
        """A digest of the initialization, of one step and of metrics as programs: what they depend
        on, also in functions of the user's own.

        Args:
          settings: names of the hyperparameters that the runs give.
          metrics: as for a call.
        """
        text = self._text(settings) + ("" if metrics is None else self._problem.program(metrics))
        return hashlib.sha256(text.encode()).hexdigest()

    def _program(self, settings: tuple[str, ...]) -> str:
        lane = {name: _setting(name, 1) for name in settings}
        step = jax.jit(self._step).lower(lane, *self._example(lane))
        return jax.jit(self._problem.model.init).lower(jax.random.key(0)).as_text() + step.as_text()

    def _step(self, lane: Settings, state: TrainState, batch: Any, held_out: Any) -> Any:
        return self._train_step(lane).step(state, batch, held_out=held_out)

    def _example(self, lane: Settings) -> tuple[Any, Any, Any]:
        """A state, a batch and held-out samples, of which the shapes matter."""
        init, dataset = self._problem.model.init, self._problem.dataset
        state = jax.eval_shape(lambda key: self._start(lane, init(key)), jax.random.key(0))
        arrays = (dataset.train_x, dataset.train_y)
        x, y = (jnp.zeros((self._recipe.batch_size, *a.shape[1:]), jnp.int32) for a in arrays)
        batch = (x if dataset.tokens else x.astype(jnp.float32)), y
        return state, batch, batch if self._looks_at_held_out else None

    @property
    def _looks_at_held_out(self) -> bool:
        return bool(self._recipe.held_out and self.method.evaluations)

    def _lanes(self, settings: Settings, seeds: Array) -> dict[str, jax.Array]:
        wanted, given = set(self.method.settings), set(settings) - {"interval"}
        if wanted != given:
            raise CommandError(
                f"{self.method.label} needs settings for {sorted(wanted)}, got {sorted(given)}."
            )
        lanes = {
            name: jnp.broadcast_to(_setting(name, value), seeds.shape)
            for name, value in settings.items()
        }
        return lanes | {"seed": jnp.asarray(seeds, jnp.uint32)}

    def _train_step(self, lane: Settings) -> TrainStep:
        chosen = {name: lane[name] for name in (*self.method.settings, "interval") if name in lane}
        regularizer = None if self.method.make is None else self.method.make(**chosen)
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
        self,
        states: TrainState,
        lanes: Settings,
        samples: tuple[data.Split, Pool],
        first: jax.Array,
    ) -> TrainState:
        """Up to ``_CHUNK`` steps of all lanes, from step ``first`` on."""
        self.traces += 1
        splits, pool = samples
        task, recipe = self._problem, self._recipe
        size, batches = recipe.batch_size, task.batches
        epochs = first // batches + jnp.arange(_CHUNK // batches + 2)
        orders = jax.vmap(lambda seed: _shuffles(seed, epochs, task.size))(lanes["seed"])

        def one(
            state: TrainState, lane: Settings, split: data.Split, rows: jax.Array
        ) -> TrainState:
            others = None
            if self._looks_at_held_out:
                key = jax.random.fold_in(_key(lane["seed"], 3), state.step)
                drawn = jax.random.randint(key, (size,), task.size, task.drawn)
                others = task.batch(pool, split, drawn)
            batch = task.batch(pool, split, rows)
            return self._train_step(lane).step(state, batch, held_out=others)[0]

        def advance(step: jax.Array, states: TrainState) -> TrainState:
            order = orders[:, step // batches - first // batches]
            rows = jax.lax.dynamic_slice_in_dim(order, step % batches * size, size, axis=1)
            return jax.vmap(one)(states, lanes, splits, rows)

        last: TrainState = jax.lax.fori_loop(
            first, jnp.minimum(first + _CHUNK, self._recipe.steps), advance, states
        )
        return last


def _shuffles(seed: jax.Array, epochs: jax.Array, samples: int) -> jax.Array:
    """An order of the training samples for each epoch."""
    return jax.vmap(
        lambda epoch: jax.random.permutation(jax.random.fold_in(_key(seed, 1), epoch), samples)
    )(epochs)


def _setting(name: str, value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.int32 if name == "interval" else jnp.float32)


def _model(dataset: data.Dataset, recipe: Recipe) -> Model:
    """The recipe's network, once it has been seen to fit the data."""
    if isinstance(recipe.model, str):
        size = {"width": recipe.width, "depth": recipe.depth}
        return models.build(recipe.model, dataset.shape, dataset.classes, **size)
    init, apply = recipe.model
    x = jnp.zeros((2, *dataset.shape), jnp.int32 if dataset.tokens else jnp.float32)
    shape = jax.eval_shape(lambda key, x: apply(init(key), x), jax.random.key(0), x).shape
    wanted = (*dataset.train_y.shape[1:], dataset.classes)
    if shape != (2, *wanted):
        raise CommandError(
            f"model must give logits of shape (batch, {', '.join(map(str, wanted))}), got {shape}"
            f" for a batch of 2 inputs of shape {dataset.shape}."
        )
    return Model(init, apply)


def _optimizer(recipe: Recipe) -> Transformation:
    chosen, warmup = recipe.optimizer, recipe.warmup_steps
    rate = optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps)
    if warmup:
        rate = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warmup, recipe.steps)
    return chosen(rate) if callable(chosen) else OPTIMIZERS[chosen](rate)


def _key(seed: jax.Array, purpose: int) -> jax.Array:
    """A key that depends on the seed alone, so that methods and settings are paired."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def cross_entropy(apply: Callable[..., jax.Array]) -> Callable[[PyTree, Any], jax.Array]:
    """The mean cross-entropy of a network, a function of the parameters and of a batch ``(inputs,
    labels)``.
    """

    def loss(params: PyTree, batch: Any) -> jax.Array:
        return _cross_entropy(apply(params, batch[0]), batch[1])

    return loss


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _correct(logits: jax.Array, label: jax.Array) -> jax.Array:
    return jnp.mean((jnp.argmax(logits, axis=-1) == label).astype(jnp.float32))
