"""The transformations: identities between them, which loss, which gradient, when, and at what
cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax import (
    GradregState,
    adaptive,
    asam,
    dbp_gradreg,
    dbp_value_and_grad,
    fd_gradreg,
    fd_value_and_grad,
    flooding,
    gradient_norm_penalty,
    normalized,
    sam,
)

SCHEMES = ("forward", "backward", "central")
MODES = ("forward_over_reverse", "reverse_over_reverse")


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["kernel"])
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)


def batch_of(seed=0, size=6):
    rng = np.random.default_rng(seed)
    return {"x": jnp.asarray(rng.normal(size=(size, 3))), "y": jnp.asarray(rng.normal(size=size))}


def params_of(seed=1, dtype=None):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=(3, 4)), dtype),
        "out": jnp.asarray(rng.normal(size=4), dtype),
    }


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def apply(tx, gradient, params, state=None, **extra_args):
    return tx.update(gradient, tx.init(params) if state is None else state, params, **extra_args)[0]


REGULARIZERS = {
    **{f"fd {s}": functools.partial(fd_gradreg, gamma=0.3, epsilon=0.2, scheme=s) for s in SCHEMES},
    **{f"dbp {m}": functools.partial(dbp_gradreg, gamma=0.3, mode=m) for m in MODES},
    "sam": functools.partial(sam, rho=0.2),
    "asam": functools.partial(asam, rho=0.2),
    "gnp": functools.partial(gradient_norm_penalty, gamma=0.3, epsilon=0.2),
}
FUNCTIONS = {
    **{
        f"fd {s}": lambda loss, s=s: fd_value_and_grad(loss, gamma=0.3, epsilon=0.2, scheme=s)
        for s in SCHEMES
    },
    **{f"dbp {m}": lambda loss, m=m: dbp_value_and_grad(loss, gamma=0.3, mode=m) for m in MODES},
    "sam": lambda loss: fd_value_and_grad(loss, gamma=0.2, epsilon=0.2, ascent=normalized),
    "asam": lambda loss: fd_value_and_grad(loss, gamma=0.2, epsilon=0.2, ascent=adaptive),
    "gnp": lambda loss: fd_value_and_grad(loss, gamma=0.3, epsilon=0.2, ascent=normalized),
}
# gradients beyond the incoming one, PAPER's table; of dbp the first half of the Hessian-vector
# product
EXTRA_GRADIENTS = dict.fromkeys(REGULARIZERS, 1) | {"fd central": 2}


# Identities


@pytest.mark.parametrize("name", REGULARIZERS)
def test_transformation_and_gradient_function_agree(x64, name):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    value, expected = jax.jit(FUNCTIONS[name](loss_fn))(params, batch)
    tx = REGULARIZERS[name](loss_fn)
    updates = jax.jit(lambda: apply(tx, gradient, params, batch=batch))()
    np.testing.assert_allclose(
        flat(updates), flat(expected), rtol=1e-12, atol=1e-14
    )  # rounding of the difference
    np.testing.assert_allclose(value, loss_fn(params, batch), rtol=1e-14)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_sam_is_optax_sam_over_fifty_steps_with_momentum(x64):
    batch, lr, rho = batch_of(), 0.05, 0.1
    ours = optax.chain(sam(rho=rho), optax.sgd(lr, momentum=0.9))
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    theirs = optax.contrib.sam(optax.sgd(lr, momentum=0.9), adversary, opaque_mode=True)

    def loss(params):
        return loss_fn(params, batch)

    def our_step(carry, _):
        params, state = carry
        updates, state = ours.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), loss(params)

    def their_step(carry, _):
        params, state = carry
        updates, state = theirs.update(
            jax.grad(loss)(params), state, params, grad_fn=lambda p, _: jax.grad(loss)(p)
        )
        return (optax.apply_updates(params, updates), state), loss(params)

    params = params_of()
    (a, _), losses = jax.jit(lambda c: jax.lax.scan(our_step, c, length=50))(
        (params, ours.init(params))
    )
    (b, _), expected = jax.jit(lambda c: jax.lax.scan(their_step, c, length=50))(
        (params, theirs.init(params))
    )
    np.testing.assert_allclose(
        flat(a), flat(b), rtol=1e-11
    )  # 50 roundings of 1e-16, amplified by the dynamics
    np.testing.assert_allclose(losses, expected, rtol=1e-11)
    assert losses[-1] < losses[0] / 2


def test_sam_is_the_gradient_at_the_worst_point_nearby(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    norm = optax.tree.norm(gradient)
    shifted = jax.tree.map(lambda p, g: p + 0.2 * g / norm, params, gradient)
    expected = flat(jax.grad(loss_fn)(shifted, batch))
    tolerance = {"rtol": 1e-13, "atol": 1e-14}  # g cancels up to a rounding
    np.testing.assert_allclose(
        flat(apply(sam(loss_fn, rho=0.2), gradient, params, batch=batch)), expected, **tolerance
    )
    penalty = gradient_norm_penalty(loss_fn, gamma=0.2, epsilon=0.2)
    np.testing.assert_allclose(
        flat(apply(penalty, gradient, params, batch=batch)), expected, **tolerance
    )


def test_gradient_norm_penalty_tends_to_the_gradient_of_the_norm(x64):
    params, batch = params_of(), batch_of()

    def penalized(params):
        return loss_fn(params, batch) + 0.3 * optax.tree.norm(jax.grad(loss_fn)(params, batch))

    gradient, expected = jax.grad(loss_fn)(params, batch), jax.grad(penalized)(params)
    tx = gradient_norm_penalty(loss_fn, gamma=0.3, epsilon=1e-5, scheme="central")
    np.testing.assert_allclose(
        flat(apply(tx, gradient, params, batch=batch)), flat(expected), atol=1e-8
    )  # epsilon^2, and eps / epsilon


@pytest.mark.parametrize("tx", [sam(rho=0.3), asam(rho=0.3)], ids=["sam", "asam"])
def test_what_comes_in_drops_out_of_sam_but_for_its_direction(tx):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    doubled = jax.tree.map(lambda g: 2 * g, gradient)
    value_fn = functools.partial(loss_fn, batch=batch)
    np.testing.assert_array_equal(
        flat(apply(tx, doubled, params, value_fn=value_fn)),
        flat(apply(tx, gradient, params, value_fn=value_fn)),
    )
    narrow = apply(
        tx, jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradient), params, value_fn=value_fn
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}


def test_unnormalised_sam_is_the_forward_difference_with_gamma_equal_epsilon(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    shifted = jax.tree.map(lambda p, g: p + 0.3 * g, params, gradient)
    updates = apply(fd_gradreg(loss_fn, gamma=0.3, epsilon=0.3), gradient, params, batch=batch)
    np.testing.assert_allclose(
        flat(updates), flat(jax.grad(loss_fn)(shifted, batch)), rtol=1e-13, atol=1e-14
    )  # g cancels


def test_asam_is_its_formula(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    norm = np.sqrt(np.sum((flat(params) * flat(gradient)) ** 2))
    shifted = jax.tree.map(lambda p, g: p + 0.2 * p**2 * g / norm, params, gradient)
    updates = apply(asam(loss_fn, rho=0.2), gradient, params, batch=batch)
    np.testing.assert_allclose(
        flat(updates), flat(jax.grad(loss_fn)(shifted, batch)), rtol=1e-13, atol=1e-14
    )  # g cancels


@jax.jit
def flooded_pairs(params, batch, eta):
    """Displacements over two flooded SGD steps, ascent first and descent first, and what one
    regularized step predicts."""

    def two_steps(levels):
        point = params
        for level in levels:
            tx = optax.chain(flooding(level=level), optax.sgd(eta))
            value, gradient = jax.value_and_grad(loss_fn)(point, batch)
            updates, _ = tx.update(gradient, tx.init(point), point, value=value)
            point = optax.apply_updates(point, updates)
        return jax.tree.map(jnp.subtract, point, params)

    gradient = jax.grad(loss_fn)(params, batch)
    tx = {s: fd_gradreg(loss_fn, gamma=1.0, epsilon=eta, scheme=s) for s in ("forward", "backward")}
    corrections = [
        jax.tree.map(jnp.subtract, apply(t, gradient, params, batch=batch), gradient)
        for t in tx.values()
    ]
    predicted = [jax.tree.map(lambda c: -(eta**2) * c, c) for c in corrections]
    return [two_steps((1e6, -1e6)), two_steps((-1e6, 1e6))], predicted


@given(seed=st.integers(0, 2**32 - 1), eta=st.floats(1e-3, 1.0))
def test_flooding_up_and_down_is_one_step_of_gradient_regularization(seed, eta):
    with jax.enable_x64(True):
        moved, predicted = flooded_pairs(params_of(seed), batch_of(seed), eta)
        for a, b in zip(moved, predicted, strict=True):
            np.testing.assert_allclose(
                flat(a), flat(b), atol=1e-14 * (1 + np.abs(flat(b)).max())
            )  # parameters of O(1), rounded twice


def test_flooding_is_the_gradient_of_the_flooded_loss():
    params, batch = params_of(), batch_of()
    value, gradient = jax.value_and_grad(loss_fn)(params, batch)
    for level in (float(value) / 2, float(value) * 2):
        expected = jax.grad(lambda p, level=level: jnp.abs(loss_fn(p, batch) - level) + level)(
            params
        )
        for extra in ({"value": value}, {"value_fn": lambda p: loss_fn(p, batch)}):
            np.testing.assert_allclose(
                flat(apply(flooding(level=level), gradient, params, **extra)),
                flat(expected),
                rtol=1e-5,
            )  # float32
        np.testing.assert_array_equal(
            flat(apply(flooding(loss_fn, level=level), gradient, params, batch=batch)),
            flat(expected),
        )
    assert not flat(apply(flooding(level=value), gradient, params, value=value)).any()


def test_flooding_level_may_be_a_schedule_and_updates_any_array():
    tx = flooding(level=lambda step: jnp.where(step < 1, 0.0, 2.0))
    state, signs = tx.init(1.0), []
    for _ in range(3):
        update, state = tx.update(1.0, state, 1.0, value=1)
        signs.append(float(update))
    assert signs == [1.0, -1.0, -1.0]
    assert (
        apply(
            flooding(level=0.3), jnp.ones(2, jnp.bfloat16), jnp.ones(2), value=jnp.bfloat16(1)
        ).dtype
        == jnp.bfloat16
    )
    assert apply(
        flooding(level=0.3), np.ones(2, np.float32), np.ones(2, np.float32), value=np.float64(0.1)
    ).tolist() == [-1.0, -1.0]


# Counted, not assumed


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_gradients_per_update_are_those_of_the_table(counter, name, reuse):
    params, batch = params_of(), batch_of()
    tx = REGULARIZERS[name](counter.wrap(loss_fn), reuse_updates=reuse)
    gradient = jax.grad(loss_fn)(params, batch)
    update = jax.jit(lambda g, s, p, b: tx.update(g, s, p, batch=b))
    state = tx.init(params)
    for _ in range(2):
        _, state = update(gradient, state, params, batch)
    # dbp evaluates the gradient inside its product, and does not do so twice for a direction of its
    # own
    expected = EXTRA_GRADIENTS[name] + (not reuse and not name.startswith("dbp"))
    assert counter.read()[1] == 2 * expected
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    "name",
    ["fd forward", "fd central", "dbp forward_over_reverse", "dbp reverse_over_reverse", "sam"],
)
@pytest.mark.parametrize("reuse", [True, False])
def test_skipped_updates_pass_through_and_cost_nothing(counter, name, reuse):
    params, batch, interval = params_of(), batch_of(), 3
    tx = REGULARIZERS[name](counter.wrap(loss_fn), interval=interval, reuse_updates=reuse)
    gradient = jax.grad(loss_fn)(params, batch)
    correction = flat(jax.jit(FUNCTIONS[name](loss_fn))(params, batch)[1]) - flat(gradient)
    update = jax.jit(lambda g, s, p, b: tx.update(g, s, p, batch=b))
    state, counts = tx.init(params), []
    for step in range(7):
        assert int(state.step) == step
        updates, state = update(gradient, state, params, batch)
        counts.append(counter.read()[1])
        penalty = flat(updates) - flat(gradient)
        if step % interval:
            assert not penalty.any()
        else:  # float32 rounding of the difference, divided by epsilon and times interval gamma
            np.testing.assert_allclose(penalty, interval * correction, atol=1e-5)
    expected = EXTRA_GRADIENTS[name] + (not reuse and not name.startswith("dbp"))
    assert counts == [expected, 0, 0, expected, 0, 0, expected]
    assert update._cache_size() == 1


def test_flooding_with_a_value_evaluates_no_loss_and_without_it_one(counter):
    params, batch = params_of(), batch_of()
    tx = flooding(counter.wrap(loss_fn), level=0.1)
    update = jax.jit(lambda value: apply(tx, params, params, value=value, batch=batch))
    update(0.2)
    assert counter.read() == (0, 0)
    jax.jit(lambda: apply(tx, params, params, batch=batch))()
    assert counter.read() == (1, 0)


@pytest.mark.parametrize("name", ["fd forward", "dbp forward_over_reverse", "asam"])
def test_ten_steps_trace_the_loss_as_often_as_one(name):
    traces, batch, params = [], batch_of(), params_of()

    def counted(params, batch):
        traces.append(None)
        return loss_fn(params, batch)

    tx = REGULARIZERS[name](interval=2)

    @jax.jit
    def step(
        params, state, batch
    ):  # a new lambda on every trace, and no retracing on account of it
        gradient = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(gradient, state, params, value_fn=lambda p: counted(p, batch))
        return optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates)), state

    state = tx.init(params)
    params, state = step(params, state, batch)
    first = len(traces)
    for _ in range(9):
        params, state = step(params, state, batch)
    assert len(traces) == first
    assert step._cache_size() == 1
    assert int(state.step) == 10


# Scalars: numbers, arrays, tracers, schedules


def reference_update(gamma, epsilon, params, gradient, batch):
    shifted = jax.tree.map(lambda p, g: p + epsilon * g, params, gradient)
    return flat(gradient) + gamma / epsilon * (
        flat(jax.grad(loss_fn)(shifted, batch)) - flat(gradient)
    )


SCALARS = {
    "float": float,
    "numpy float64": np.float64,
    "numpy float32": np.float32,
    "numpy array": np.asarray,
    "jax float32": lambda x: jnp.asarray(x, jnp.float32),
    "jax bfloat16": lambda x: jnp.asarray(x, jnp.bfloat16),
    "constant schedule": lambda x: lambda step: x,
    "array schedule": lambda x: optax.constant_schedule(jnp.asarray(x)),
}


@pytest.mark.parametrize("kind", SCALARS)
@pytest.mark.parametrize("wide", [False, True])
def test_every_kind_of_scalar_gives_the_same_update_and_dtype(kind, wide):
    with jax.enable_x64(wide):  # float32 trees stay float32 under x64, whatever the width of gamma
        params, batch = (
            params_of(dtype=jnp.float32),
            jax.tree.map(lambda x: x.astype(jnp.float32), batch_of()),
        )
        gradient = jax.grad(loss_fn)(params, batch)
        convert = SCALARS[kind]
        for interval in (1, 2):
            tx = fd_gradreg(
                loss_fn, gamma=convert(0.5), epsilon=convert(0.25), interval=interval
            )  # exact in bfloat16
            updates = jax.jit(lambda tx=tx: apply(tx, gradient, params, batch=batch))()
            assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
        doubled = flat(updates) - flat(gradient)
        expected = reference_update(0.5, 0.25, params, gradient, batch) - flat(gradient)
        np.testing.assert_allclose(
            doubled, 2 * expected, atol=1e-5
        )  # eps(float32) gamma / epsilon times interval


def test_integers_are_numbers():
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    updates = [
        flat(apply(fd_gradreg(loss_fn, gamma=g, epsilon=e), gradient, params, batch=batch))
        for g, e in [(1, 2), (1.0, 2.0)]
    ]
    np.testing.assert_array_equal(*updates)


def test_gamma_and_epsilon_can_be_vmapped_jitted_and_differentiated(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)

    @jax.jit
    def update(gamma, epsilon):
        return apply(
            fd_gradreg(loss_fn, gamma=gamma, epsilon=epsilon), gradient, params, batch=batch
        )

    gammas, epsilons = np.asarray([0.0, 0.5, 1.0]), np.asarray([0.1, 0.3])
    table = jax.vmap(lambda g: jax.vmap(lambda e: update(g, e))(epsilons))(gammas)
    for i, gamma in enumerate(gammas):
        for j, epsilon in enumerate(epsilons):
            cell = jax.tree.map(lambda x, i=i, j=j: x[i, j], table)
            np.testing.assert_allclose(
                flat(cell),
                reference_update(gamma, epsilon, params, gradient, batch),
                rtol=1e-11,
                atol=1e-13,
            )
    # the update is linear in gamma, and its derivative is the correction at gamma = 1
    slope = jax.jacobian(update)(0.5, 0.3)
    np.testing.assert_allclose(
        flat(slope),
        reference_update(1.0, 0.3, params, gradient, batch) - flat(gradient),
        rtol=1e-11,
        atol=1e-13,
    )
    for name in ("dbp", "sam"):  # traced through the other families as well
        make = {
            "dbp": lambda s: dbp_gradreg(loss_fn, gamma=s),
            "sam": lambda s: sam(loss_fn, rho=s),
        }[name]
        rows = jax.jit(
            jax.vmap(lambda s, make=make: apply(make(s), gradient, params, batch=batch))
        )(jnp.asarray([0.1, 0.2]))
        alone = apply(make(0.2), gradient, params, batch=batch)
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda x: x[1], rows)), flat(alone), rtol=1e-11, atol=1e-13
        )


def test_a_traced_negative_epsilon_is_the_backward_difference(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    traced = jax.jit(
        lambda e: apply(fd_gradreg(loss_fn, gamma=0.3, epsilon=e), gradient, params, batch=batch)
    )(-0.2)
    backward = apply(
        fd_gradreg(loss_fn, gamma=0.3, epsilon=0.2, scheme="backward"),
        gradient,
        params,
        batch=batch,
    )
    np.testing.assert_allclose(
        flat(traced), flat(backward), rtol=1e-12, atol=1e-14
    )  # rounding of the difference


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_traced_or_scheduled_zero_epsilon_gives_no_correction(scheme):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)

    @jax.jit
    def traced(epsilon):
        tx = fd_gradreg(loss_fn, gamma=0.3, epsilon=epsilon, scheme=scheme)
        return apply(tx, gradient, params, batch=batch), apply(
            sam(loss_fn, rho=epsilon), gradient, params, batch=batch
        )

    for epsilon in (0.0, 1e-40):  # 1 / 1e-40 overflows in float32
        penalised, climbed = traced(epsilon)
        np.testing.assert_array_equal(flat(penalised), flat(gradient))
        np.testing.assert_allclose(
            flat(climbed), flat(gradient), rtol=1e-5, atol=1e-7
        )  # SAM's is the gradient evaluated once more
    ramp = fd_gradreg(loss_fn, gamma=0.3, epsilon=optax.linear_schedule(0.0, 0.2, 2), scheme=scheme)
    for wrap in (jax.jit, lambda update: update):  # traced and concrete
        update, state = (
            wrap(lambda s: ramp.update(gradient, s, params, batch=batch)),
            ramp.init(params),
        )
        first, state = update(state)
        np.testing.assert_array_equal(flat(first), flat(gradient))
        second, _ = update(state)
        assert np.abs(flat(second) - flat(gradient)).max() > 1e-3


def test_a_scheduled_negative_epsilon_is_the_backward_difference_without_jit_too(x64):
    params = jnp.asarray(1.0)
    for tx in (
        fd_gradreg(lambda p: p**3 / 3, gamma=1.0, epsilon=lambda step: -0.5),
        sam(lambda p: p**3 / 3, rho=lambda step: -0.5),
    ):
        update = float(tx.update(jnp.asarray(1.0), tx.init(params), params)[0])
        assert update in (2.5, 0.25)  # 1 + 2 - 0.5, and the gradient at 0.5


def test_schedules_go_by_a_counter_that_advances_on_skipped_updates_too():
    params, batch, seen = params_of(), batch_of(), []

    def gamma(step):
        jax.debug.callback(lambda s: seen.append(int(s)), step)
        return 0.1 * (1 + step)

    tx = fd_gradreg(loss_fn, gamma=gamma, epsilon=0.1, interval=3)
    gradient = jax.grad(loss_fn)(params, batch)
    unit = flat(
        apply(fd_gradreg(loss_fn, gamma=1.0, epsilon=0.1), gradient, params, batch=batch)
    ) - flat(gradient)
    update, state = jax.jit(lambda s: tx.update(gradient, s, params, batch=batch)), tx.init(params)
    for step in range(5):
        updates, state = update(state)
        expected = 3 * 0.1 * (1 + step) * unit if step % 3 == 0 else 0 * unit
        np.testing.assert_allclose(
            flat(updates) - flat(gradient), expected, atol=1e-5
        )  # eps(float32) gamma interval / epsilon
    jax.effects_barrier()
    assert seen == [0, 1, 2, 3, 4]


def test_epsilon_schedules_see_the_same_counter(x64):
    params = jnp.asarray(1.0)
    tx = fd_gradreg(lambda p: p**3 / 3, gamma=1.0, epsilon=lambda step: 0.5 * (1 + step))
    state, corrections = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(jnp.asarray(1.0), state, params)
        corrections.append(float(updates) - 1)
    np.testing.assert_allclose(
        corrections, [2.5, 3.0, 3.5], rtol=1e-14
    )  # H g + epsilon, see test_penalty


def test_the_state_is_a_counter_of_fixed_type():
    params = params_of()
    for tx in [make(loss_fn) for make in REGULARIZERS.values()] + [flooding(level=0.1)]:
        state = tx.init(params)
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        assert isinstance(state, GradregState)
        assert state.step.dtype == jnp.int32
        assert state.step.shape == ()
        after = jax.eval_shape(
            lambda s, tx=tx: tx.update(params, s, params, batch=batch_of(), value=0.1)[1], state
        )
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
    full = GradregState(step=jnp.asarray(np.iinfo(np.int32).max, jnp.int32))
    assert int(tx.update(params, full, params, value=0.1)[1].step) == np.iinfo(np.int32).max


# Which loss


class Model:
    def loss(self, params, batch):
        return loss_fn(params, batch)

    def __call__(self, params, batch):
        return loss_fn(params, batch)

    def closed(self, params):
        return loss_fn(params, batch_of())


def with_keyword_only(params, *, batch):
    return loss_fn(params, batch)


def with_default(params, batch, scale=1.0, *, shift=0.0):
    return scale * loss_fn(params, batch) + shift


def with_any_keywords(params, **kwargs):
    assert set(kwargs) == {"batch", "meant_for_others"}
    return loss_fn(params, kwargs["batch"])


LOSSES = {
    "function": loss_fn,
    "keyword-only": with_keyword_only,
    "defaults": with_default,
    "partial": functools.partial(with_default, scale=1.0),
    "partial of the batch": functools.partial(loss_fn, batch=batch_of()),
    "bound method": Model().loss,
    "closed bound method": Model().closed,
    "callable object": Model(),
    "jitted": jax.jit(loss_fn),
    "checkpointed": jax.checkpoint(loss_fn),
    "any keywords": with_any_keywords,
    "positional rest": lambda *args, batch: loss_fn(args[0], batch),
}


@pytest.mark.parametrize("name", LOSSES)
def test_arguments_of_the_loss_are_picked_by_name(name):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    expected = apply(fd_gradreg(loss_fn, gamma=0.3, epsilon=0.2), gradient, params, batch=batch)
    extra = {"batch": batch, "meant_for_others": 7, "value": 1.0, "grad": gradient}
    tx = fd_gradreg(LOSSES[name], gamma=0.3, epsilon=0.2)
    updates = apply(
        tx, gradient, params, value_fn=lambda p: 1 / 0, **extra
    )  # the loss of construction wins
    np.testing.assert_allclose(
        flat(updates), flat(expected), rtol=1e-4, atol=1e-5
    )  # eps(float32) / epsilon
    tx = fd_gradreg(gamma=0.3, epsilon=0.2)
    updates = apply(tx, gradient, params, value_fn=LOSSES[name], **extra)
    np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-4, atol=1e-5)


def test_optional_arguments_are_picked_where_they_are_given():
    params, batch = params_of(), batch_of()
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = fd_gradreg(with_default, gamma=0.5, epsilon=0.5, reuse_updates=False)
    small = flat(apply(tx, zero, params, batch=batch))
    large = flat(apply(tx, zero, params, batch=batch, scale=0.0, shift=3.0))
    assert np.abs(small).max() > 0
    assert not large.any()


def test_has_aux_speaks_of_the_loss_and_never_of_value_fn():
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    expected = apply(dbp_gradreg(loss_fn, gamma=0.3), gradient, params, batch=batch)

    def with_aux(params, batch):
        return loss_fn(params, batch), {"anything": "at all"}

    for make in (
        functools.partial(dbp_gradreg, gamma=0.3),
        functools.partial(fd_gradreg, gamma=0.3, epsilon=1e-2, scheme="central"),
    ):
        for updates in (
            apply(make(with_aux, has_aux=True), gradient, params, batch=batch),
            apply(make(has_aux=True), gradient, params, value_fn=lambda p: loss_fn(p, batch)),
        ):
            np.testing.assert_allclose(
                flat(updates), flat(expected), atol=1e-3
            )  # float32: eps / epsilon and epsilon^2
    assert apply(flooding(with_aux, level=1e3, has_aux=True), 1.0, params, batch=batch) == -1.0


# Which gradient


def test_reuse_updates_false_adds_the_penalty_to_whatever_comes_in(x64):
    params, batch, other = params_of(), batch_of(), batch_of(7)
    gradient, incoming = jax.grad(loss_fn)(params, batch), jax.grad(loss_fn)(params, other)
    for name in ("fd central", "dbp forward_over_reverse", "asam"):
        correction = flat(jax.jit(FUNCTIONS[name](loss_fn))(params, batch)[1]) - flat(gradient)
        for tx, extra in [
            (REGULARIZERS[name](loss_fn, reuse_updates=False), {}),
            (REGULARIZERS[name](loss_fn), {"reuse_updates": False}),  # for one call
        ]:
            updates = jax.jit(
                lambda tx=tx, extra=extra: apply(tx, incoming, params, batch=batch, **extra)
            )()
            np.testing.assert_allclose(
                flat(updates) - flat(incoming), correction, atol=1e-12
            )  # rounding over epsilon
        again = REGULARIZERS[name](loss_fn, reuse_updates=False)
        np.testing.assert_allclose(
            flat(apply(again, gradient, params, batch=batch, reuse_updates=True)) - flat(gradient),
            correction,
            atol=1e-12,
        )


@pytest.mark.parametrize(
    "first", [optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.5), optax.trace(0.9)]
)
def test_reuse_updates_false_repairs_a_regularizer_that_is_not_first(x64, first):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    clean, _ = first.update(gradient, first.init(params), params)
    expected = (
        flat(clean)
        + flat(apply(fd_gradreg(loss_fn, gamma=0.5, epsilon=0.1), gradient, params, batch=batch))
        - flat(gradient)
    )
    tx = optax.chain(first, fd_gradreg(loss_fn, gamma=0.5, epsilon=0.1, reuse_updates=False))
    np.testing.assert_allclose(
        flat(apply(tx, gradient, params, batch=batch)), expected, atol=1e-12
    )  # rounding over epsilon


def test_tiny_and_huge_gradients_are_climbed_in_the_right_direction():
    for size in (1e-17, 1e-10, 1e17):
        slope = jnp.asarray([3.0, -4.0]) * size
        params = jnp.asarray([1.0, 1.0])

        def loss(
            p, slope=slope
        ):  # a linear term of any size, and a curvature that the difference must find
            return jnp.sum(slope * p) + jnp.sum((p - 1) ** 2) * jnp.max(jnp.abs(slope))

        gradient = jax.grad(loss)(params)
        for tx in (sam(rho=0.1), asam(rho=0.1), gradient_norm_penalty(gamma=0.1, epsilon=0.1)):
            updates = np.asarray(apply(tx, gradient, params, value_fn=loss), np.float64)
            expected = np.asarray([3.0, -4.0]) + 2 * 4 * 0.1 * np.asarray([0.6, -0.8])
            np.testing.assert_allclose(
                updates / np.float64(np.float32(size)), expected, rtol=2e-6
            )  # rounding of 1 + 0.06


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["fd forward", "fd central", "dbp forward_over_reverse", "asam"])
def test_narrow_trees_come_back_narrow_and_near_the_wide_result(name, dtype):
    params, batch = params_of(dtype=dtype), jax.tree.map(lambda x: x.astype(dtype), batch_of())
    gradient = jax.grad(loss_fn)(params, batch)
    tx = REGULARIZERS[name](loss_fn, interval=2)
    updates, state = jax.jit(lambda s: tx.update(gradient, s, params, batch=batch))(tx.init(params))
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    wide = [
        jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (gradient, params, batch)
    ]
    reference = flat(apply(tx, wide[0], wide[1], batch=wide[2]))
    error = np.abs(flat(updates) - reference).max() / np.abs(reference).max()
    assert error < 100 * float(
        jnp.finfo(dtype).eps
    )  # rounding of g', divided by epsilon / (interval gamma) = 1/3 and summed
    assert int(state.step) == 1


def test_the_exact_product_follows_the_ascent_it_is_given(x64):
    params, batch = params_of(), batch_of()
    gradient = jax.grad(loss_fn)(params, batch)
    expected = dbp_value_and_grad(loss_fn, gamma=0.3, ascent=normalized)(params, batch)[1]
    for reuse in (True, False):
        tx = dbp_gradreg(loss_fn, gamma=0.3, ascent=normalized, reuse_updates=reuse)
        np.testing.assert_allclose(
            flat(apply(tx, gradient, params, batch=batch)), flat(expected), rtol=1e-12, atol=1e-14
        )
