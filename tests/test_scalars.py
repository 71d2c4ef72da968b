"""Numbers, arrays, tracers and schedules are all scalars."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
import two_parameters as two
from gradreg_optax import dbp_gradreg, fd_gradreg, sam
from problems import SCHEMES
from two_parameters import says

SCALARS = {
    "int": int,
    "float": float,
    "numpy float64": np.float64,
    "numpy array": np.asarray,
    "jax float32": lambda x: jnp.asarray(x, jnp.float32),
    "jax bfloat16": lambda x: jnp.asarray(x, jnp.bfloat16),
    "constant schedule": lambda x: lambda step: x,
    "array schedule": lambda x: optax.constant_schedule(jnp.asarray(x)),
}
close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("wide", [False, True])
def test_every_kind_of_scalar_gives_the_same_update_and_dtype(wide):
    params, batch = two.P, two.BATCH  # float32 trees stay so under x64, for any width of gamma
    value_fn = functools.partial(two.mean_square, batch=batch)

    def several():
        return {
            (kind, interval): two.updated(
                # exact in bfloat16
                fd_gradreg(gamma=convert(1.0), epsilon=convert(2.0), interval=interval),
                loss=value_fn,
            )
            for kind, convert in SCALARS.items()
            for interval in (1, 2)
        }

    gradient = 2 * batch.T @ (batch @ params) / len(batch)
    ahead = 2 * batch.T @ (batch @ (params + 2 * gradient)) / len(batch)
    with jax.enable_x64(wide):
        for (kind, interval), updates in jax.jit(several)().items():
            assert updates.dtype == jnp.float32
            # eps(float32) gamma / epsilon times interval
            expected = gradient + interval * (ahead - gradient) / 2
            np.testing.assert_allclose(updates, expected, atol=1e-5, err_msg=kind)


def test_gamma_and_epsilon_can_be_vmapped_jitted_and_differentiated(x64):
    """The update is linear in gamma, and its derivative is the correction, at zero as well."""
    p, gammas, epsilons = np.asarray([1.0, 2.0]), np.asarray([0.0, 0.5]), np.asarray([0.1, 0.3])

    def fd(gamma, epsilon):
        return two.updated(fd_gradreg(gamma=gamma, epsilon=epsilon), p)

    @jax.jit
    def found():
        table = jax.vmap(lambda e: jax.vmap(lambda g: fd(g, e))(gammas))(epsilons)
        slopes = jax.vmap(lambda e: jax.jacobian(fd)(0.0, e))(epsilons)
        products = jax.vmap(lambda g: two.updated(dbp_gradreg(gamma=g), p))(gammas)
        return table, slopes, products, jax.vmap(lambda r: two.updated(sam(rho=r), p))(epsilons)

    gradient, (table, slopes, products, climbed) = 4 * p**3, found()
    changes = [(4 * (p + e * gradient) ** 3 - gradient) / e for e in epsilons]
    close(slopes, changes)
    close(table, [gradient + np.outer(gammas, change) for change in changes])
    close(products, gradient + np.outer(gammas, 12 * p**2 * gradient))
    unit = gradient / np.linalg.norm(gradient)
    close(climbed, 4 * (p + np.outer(epsilons, unit)) ** 3)


def test_a_traced_or_scheduled_negative_epsilon_is_the_backward_difference(x64):
    def cube(p):
        return jnp.sum(p**3) / 3

    @jax.jit
    def updates(epsilon):
        several = [
            fd_gradreg(gamma=0.3, epsilon=0.2, scheme="backward"),
            fd_gradreg(gamma=0.3, epsilon=epsilon),
            fd_gradreg(gamma=0.3, epsilon=lambda step: -0.2),
        ]
        return [two.updated(tx, loss=cube) for tx in several]

    backward, *others = updates(-0.2)
    for found in others:
        close(found, backward)
    one = jnp.asarray(1.0)  # the gradient at 0.5
    close(two.updated(sam(rho=lambda step: -0.5), one, cube), 0.25)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_traced_or_scheduled_zero_epsilon_gives_no_correction(scheme):
    params = two.P
    gradient = jax.grad(two.quartic)(params)

    @jax.jit
    def traced(epsilon):
        tx = fd_gradreg(gamma=0.3, epsilon=epsilon, scheme=scheme)
        return two.updated(tx), two.updated(sam(rho=epsilon))

    for epsilon in (0.0, 1e-40):  # 1 / 1e-40 overflows in float32
        penalised, climbed = traced(epsilon)
        np.testing.assert_array_equal(penalised, gradient)
        # SAM's is the gradient evaluated once more
        np.testing.assert_allclose(climbed, gradient, rtol=1e-5, atol=1e-7)
    ramp = optax.linear_schedule(0.0, 0.2, 2)
    tx = fd_gradreg(two.quartic, gamma=0.3, epsilon=ramp, scheme=scheme)
    for update in (jax.jit(tx.update), tx.update):  # traced and concrete
        first, state = update(gradient, tx.init(params), params)
        np.testing.assert_array_equal(first, gradient)
        second, _ = update(gradient, state, params)
        assert np.abs(second - gradient).max() > 1e-3


def test_a_warm_up_of_epsilon_may_start_at_a_zero_of_jax_but_not_at_a_number_zero():
    updates = two.updated(fd_gradreg(gamma=1.0, epsilon=jnp.zeros([])))
    np.testing.assert_array_equal(updates, jax.grad(two.quartic)(two.P))
    with says(ValueError, "must be finite and > 0, got 0.0"):
        fd_gradreg(gamma=1.0, epsilon=0.0)


ZERO = {
    "fd gamma": lambda x, **k: fd_gradreg(gamma=x, epsilon=0.1, **k),
    "dbp gamma": lambda x, **k: dbp_gradreg(gamma=x, **k),
    "gnp gamma": lambda x, **k: gr.gradient_norm_penalty(gamma=x, epsilon=0.1, **k),
    "relative strength": lambda x, **k: gr.relative_gradreg(strength=x, **k),
    "sam rho": lambda x, **k: sam(rho=x, **k),
    "asam rho": lambda x, **k: gr.asam(rho=x, **k),
}
ZEROS = [(np.float32(0), {"interval": 2}), (jnp.zeros([]), {}), (0.0, {"reuse_updates": False})]


@pytest.mark.parametrize("name", ZERO)
def test_a_coefficient_of_zero_is_the_plain_gradient(x64, name):
    @jax.jit
    def updates(params):
        return [two.updated(ZERO[name](zero, **options), params) for zero, options in ZEROS]

    params = np.asarray(two.P, float)
    for found in updates(params):
        np.testing.assert_allclose(found, 4 * params**3, rtol=1e-12)


def test_epsilon_and_gamma_at_the_ends_of_float32_are_refused():
    for epsilon in (1e-40, 1e39):
        with says(ValueError, f"fd_gradreg: epsilon must be finite and > 0, got {epsilon}"):
            fd_gradreg(gamma=0.1, epsilon=epsilon)
    with says(ValueError, "fd_gradreg: gamma must be finite and >= 0, got inf"):
        fd_gradreg(gamma=1e39, epsilon=0.1)
    with jax.enable_x64(True):
        fd_gradreg(gamma=1e39, epsilon=1e-40)


UNKNOWN = [np.longdouble(1), np.timedelta64(1), np.datetime64("2020"), b"1", "1", [1, [2]], set()]


def test_scalars_that_jax_does_not_know_are_refused():
    for value in UNKNOWN:
        with says(TypeError, "fd_gradreg: gamma must be a real number or a schedule"):
            fd_gradreg(gamma=value, epsilon=0.1)
        with says(TypeError, "ascent_groups must be a whole number"):
            two.one_step(ascent_groups=value)


@pytest.mark.parametrize("bad", ["0.5", None, 2.5, float("nan"), float("inf"), [2], True])
def test_whole_numbers_and_fractions_refuse_what_is_none(bad):
    errors = TypeError, ValueError
    with says(errors, "make_train_step: ascent_groups must be a whole number"):
        two.one_step(ascent_groups=bad)
    with says(errors, "microbatched: count must be a whole number"):
        gr.microbatched(two.mean_square, bad)
    with says(errors, "make_train_step: penalty_fraction must"):
        two.one_step(penalty_fraction=bad)


FLAGS = {
    "fd_gradreg: reuse_updates": lambda x: fd_gradreg(**two.PENALTY, reuse_updates=x),
    "reuse_updates": lambda x: two.updated(two.FD, reuse_updates=x),
    "make_train_step: donate": lambda x: two.one_step(donate=x),
    "fd_gradreg: has_aux": lambda x: fd_gradreg(**two.PENALTY, has_aux=x),
    "make_train_step: has_aux": lambda x: two.one_step(has_aux=x),
    "microbatched: has_aux": lambda x: gr.microbatched(two.mean_square, 2, has_aux=x),
    "regularized_loss: has_aux": lambda x: gr.regularized_loss(two.quartic, two.FD, has_aux=x),
}


@pytest.mark.parametrize("value", ["no", None, 0, 1.0, [True]])
def test_flags_are_bools(value):
    for name, make in FLAGS.items():
        with says(TypeError, name, f"must be True or False, got {value!r}"):
            make(value)


def test_flags_are_known_before_the_program_runs():
    with says(TypeError, "fd_gradreg: reuse_updates must be", "known before the program runs"):
        jax.jit(lambda flag: two.updated(two.FD, reuse_updates=flag))(True)
    for flag in (np.bool_(False), jnp.asarray(False)):
        tx = fd_gradreg(**two.PENALTY, reuse_updates=flag)
        np.testing.assert_array_equal(two.updated(tx), two.updated(two.FD))
