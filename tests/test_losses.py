"""A regularized loss is the loss, with the transformation's output for a gradient."""

import functools
import inspect
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
import two_parameters as two
from gradreg_optax import regularized_loss

FD = gr.fd_gradreg(gamma=0.3, epsilon=0.2)
FAMILIES = {
    "forward": FD,
    "central": gr.fd_gradreg(gamma=0.3, epsilon=0.2, scheme="central"),
    "product": gr.dbp_gradreg(gamma=0.3),
    "product, reverse": gr.dbp_gradreg(gamma=0.3, mode="reverse_over_reverse"),
    "asam": gr.asam(rho=0.3),
    "flooding": gr.flooding(level=10.0),
    "chain": optax.chain(FD, gr.flooding(level=10.0), optax.clip_by_global_norm(0.5)),
}
GRADIENTS = {"central": 3, "flooding": 1}
families = pytest.mark.parametrize(
    "name", ["forward", "central", "product, reverse", "flooding", "chain"]
)
some_families = pytest.mark.parametrize("name", ["forward", "product", "chain"])
# float32: two gradients of some ten operations each, of whose difference 1.5 times is taken
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def loss_fn(params, batch, key, label, *, weight=1.0, mode="train"):
    """Integers and a key in the batch, a word and a None among the arguments."""
    assert mode == "train"
    assert label is None
    x, y = batch["x"], batch["y"]
    x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x, 0)
    logits = jnp.tanh(x @ params["w"]) @ params["v"]
    return weight * optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def loss_and_aux(*args, **kwargs):
    value = loss_fn(*args, **kwargs)
    return value, {"loss": value, "word": "text", "none": None, "size": 5}


def problem(seed=0):
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    several = [rng.normal(size=size).astype(np.float32) for size in [(3, 6), (6, 4), (5, 3)]]
    w, v, x = map(jnp.asarray, several)
    batch = {"x": x, "y": jnp.asarray(rng.integers(4, size=5))}
    return {"w": w, "v": v}, (batch, key, None), {"weight": 2.0}


def small():
    params, (batch, *_), _ = problem()
    return params, batch["x"]


def problems(count):
    """Several stacked: (params, x, y, keys)."""
    several = [problem(seed) for seed in range(count)]
    return jax.tree.map(lambda *x: jnp.stack(x), *[(p, (b, k)) for p, (b, k, _), _ in several])


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def transformed(tx, value_fn, params, state):
    """Return the output of the transformation for the gradient, and its state."""
    value, gradient = jax.value_and_grad(value_fn)(params)
    return tx.update(gradient, state, params, value=value, value_fn=value_fn)


def by_transformation(tx, value_fn, params):
    return transformed(tx, value_fn, params, tx.init(params))[0]


@families
def test_gradient_and_value_are_those_of_the_transformation_and_of_the_loss(counter, name):
    """Bit for bit in the value, with as many gradients as the transformation takes."""
    params, args, kwargs = problem()
    tx, loss = FAMILIES[name], regularized_loss(counter.wrap(loss_fn), FAMILIES[name])
    found = jax.jit(jax.value_and_grad(loss))(params, *args, **kwargs)
    gradients = GRADIENTS.get(name, 2)
    assert counter.read() == (gradients, gradients)

    @jax.jit
    def expected(params, *args, **kwargs):
        def closed(p):
            return loss_fn(p, *args, **kwargs)

        return closed(params), by_transformation(tx, closed, params)

    value, updates = expected(params, *args, **kwargs)
    np.testing.assert_array_equal(found[0], value)
    close(flat(found[1]), flat(updates))
    np.testing.assert_array_equal(jax.jit(loss)(params, *args, **kwargs), value)
    assert counter.read() == (1, 0)  # nothing else


def test_without_jit_they_are_too():
    tx = FAMILIES["chain"]
    loss = regularized_loss(two.quartic, tx)
    value, gradient = jax.value_and_grad(loss)(two.P)
    assert value == loss(two.P) == two.quartic(two.P)
    close(gradient, by_transformation(tx, two.quartic, two.P))


