import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax import fd_gradreg, make_train_step
from gradreg_optax.experiments import data, models
from gradreg_optax.experiments import trainer as training
from gradreg_optax.experiments.common import CommandError

SIZES = {"train_size": 40, "test_size": 50, "batch_size": 16}
RECIPE = training.Recipe(width=6, steps=130, eigenvalue=False, **SIZES)  # 130: a short last chunk
DIGITS = data.load("digits")
# An interval of one is no interval, and an interval without a penalty has no effect.
GIVEN = {"gamma": np.array([2.0, 0.0]), "epsilon": 0.5, "interval": np.array([1, 7])}


@pytest.fixture(scope="module")
def forward():
    """A trainer of F-GR, with what its first call found."""
    trainer = training.Trainer(DIGITS, training.METHODS["F-GR"], RECIPE)
    return trainer, trainer(GIVEN, [0, 1])


def test_without_a_penalty_a_method_is_the_plain_one_on_the_same_seed(forward):
    plain = training.Trainer(DIGITS, training.METHODS["SGD"], RECIPE)({}, [0, 1])
    # the same numbers in another order of additions: float32 rounding, grown over 130 steps
    np.testing.assert_allclose(forward[1]["train_loss"][1], plain["train_loss"][1], rtol=1e-3)


def test_hyperparameters_are_traced_and_lanes_are_independent(forward):
    trainer, first = forward
    second = trainer(GIVEN | {"gamma": 1.0, "epsilon": np.array([0.5, 3.0])}, [0, 1])
    assert (second["train_loss"] != first["train_loss"]).all()
    lazy = trainer(GIVEN | {"gamma": 2.0}, [0, 0])["train_loss"]
    assert lazy[0] != lazy[1]
    swapped = {name: value if name == "epsilon" else value[::-1] for name, value in GIVEN.items()}
    swapped = trainer(swapped, [1, 0])
    assert trainer._advance._cache_size() == 1
    for name, values in first.items():  # up to float32 rounding
        np.testing.assert_allclose(swapped[name][::-1], values, rtol=1e-4, err_msg=name)


def test_a_lane_is_the_loop_that_one_would_write_by_hand(forward):
    """An epoch shows every sample at most once; the step, the schedule and the metrics are those of
    the public functions."""
    split, problem = data.draw(DIGITS, 0, 40, 50, 0.3), training.problem(DIGITS, RECIPE)
    x, y = (DIGITS.inputs / 16 - DIGITS.mean).astype(np.float32), DIGITS.labels
    schedule = optax.cosine_decay_schedule(RECIPE.learning_rate, RECIPE.steps)
    regularizer = fd_gradreg(gamma=2.0, epsilon=0.5)
    init, step = make_train_step(problem.loss, optax.sgd(schedule), regularizer)
    state = init(jax.tree.map(lambda p: p[0], problem.init(jnp.zeros(1, jnp.uint32))))
    orders = np.asarray(training._shuffles(jnp.uint32(0), jnp.arange(65), 40))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(40), (65, 1)))
    for i in range(RECIPE.steps):
        rows = orders[i // 2, 16 * (i % 2) : 16 * (i % 2 + 1)]  # 40 samples make two batches of 16
        state, _ = step(state, (x[split.train[rows]], split.train_labels[rows]))
    found = {name: values[0] for name, values in forward[1].items()}
    batch = x[split.train], split.train_labels
    loss, gradient = jax.jit(jax.value_and_grad(problem.loss))(state.params, batch)
    # float32 rounding, grown over 130 steps
    np.testing.assert_allclose(found["train_loss"], loss, rtol=1e-3)
    np.testing.assert_allclose(found["grad_norm"], optax.tree.norm(gradient), rtol=1e-2)
    guesses = np.argmax(jax.jit(problem.model.apply)(state.params, x[split.test]), axis=1)
    # one sample may lie on the boundary
    assert abs(found["accuracy"] - np.mean(guesses == y[split.test])) <= 1 / 50


def test_a_diverged_run_is_marked_and_its_neighbour_is_not(forward):
    found = forward[0](GIVEN | {"gamma": np.array([1e6, 1.0])}, [0, 1])
    np.testing.assert_array_equal(found["diverged"], [True, False])
    np.testing.assert_array_equal(np.isnan(found["accuracy"]), [True, False])


@pytest.mark.parametrize(
    "settings", [{}, {"gamma": 1.0}, {"gamma": 1.0, "epsilon": 1.0, "rho": 1.0}]
)
def test_settings_of_another_method_are_refused(settings, forward):
    with pytest.raises(CommandError, match=r"F-GR needs settings for \['epsilon', 'gamma'\]"):
        forward[0](settings, [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"optimizer": "lion"}, "optimizer must be some of sgd, momentum, adam, adamw, got lion"),
        ({"model": "vit"}, "model must be some of mlp, cnn, resnet, got vit"),
        ({"model": (jnp.sin,)}, r"a pair of functions \(init, apply\)"),
        ({"model": (jnp.sin, "mlp")}, r"a pair of functions \(init, apply\)"),
        ({"model": (lambda key: 0.0, lambda p, x: x)}, r"logits of shape \(batch, 10\), got"),
        ({"batch_size": 41}, "batch_size must be at most 40"),
    ],
)
def test_an_invalid_recipe_is_refused(change, message):
    recipe = {"train_size": 40, "batch_size": 16} | change
    with pytest.raises(CommandError, match=message):
        training.Trainer(DIGITS, training.METHODS["SGD"], training.Recipe(**recipe))


def test_a_recipe_is_described_by_names_and_numbers():
    recipe = training.Recipe(model=models.Model(jnp.sin, jnp.cos), optimizer=optax.lion)
    found = recipe.describe()
    assert (found["model"], found["optimizer"], found["steps"]) == ("cos", "lion", 3000)
