"""Numbers at the edges of their dtypes: never NaN where the mathematics has none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax import (
    dbp_gradreg,
    dbp_value_and_grad,
    fd_gradreg,
    fd_value_and_grad,
    flooding,
    make_train_step,
    microbatched,
    regularized_loss,
    relative_gradreg,
    sam,
)
from problems import REGULARIZERS
from two_parameters import quartic, updated

FAMILIES = REGULARIZERS | {"relative": relative_gradreg}


@pytest.mark.parametrize("interval", [1, 1000])
def test_numbers_beyond_the_narrow_dtype_make_no_nan(interval):
    extremes = [(0.1, 1e-60), (1e60, 0.1), (1e60, 1e-60), (1e38, 1e-30)]

    def cubic(params):
        return jnp.sum(params**3) / 3

    @jax.jit
    def updates(params):
        differences, others = [], []
        for gamma, epsilon in extremes:
            options = {"gamma": gamma, "epsilon": epsilon, "interval": interval}
            for scheme in ("forward", "backward", "central"):
                differences.append(updated(fd_gradreg(scheme=scheme, **options), params, cubic))
            others.append(updated(dbp_gradreg(gamma=gamma, interval=interval), params, cubic))
            others.append(updated(sam(rho=epsilon, interval=interval), params, cubic)[1])
        return differences, others

    with jax.enable_x64(True):
        differences, others = updates(jnp.asarray([1.0, 0.0], jnp.float32))
    for update in differences:
        assert not np.isnan(update).any()
        assert update[1] == 0  # a flat direction stays one
    assert not any(np.isnan(update).any() for update in others)


def test_gamma_times_interval_may_overflow():
    update = updated(fd_gradreg(gamma=1e38, epsilon=0.1, interval=1000), jnp.asarray([1.0, 0.0]))
    assert update[1] == 0
    assert update[0] > 1e38 / 10


def test_without_a_penalty_an_overflow_ahead_does_not_matter():
    params, explosive = jnp.asarray([1.0, 2.0]), lambda p: jnp.sum(jnp.exp(p))
    for interval in (1, 2):
        tx = fd_gradreg(gamma=0.0, epsilon=1e30, interval=interval)
        np.testing.assert_array_equal(updated(tx, params, explosive), jnp.exp(params))


@pytest.mark.parametrize("name", ["fd central", "dbp forward_over_reverse", "asam", "relative"])
def test_float8_parameters_train_with_differences_in_float32(name):
    def loss(params):
        return jnp.sum(params.astype(jnp.float32) ** 2) / 2

    @jax.jit
    def narrow_and_wide(params):
        transformations = [FAMILIES[name](interval=interval) for interval in (1, 2)]
        wide = params.astype(jnp.float32)
        return [(updated(tx, params, loss), updated(tx, wide, loss)) for tx in transformations]

    for update, wide in narrow_and_wide(jnp.asarray([1.0, 2.0], jnp.float8_e4m3fn)):
        assert update.dtype == jnp.float8_e4m3fn
        if name == "relative":
            continue  # its first ascent, a hundredth of the parameters, moves none of eight bits
        # the gradient ahead is rounded to three bits, 1/16, times interval gamma / epsilon
        np.testing.assert_allclose(update.astype(np.float32), wide, rtol=0.3)


def test_float8_goes_through_every_way_in():
    params, batch = jnp.asarray([1.0, 2.0], jnp.float8_e4m3fn), jnp.ones((4, 2))

    def loss(params, batch):
        return jnp.mean((batch @ params.astype(jnp.float32)) ** 2) / 2

    fd = fd_gradreg(gamma=0.1, epsilon=0.1)
    functions = (
        fd_value_and_grad(loss, gamma=0.1, epsilon=0.1),
        dbp_value_and_grad(loss, gamma=0.1),
        jax.value_and_grad(regularized_loss(loss, fd)),
        jax.value_and_grad(microbatched(loss, 2)),
    )
    for _, gradient in jax.jit(lambda *args: [f(*args) for f in functions])(params, batch):
        assert gradient.dtype == params.dtype
        assert np.isfinite(gradient.astype(np.float32)).all()
    init, step = make_train_step(loss, optax.sgd(0.1), fd)
    assert step(init(params), batch)[0].params.dtype == params.dtype
    flooded = flooding(level=5.0).update(params, flooding(level=5.0).init(params), value=1.0)[0]
    np.testing.assert_array_equal(flooded.astype(np.float32), [-1.0, -2.0])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_weak_leaf_made_before_x64_keeps_its_dtype(name):
    with jax.enable_x64(False):
        weak = jnp.asarray(2.0)
    assert weak.weak_type

    def gradients():
        by_functions = (
            dbp_value_and_grad(quartic, gamma=0.1)(weak)[1],
            fd_value_and_grad(quartic, gamma=0.1, epsilon=0.1)(weak)[1],
        )
        return by_functions, [updated(FAMILIES[name](interval=n), weak) for n in (1, 2)]

    with jax.enable_x64(True):
        found = jax.tree.leaves(jax.eval_shape(gradients))
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.float32)}


def test_whole_numbers_stay_whole():
    tx = fd_gradreg(gamma=1.0, epsilon=1.0, interval=2**24 + 1)
    params = jnp.asarray(1.0)
    for step, due in [(0, True), (2**24, False), (2**24 + 1, True), (2**24 + 2, False)]:
        state = tx.init(params)._replace(step=jnp.asarray(step, jnp.int32))
        update, after = tx.update(params, state, params, value_fn=quartic)
        assert (float(update) != 1.0) == due
        assert int(after.step) == step + 1
    fd_gradreg(gamma=1.0, epsilon=1.0, interval=2**31 - 1)
    for interval, shown in ((2**31, "2147483648"), (2**40, "1099511627776"), (np.inf, "inf")):
        says = f"interval must be .*, got {shown}. The largest is 2147483647"
        with pytest.raises(ValueError, match=says):
            fd_gradreg(gamma=1.0, epsilon=1.0, interval=interval)


def test_a_traced_interval_below_one_counts_as_one():
    @jax.jit
    def update(interval):
        tx = fd_gradreg(gamma=0.1, epsilon=0.1, interval=interval)
        return updated(tx, jnp.asarray([1.0, 2.0]))

    # 4 (p + 0.1 * 4 p^3)^3
    for interval in (-2, 0, 1):
        np.testing.assert_allclose(update(interval), [10.976, 562.432], rtol=1e-6)