@some_families
def test_it_trains_inside_vmap_and_scan(name):
    params, (batches, keys) = problems(3)
    loss = regularized_loss(loss_fn, FAMILIES[name])

    def by_hand(params, batch, key):
        return by_transformation(FAMILIES[name], lambda p: loss_fn(p, batch, key, None), params)

    def train(gradient_of):
        def step(params, batch):
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient_of(params, *batch)), None

        def run(params):
            return jax.lax.scan(step, params, (batches, keys))[0]

        return jax.jit(jax.vmap(run))(params)

    close(flat(train(lambda *args: jax.grad(loss)(*args, None))), flat(train(by_hand)))


@pytest.mark.parametrize("name", ["forward", "chain"])
def test_aux_is_that_of_the_clean_pass_whatever_it_holds(name):
    params, args, kwargs = problem()
    loss = regularized_loss(loss_and_aux, FAMILIES[name], has_aux=True)
    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params, *args, **kwargs)
    plain = jax.grad(regularized_loss(loss_fn, FAMILIES[name]))(params, *args, **kwargs)
    assert aux == loss_and_aux(params, *args, **kwargs)[1]
    assert value == aux["loss"]
    np.testing.assert_array_equal(flat(gradient), flat(plain))


def test_what_aux_contributes_to_a_gradient_is_added_unregularized():
    def with_logits(params, x):
        hidden = jnp.tanh(x @ params["w"])
        return jnp.mean((hidden @ params["v"]) ** 2), {"hidden": hidden, "n": 5}

    params, x = small()
    loss = regularized_loss(with_logits, FD, has_aux=True)

    def contrast(loss, weight, params):
        value, aux = loss(params, x)
        return weight * value + jnp.sum(aux["hidden"] ** 2)

    regularized = jax.grad(lambda p: loss(p, x)[0])(params)
    of_aux = jax.grad(functools.partial(contrast, with_logits, 0.0))(params)
    both = jax.grad(functools.partial(contrast, loss, 3.0))(params)
    expected = jax.tree.map(lambda a, b: 3 * a + b, regularized, of_aux)
    np.testing.assert_allclose(flat(both), flat(expected), rtol=1e-5, atol=1e-6)


def split_loss(x, w, y, v):
    """The parameters are the second and the fourth argument."""
    return jnp.mean((jnp.tanh(x @ w) @ v - y) ** 2)


def split_problem():
    params, x = small()
    return x, params["w"], jnp.ones((5, 4)), params["v"]


@pytest.mark.parametrize("argnums", [-1, (3, 1), [1, -1]])
def test_argnums_names_the_parameters(argnums):
    args = split_problem()
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    loss = regularized_loss(split_loss, FD, argnums=argnums)
    found = jax.grad(loss, argnums=tuple(n % 4 for n in numbers))(*args)

    def of_params(params):
        full = list(args)
        for n, p in zip(numbers, params, strict=True):
            full[n] = p
        return split_loss(*full)

    expected = by_transformation(FD, of_params, [args[n] for n in numbers])
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    value, same = gr.fd_value_and_grad(split_loss, gamma=0.3, epsilon=0.2, argnums=argnums)(*args)
    assert value == loss(*args)
    close(flat(same), flat(found))


def test_a_keyword_reaches_the_argument_that_argnums_counts_in_the_signature():
    x, w, y, v = split_problem()
    loss = regularized_loss(split_loss, FD, argnums=1)
    np.testing.assert_array_equal(
        jax.grad(lambda w: loss(x, v=v, y=y, w=w))(w), jax.grad(loss, argnums=1)(x, w, y, v)
    )


