"""Study flatness: each quantity is what its name says, and all methods of a seed meet the same
noise and the same second task."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax.experiments import data, runs, trainer
from gradreg_optax.experiments.trainer import Recipe
from studies import flatness
from study import Study, patched

LABELS = ("SGD", "F-GR", "SAM")
CONFIG = flatness.Config(
    datasets=("digits",), train_size=64, test_size=50, steps=30, seeds=2, second_steps=20
)
DIGITS = data.load("digits")
calibration_error = jax.jit(flatness.calibration_error)
rounded = jax.jit(flatness.rounded, static_argnums=1)
fewer_methods = patched((flatness, "LABELS", LABELS))


@given(seed=st.integers(0, 999), sharpness=st.floats(0.1, 50.0), noise=st.sampled_from([0.0, 0.3]))
def test_the_calibration_error_is_the_gap_of_each_bin_weighted_by_its_samples(
    seed, sharpness, noise
):
    """With label noise, of the right predictions 1 - q stay right, and of the wrong ones q / 4
    become it."""
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(size=(200, 5))
    p = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    labels = rng.integers(0, 5, 200)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    gaps = np.where(right, 1 - noise, noise / 4) - confidence
    bins = np.digitize(confidence, np.arange(16) / 15, right=True)
    expected = sum(abs(gaps[bins == one].sum()) for one in range(1, 16)) / 200
    # sums of 200 numbers in float32
    assert calibration_error(p, labels, noise) == pytest.approx(expected, abs=1e-6)


@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 5, 8]), scale=st.floats(1e-6, 1e6))
def test_rounding_leaves_few_values_near_by_and_rounds_once(seed, bits, scale):
    w = jnp.asarray(scale * np.random.default_rng(seed).normal(size=500), jnp.float32)
    once = rounded(w, bits)
    assert len(np.unique(once)) <= 2**bits - 1
    step = np.max(np.abs(w)) / (2 ** (bits - 1) - 1)
    assert np.max(np.abs(once - w)) <= step * (0.5 + 1e-5)  # float32, in 127 steps at most
    np.testing.assert_array_equal(rounded(once, bits), once)


@pytest.fixture(scope="module")
def measured():
    """Networks after steps of SGD on the first task, measured with noise of two sizes, and after
    as many steps on the second task."""
    sizes = {"train_size": 300, "test_size": 100, "width": 16}
    problem = trainer.problem(DIGITS, Recipe(**sizes, eigenvalue=False))
    split = jax.tree.map(lambda part: part[0], problem.draw([0]))
    samples = problem.take(problem.pool, split.train), problem.pool[1][split.train]
    params = flatness.fine_tuned(
        problem, problem.model.init(jax.random.key(0)), samples, jax.random.key(1), 500
    )

    def measure(metrics, seeds):
        several = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(seeds)), params)
        return problem.measure(several, jnp.uint32(seeds), problem.draw([0] * len(seeds)), metrics)

    nothing, much = (functools.partial(flatness.measure, steps=steps) for steps in (0, 500))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flatness, "NOISES", (0.0, 3.0))
        return measure(nothing, (0,)), measure(much, (0, 0, 1))


def test_without_noise_and_without_a_step_nothing_changes(measured):
    found, _ = measured
    assert found["accuracy"] > 0.8  # a tenth is chance
    assert found["accuracy_noise_0"] == found["accuracy_after"] == found["accuracy"]
    assert found["accuracy_noise_3"] < found["accuracy"] - 0.2


@pytest.mark.slow
def test_noise_has_the_given_standard_deviations_of_the_inputs():
    problem = copy.copy(trainer.problem(DIGITS, Recipe(width=4)))
    seen, apply = [], problem.model.apply

    def watched(params, x):
        if not isinstance(x, jax.core.Tracer):
            seen.append(np.asarray(x))
        return apply(params, x)

    problem.model = problem.model._replace(apply=watched)
    problem.metrics = lambda *_: {}
    split = jax.tree.map(lambda part: part[0], problem.draw([0]))
    params = problem.model.init(jax.random.key(0))
    flatness.measure(problem, params, 0, split, problem.pool, steps=0)
    deviation = np.std(problem.take(problem.pool, split.train))
    test = problem.take(problem.pool, split.test)
    sizes = [np.std(x - test) / deviation for x in seen if x.shape == test.shape]
    for size in flatness.NOISES:  # 64000 normal numbers: three standard errors
        assert sum(abs(found / size - 1) < 3 / np.sqrt(2 * test.size) for found in sizes) == 1


def test_many_steps_learn_the_second_task_and_forget_the_first(measured):
    before, after = measured
    assert before["accuracy_second"] < 0.3
    # with the label noise of the first task it would be at most 0.83
    assert (after["accuracy_second"] > 0.85).all()
    assert (after["accuracy_after"] < before["accuracy"] - 0.1).all()


def test_noise_and_second_task_depend_on_the_seed_alone(measured):
    """The same network and samples, twice under one seed and once under another."""
    _, found = measured
    for name, values in found.items():
        assert values[0] == values[1], name
    for name in ("accuracy_noise_3", "accuracy_after"):
        assert found[name][1] != found[name][2]


class TestStudy(Study):
    study = flatness
    rows = ("SGD", "F-GR minus SGD", "SAM minus SGD", "F-GR minus SAM")

    def test_the_table_has_every_quantity_and_noise_only_where_it_was(self, found):
        text = flatness.table(found)
        assert [text.count(f"\n{label}  ") for label in self.rows] == [3] * 4
        for name in flatness.quantities(runs.select(found["runs"], method="SGD")):
            assert f"  {name}" in text
        clean = {"digits": {**found["recipes"]["digits"], "label_noise": 0.0}}
        assert "ECE, noisy  " not in flatness.table({**found, "recipes": clean})
