"""The theory of the diagonal linear network, and its measurement by the experiment."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from gradreg_optax import fd_value_and_grad
from gradreg_optax.experiments import implicit_bias, results
from gradreg_optax.experiments.common import CommandError
from gradreg_optax.experiments.implicit_bias import (
    Config,
    Flow,
    least_entropy,
    loss_fn,
    slope,
    velocity,
)

COMMITTED = Path(__file__).parents[2] / "notebooks/results/implicit_bias"
SMALL = Config(
    seeds=3, samples=10, features=20, support=2, horizon=150.0, few=4, epsilons=(-0.2, 0.0, 0.2)
)

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
@given(
    seed=seeds, gamma=gammas, epsilon=epsilons, method=st.sampled_from(["difference", "product"])
)
def test_u_times_v_decays_at_twice_gamma_s_s_prime(seed, gamma, epsilon, method):
    x, y, flow = problem(seed)
    u, v, decay = rates(method, flow, x, y, gamma, epsilon)
    # u and v cancel to leave the decay: absolute rounding of the size of their rates.
    np.testing.assert_allclose(
        u + v, -2 * gamma * decay, rtol=1e-9, atol=1e-10 * (1 + np.abs(u).max())
    )


@pytest.mark.usefixtures("x64")
@given(seed=seeds, gamma=gammas, epsilon=epsilons)
def test_a_negative_epsilon_is_the_backward_difference(seed, gamma, epsilon):
    x, y, flow = problem(seed)
    _, gradient = fd_value_and_grad(loss_fn, gamma=gamma, epsilon=epsilon, scheme="backward")(
        (flow.u, flow.v), x, y
    )
    rate = traced_velocity("difference", flow, (x, y), gamma, -epsilon)
    np.testing.assert_allclose(
        rate.u, -gradient[0], rtol=1e-12, atol=1e-12
    )  # the same operations up to signs
    np.testing.assert_allclose(rate.v, -gradient[1], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_flow_of_the_product_is_the_limit_of_the_difference():
    x, y, flow = problem(0)
    exact = np.concatenate(rates("product", flow, x, y, 0.5, 0.0))
    errors = [
        np.linalg.norm(np.concatenate(rates("difference", flow, x, y, 0.5, e)) - exact)
        for e in (1e-3, 1e-4)
    ]
    np.testing.assert_allclose(
        errors[0] / errors[1], 10, rtol=0.05
    )  # first order in epsilon, up to the next order's 1e-3 * constant


@given(seed=seeds, log_scale=st.floats(-3.0, 2.0))
def test_the_dual_solution_is_feasible_and_optimal(seed, log_scale):
    x, y, flow = problem(seed)
    scale = 10**log_scale * np.asarray(flow.u)
    beta = least_entropy(x, y, scale)
    # Rounding of X beta: the sinh carries the relative error eps * |X^T nu| (tens), and X a
    # condition number (hundreds at times).
    np.testing.assert_allclose(x @ beta, y, rtol=1e-9, atol=1e-9 * np.abs(y).max())
    slopes = np.arcsinh(
        beta / (2 * scale**2)
    )  # the entropy's gradient, which must lie in the row space of X
    multiplier = np.linalg.lstsq(x.T, slopes)[0]
    np.testing.assert_allclose(x.T @ multiplier, slopes, atol=1e-8 * (1 + np.abs(slopes).max()))


def hyperbolic_entropy(beta, scale):
    """The sum of a ** 2 q(beta / a ** 2), q(z) = 2 - sqrt(4 + z ** 2) + z asinh(z / 2)."""
    z = beta / scale**2
    return np.sum(scale**2 * (2 - np.sqrt(4 + z**2) + z * np.arcsinh(z / 2)))


@given(seed=seeds, log_scale=st.floats(-2.0, 1.0), length=st.floats(1e-2, 10.0))
def test_no_feasible_weights_have_a_smaller_entropy(seed, log_scale, length):
    x, y, flow = problem(seed)
    scale = 10**log_scale * np.asarray(flow.v)
    beta = least_entropy(x, y, scale)
    direction = np.linalg.svd(x)[2][len(x) :].T @ np.random.default_rng(seed).normal(
        size=x.shape[1] - len(x)
    )
    other = beta + length * direction / np.linalg.norm(direction)
    assert hyperbolic_entropy(other, scale) > hyperbolic_entropy(beta, scale)


def test_a_small_scale_gives_the_least_l1_norm_and_a_large_one_the_least_l2_norm():
    x, y, _ = problem(1, samples=4, features=9)
    ones = np.ones(9)
    sparse = linprog(np.ones(18), A_eq=np.hstack([x, -x]), b_eq=y)
    # The entropy is the L1 norm times log(1/a) + O(1): the gap closes like 1 / log(1/a^2).
    l1 = [np.abs(least_entropy(x, y, a * ones)).sum() / sparse.fun - 1 for a in (1e-1, 1e-3, 1e-6)]
    assert l1[0] > l1[1] > l1[2] >= -1e-9
    assert l1[2] < 0.02
    # asinh(z) = z up to z^3 / 6, z = beta / 2a^2 ~ 1e-4
    np.testing.assert_allclose(
        least_entropy(x, y, 1e2 * ones), np.linalg.lstsq(x, y)[0], rtol=1e-6, atol=1e-7
    )


def test_dependent_rows_are_refused():
    with pytest.raises(ValueError, match="linearly independent"):
        least_entropy(np.ones((2, 3)), np.ones(2), np.ones(3))


def test_a_solver_that_does_not_converge_is_an_error(monkeypatch):
    monkeypatch.setattr(implicit_bias, "SOLVED", 0.0)  # more than rounding allows
    x, y, flow = problem(0)
    with pytest.raises(RuntimeError, match="more stages"):
        least_entropy(x, y, np.asarray(flow.u))


def test_epsilons_out_of_order_are_refused():
    with pytest.raises(CommandError, match="increasing order"):
        dataclasses.replace(SMALL, epsilons=(0.1, 0.0))


@pytest.mark.parametrize("change", [{"samples": 21}, {"alpha": 0.0}, {"seeds": 0}, {"seed": -1}])
def test_invalid_sizes_are_refused(change):
    with pytest.raises(CommandError, match=r"must be (at least|above 0)"):
        dataclasses.replace(SMALL, **change)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The results of a small run, as they come back from disk."""
    config = dataclasses.replace(SMALL, output=tmp_path_factory.mktemp("implicit_bias"))
    return results.load(
        results.save(config.output, "implicit-bias", config, implicit_bias.run(config))
    )