@pytest.mark.parametrize("name", ["forward", "product"])
def test_the_gradient_in_other_arguments_is_that_of_the_loss(name):
    args = split_problem()
    loss = regularized_loss(split_loss, FAMILIES[name], argnums=(1, 3))
    everything = jax.grad(loss, argnums=(0, 1, 2, 3))(*args)
    plain = jax.grad(split_loss, argnums=(0, 2))(*args)
    close(flat(everything[::2]), flat(plain))
    close(flat(jax.grad(loss, argnums=(0, 2))(*args)), flat(plain))
    close(flat(everything[1::2]), flat(jax.grad(loss, argnums=(1, 3))(*args)))


def dense_loss(kernels, x, labels):
    for kernel in kernels[:-1]:
        x = jax.nn.gelu(x @ kernel)
    return optax.softmax_cross_entropy_with_integer_labels(x @ kernels[-1], labels).mean()


# the difference: see test_transformations
@pytest.mark.parametrize("name", ["product", "flooding"])
def test_it_costs_what_the_gradient_function_costs(name):
    kernels = [jnp.ones(shape) / 8 for shape in [(32, 64), (64, 64), (64, 10)]]
    args = kernels, jnp.ones((64, 32)), jnp.zeros(64, int)

    def flops(function):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    functions = {
        "product": functools.partial(gr.dbp_value_and_grad, gamma=0.3),
        "flooding": jax.value_and_grad,
    }
    loss = regularized_loss(dense_loss, FAMILIES[name])
    assert flops(jax.value_and_grad(loss)) <= 1.01 * flops(functions[name](dense_loss))
    assert flops(loss) == flops(dense_loss)
    of_x = {f: flops(jax.value_and_grad(f, argnums=1)) for f in (loss, dense_loss)}
    assert of_x[loss] == of_x[dense_loss]


def test_the_wrapper_has_name_and_signature_of_the_loss_for_trainers_that_bind_keywords():
    params, (batch, key, label), _ = problem()
    loss_fn.note = "of the user"
    loss = regularized_loss(loss_fn, FD)
    for made in (loss, gr.fd_value_and_grad(loss_fn, gamma=0.1, epsilon=0.1)):
        assert inspect.signature(made) == inspect.signature(loss_fn)
        assert (made.__name__, made.__doc__) == (loss_fn.__name__, loss_fn.__doc__)
        assert not hasattr(made, "note")
    by_name = {"label": label, "key": key, "batch": batch, "params": params}
    partial = regularized_loss(functools.partial(loss_fn, label=None, weight=2.0), FD)
    np.testing.assert_array_equal(loss(**by_name, weight=2.0), partial(params, batch, key))


SCHEDULE = optax.piecewise_constant_schedule(0.1, {2: 3.0})
NEED_THE_STEP = {
    "a schedule, late": gr.fd_gradreg(gamma=SCHEDULE, epsilon=0.2, start=1),
    "an interval": gr.fd_gradreg(gamma=0.3, epsilon=0.2, interval=2),
    "a chain": optax.chain(
        gr.sam(rho=SCHEDULE), gr.flooding(level=optax.linear_schedule(0.0, 3.0, 3))
    ),
}


@pytest.mark.parametrize("name", NEED_THE_STEP)
def test_the_step_comes_as_a_keyword(name):
    tx = NEED_THE_STEP[name]
    params, args, _ = problem()
    loss = regularized_loss(loss_fn, tx)
    gradient = jax.jit(lambda p, step: jax.grad(loss)(p, *args, step=step))
    state = tx.init(params)
    update = jax.jit(lambda state: transformed(tx, lambda p: loss_fn(p, *args), params, state))
    for step in range(4):
        updates, state = update(state)
        close(flat(gradient(params, step)), flat(updates))
    assert loss(params, *args) == loss_fn(params, *args)  # the value does not need the step
    with pytest.raises(TypeError, match=r"step"):
        jax.grad(loss)(params, *args)


