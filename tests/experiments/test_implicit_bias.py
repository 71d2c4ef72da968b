"""The theory of the diagonal linear network, and its measurement by the experiment."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax.experiments import implicit_bias, results
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.implicit_bias import (
    Config,
    Flow,
    least_entropy,
    slope,
    velocity,
)

COMMITTED = Path(__file__).parents[2] / "notebooks/results/implicit_bias"
SMALL = Config(
    seeds=3, samples=10, features=20, support=2, horizon=150.0, few=4, epsilons=(-0.2, 0.0, 0.2)
)

slow = pytest.mark.slow
seeds = st.integers(0, 2**32 - 1)
gammas = st.floats(0.0, 2.0)
epsilons = st.floats(0.01, 1.0)


def problem(seed, samples=3, features=5):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(samples, features)),
        rng.normal(size=samples),
        Flow(*rng.uniform(0.5, 1.5, size=(3, features))),
    )


traced_velocity = jax.jit(velocity, static_argnums=0)  # epsilon may be negative where it is traced


def rates(method, flow, x, y, gamma, epsilon):
    """d log u / dt, d log v / dt and d decay / dt."""
    rate = traced_velocity(method, flow, (x, y), gamma, epsilon)
    return np.asarray(rate.u / flow.u), np.asarray(rate.v / flow.v), np.asarray(rate.decay)


@pytest.mark.usefixtures("x64")
@given(seed=seeds, gamma=gammas, epsilon=epsilons, sign=st.sampled_from([-1, 1]))
def test_the_packages_gradient_is_the_closed_form_of_the_flow(seed, gamma, epsilon, sign):
    x, y, flow = problem(seed)
    epsilon = sign * epsilon
    s = np.asarray(slope((flow.u, flow.v), x, y))
    ahead = np.asarray(slope((flow.u * (1 + epsilon * s), flow.v * (1 - epsilon * s)), x, y))
    bracket = s + gamma / epsilon * (ahead - s)
    u, v, decay = rates("difference", flow, x, y, gamma, epsilon)
    # Rounding of the difference, eps(float64) * |s'| * gamma / |epsilon|, with room for |s'| of
    # some thousands.
    tolerance = {"rtol": 1e-9, "atol": 1e-10}
    np.testing.assert_allclose(u, -bracket - gamma * s * ahead, **tolerance)
    np.testing.assert_allclose(v, bracket - gamma * s * ahead, **tolerance)
    np.testing.assert_allclose(decay, s * ahead, **tolerance)


@pytest.mark.usefixtures("x64")
def test_the_flow_of_the_product_is_the_limit_of_the_difference():
    x, y, flow = problem(0)
    exact = np.concatenate(rates("product", flow, x, y, 0.5, 0.0))
    found = (rates("difference", flow, x, y, 0.5, e) for e in (1e-3, 1e-4))
    errors = [np.linalg.norm(np.concatenate(rate) - exact) for rate in found]
    # first order in epsilon, up to the next order's 1e-3 * constant
    np.testing.assert_allclose(errors[0] / errors[1], 10, rtol=0.05)


@given(seed=seeds, log_scale=st.floats(-3.0, 2.0))
def test_the_dual_solution_is_feasible_and_optimal(seed, log_scale):
    """The entropy is convex: weights are optimal where its gradient lies in the row space of X."""
    x, y, flow = problem(seed)
    scale = 10**log_scale * np.asarray(flow.u)
    beta = least_entropy(x, y, scale)
    # Rounding of X beta: the sinh carries the relative error eps * |X^T nu| (tens), and X a
    # condition number (hundreds at times).
    np.testing.assert_allclose(x @ beta, y, rtol=1e-9, atol=1e-9 * np.abs(y).max())
    slopes = np.arcsinh(beta / (2 * scale**2))
    multiplier = np.linalg.lstsq(x.T, slopes)[0]
    np.testing.assert_allclose(x.T @ multiplier, slopes, atol=1e-8 * (1 + np.abs(slopes).max()))


def test_a_solver_that_does_not_converge_is_an_error(monkeypatch):
    monkeypatch.setattr(implicit_bias, "SOLVED", 0.0)  # more than rounding allows
    x, y, flow = problem(0)
    with pytest.raises(RuntimeError, match="more stages"):
        least_entropy(x, y, np.asarray(flow.u))


@pytest.mark.parametrize("change", [{"samples": 21}, {"alpha": 0.0}, {"epsilons": (0.1, 0.0)}])
def test_invalid_sizes_are_refused(change):
    with pytest.raises(CommandError, match=r"must be (at most|above 0)|increasing order"):
        dataclasses.replace(SMALL, **change)


@pytest.fixture(scope="module", params=["committed", pytest.param("trained", marks=slow)])
def found(request, tmp_path_factory):
    """The committed results, and those of a small run, as they come back from disk."""
    if request.param == "committed":
        return results.load(COMMITTED)
    config = dataclasses.replace(SMALL, output=tmp_path_factory.mktemp("implicit_bias"))
    return results.load(results.save(config.output, "it", config, implicit_bias.run(config)))


@pytest.mark.parametrize("name", SMALL.cases())
def test_the_flow_reaches_the_weights_of_least_entropy(found, name):
    part = implicit_bias.case(found, name)
    assert part["agreement"].shape == (len(part["seed"]), 1 + len(part["epsilon"]))
    # the integrator's tolerance 1e-9, times some hundreds of steps
    assert part["agreement"].max() < 2e-6
    # an absolute error of 1e-9 per step in v, which falls to 1e-4
    assert part["conservation"].max() < 1e-4
    np.testing.assert_allclose(part["scale"][:, 0], 1)  # without regularization nothing decays
    np.testing.assert_allclose(part["reached"], part["predicted"], atol=2e-6)


def test_a_converged_flow_reaches_the_interpolator_of_least_entropy(found):
    assert implicit_bias.case(found, "converged")["residual"].max() < 1e-5
    assert implicit_bias.case(found, "converged")["agreement_y"].max() < 1e-5


def test_alpha_eff_decreases_strictly_with_epsilon(found):
    assert np.all(np.diff(implicit_bias.case(found, "mean_one")["scale"][:, 1:]) < 0)