@pytest.fixture(
    scope="module", params=["committed", pytest.param("trained", marks=pytest.mark.slow)]
)
def found(request):
    """The committed results, and those of a small run."""
    if request.param == "committed":
        return results.load(COMMITTED)
    return request.getfixturevalue("trained")


@pytest.mark.parametrize("name", SMALL.cases())
def test_the_flow_reaches_the_weights_of_least_entropy(found, name):
    part = implicit_bias.case(found, name)
    assert part["agreement"].shape == (len(part["seed"]), 1 + len(part["epsilon"]))
    assert (
        part["agreement"].max() < 2e-6
    )  # the integrator's tolerance 1e-9, times some hundreds of steps
    assert (
        part["conservation"].max() < 1e-4
    )  # an absolute error of 1e-9 per step in v, which falls to 1e-4
    np.testing.assert_allclose(part["scale"][:, 0], 1)  # without regularization nothing decays
    np.testing.assert_allclose(part["reached"], part["predicted"], atol=2e-6)


def test_a_converged_flow_reaches_the_interpolator_of_least_entropy(found):
    assert implicit_bias.case(found, "converged")["residual"].max() < 1e-5
    assert implicit_bias.case(found, "converged")["agreement_y"].max() < 1e-5


def test_alpha_eff_decreases_strictly_with_epsilon(found):
    assert np.all(np.diff(implicit_bias.case(found, "mean_one")["scale"][:, 1:]) < 0)


@pytest.mark.slow
def test_tracing_adds_no_program_when_epsilon_changes(trained, tmp_path):
    del trained  # it has compiled the programs of this module's configuration
    before = implicit_bias.integrate._cache_size()
    implicit_bias.run(
        dataclasses.replace(
            SMALL, output=tmp_path, epsilons=(-0.1, 0.0, 0.3), gamma=0.05, seed=7, horizon=1.0
        )
    )
    assert implicit_bias.integrate._cache_size() == before


def test_the_committed_figure_and_table_come_from_the_results_alone(found, tmp_path: Path):
    (figure,) = implicit_bias.plot(found, tmp_path / "new")
    assert figure.read_bytes().startswith(b"\x89PNG")
    text = implicit_bias.table(found)
    assert text.count("F-GR 0.2") == 3
    assert f"{implicit_bias.case(found, 'mean_one')['l1'][:, 2].mean():.4f}" in text