def test_a_loss_that_has_a_step_of_its_own_shares_it():
    def loss_with_step(params, step):
        return jnp.sum(params**4) * (1 + step)

    tx = gr.fd_gradreg(gamma=SCHEDULE, epsilon=0.2)
    loss, params = regularized_loss(loss_with_step, tx), jnp.arange(3.0)
    given = jax.grad(loss)(params, step=2)
    np.testing.assert_array_equal(given, jax.grad(loss)(params, 2))
    gamma = float(SCHEDULE(2))
    _, expected = gr.fd_value_and_grad(loss_with_step, gamma=gamma, epsilon=0.2)(params, 2)
    close(given, expected)


def test_a_weighted_mean_and_a_loss_in_micro_batches_are_losses_like_others():
    params, x = small()
    x = jnp.concatenate([x, x[::-1], x[:2]])

    def squares(params, x):
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"]) ** 2, axis=1)

    def weighted(params, x):
        return gr.Weighted(squares(params, x).sum(), len(x))

    plain = jax.value_and_grad(regularized_loss(lambda p, x: squares(p, x).mean(), FD))(params, x)
    for loss in (weighted, gr.microbatched(weighted, 4)):
        found = jax.value_and_grad(regularized_loss(loss, FD))(params, x)
        close(flat(found), flat(plain))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("forward", jnp.bfloat16), ("product", jnp.float16), ("chain", jnp.bfloat16)],
)
def test_gradients_have_the_dtypes_of_the_parameters(name, dtype):
    params, (batch, key, _), _ = problem()
    params, batch = jax.tree.map(
        lambda x: x.astype(dtype) if x.dtype.kind == "f" else x, (params, batch)
    )
    loss = regularized_loss(loss_fn, FAMILIES[name])
    gradient = jax.eval_shape(jax.grad(loss), params, batch, key, None)
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}


def test_complex_parameters_and_a_zero_gradient(x64):
    params = jnp.array([1.0 + 2.0j, 0.0, -1.0j])
    loss = regularized_loss(lambda z: jnp.sum(jnp.abs(z) ** 2) / 2, FD)
    np.testing.assert_allclose(jax.grad(loss)(params), 1.3 * jnp.conj(params), rtol=1e-12)
    for tx in (FAMILIES[name] for name in ("asam", "central", "chain")):
        quartic = regularized_loss(lambda p: jnp.sum(p["w"] ** 4) + jnp.sum(p["v"] ** 4), tx)
        gradient = jax.jit(jax.grad(quartic))({"w": jnp.zeros(2), "v": jnp.zeros(2)})
        np.testing.assert_array_equal(flat(gradient), 0.0)


ADDS_STATE = {
    "momentum behind it": optax.chain(FD, optax.trace(0.9)),
    "an optimizer": optax.adam(1e-3),
    "a stateful ascent": gr.fd_gradreg(gamma=0.3, epsilon=0.2, ascent=optax.trace(0.9)),
}


@pytest.mark.parametrize("name", ADDS_STATE)
def test_a_regularizer_with_more_state_than_a_counter_is_refused(name):
    params, args, _ = problem()
    with pytest.raises(ValueError, match=r"regularized_loss: .*state.*optax.chain"):
        jax.grad(regularized_loss(loss_fn, ADDS_STATE[name]))(params, *args)


def unit_square(params):
    return jnp.sum(params**2)


@pytest.mark.parametrize(
    ("make", "call", "error", "sentence"),
    [
        ({"regularizer": 0.1}, (1.0,), TypeError, "regularized_loss: .*transformation"),
        ({"loss_fn": 3}, (1.0,), TypeError, "regularized_loss: the loss must be a function"),
        ({"has_aux": True}, (1.0,), TypeError, r"must return \(value, aux\)"),
        ({"loss_fn": lambda p: p}, ([1.0, 2.0],), TypeError, "real scalar"),
        ({"loss_fn": lambda p: (p.sum(), 1)}, ([1.0],), TypeError, "has_aux=True"),
        ({"argnums": 1}, (1.0,), ValueError, "argnums must be positions of arguments, got 1"),
        ({"argnums": "0"}, (1.0,), TypeError, "argnums must be an integer"),
        ({"argnums": ()}, (1.0,), TypeError, "argnums must be an integer"),
        ({"argnums": (0, -1)}, (1.0,), ValueError, "argnums must be different positions"),
        ({}, ([1, 2],), TypeError, "regularized_loss: the parameters has dtype int32"),
        ({"loss_fn": operator.add}, (1.0,), TypeError, "missing a required argument"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(make, call, error, sentence):
    made = {"loss_fn": unit_square, "regularizer": FD} | make
    with pytest.raises(error, match=sentence):
        regularized_loss(**made)(*map(jnp.asarray, call))


@pytest.mark.parametrize("step", [-1, 0.5])
def test_a_step_that_is_no_whole_number_is_refused(step):
    loss = regularized_loss(unit_square, gr.fd_gradreg(gamma=SCHEDULE, epsilon=0.1))
    with pytest.raises((TypeError, ValueError), match=r"regularized_loss: step"):
        loss(jnp.ones(2), step=step)


@pytest.mark.parametrize("step", [3, -1, jnp.arange(3), 0.5, "late"])
def test_a_step_of_the_loss_may_be_anything_where_the_regularizer_needs_none(step):
    def loss(params, step):
        factor = 2.0 if isinstance(step, str) else jnp.mean(jnp.asarray(step)) + 3
        return jnp.sum(params**4) * factor

    params = jnp.asarray([0.5, -1.0, 0.3])
    ours = regularized_loss(loss, FD)
    _, expected = gr.fd_value_and_grad(loss, gamma=0.3, epsilon=0.2)(params, step)
    close(jax.grad(ours)(params, step=step), expected)
    close(jax.grad(ours)(params, step), expected)
    assert float(ours(params, step)) == float(loss(params, step))


def test_in_shard_map_the_gradient_in_replicated_parameters_is_the_sum_over_the_devices():
    auto = (jax.sharding.AxisType.Auto,)
    mesh, spec = jax.make_mesh((1,), ("data",), axis_types=auto), jax.sharding.PartitionSpec
    loss = gr.regularized_loss(two.mean_square, two.FD)

    def gradient(params, batch):
        return jax.grad(loss)(params, batch)  # of a loss that varies from device to device

    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
    np.testing.assert_allclose(
        jax.jit(sharded)(two.P, two.BATCH), jax.grad(loss)(two.P, two.BATCH), rtol=1e-6
    )


@pytest.mark.parametrize(
    "wrap", [lambda loss: loss, jax.jit, lambda loss: gr.microbatched(loss, 2)]
)
def test_a_regularized_loss_is_not_regularized_again(wrap):
    loss = gr.regularized_loss(wrap(gr.regularized_loss(two.mean_square, two.FD)), gr.sam(rho=0.1))
    with two.says(ValueError, "regularized_loss: ", "penalise twice", "chain"):
        jax.grad(loss)(two.P, two.BATCH)
    clipped = gr.regularized_loss(two.mean_square, optax.clip(0.1))  # no penalty
    jax.grad(gr.regularized_loss(wrap(clipped), two.FD))(two.P, two.BATCH)


def test_a_float_that_a_loss_calls_step_is_its_own():
    def loss(params, step):
        return step * two.quartic(params)

    for wrap in (lambda f: f, jax.jit):
        gradient = wrap(jax.grad(gr.regularized_loss(loss, two.FD)))
        _, expected = gr.fd_value_and_grad(loss, **two.PENALTY)(two.P, 0.5)
        np.testing.assert_allclose(gradient(two.P, 0.5), expected, rtol=1e-5)
        np.testing.assert_allclose(gradient(two.P, step=jnp.asarray(0.5)), expected, rtol=1e-5)
        with two.says(TypeError, "needs the step", "a whole number"):
            late = gr.regularized_loss(loss, gr.fd_gradreg(**two.PENALTY, interval=2))
            wrap(jax.grad(late))(two.P, 0.5)
