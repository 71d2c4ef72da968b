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
from problems import flat

FD = gr.fd_gradreg(gamma=0.3, epsilon=0.2)
FAMILIES = {
    "forward": FD,
    "central": gr.fd_gradreg(
        gamma=0.3, epsilon=0.2, scheme="central", ascent=optax.scale_by_trust_ratio()
    ),
    "product": gr.dbp_gradreg(gamma=0.3),
    "product, reverse": gr.dbp_gradreg(gamma=0.3, mode="reverse_over_reverse"),
    "flooding": gr.flooding(level=10.0),
    "chain": optax.chain(FD, gr.flooding(level=10.0), optax.clip_by_global_norm(0.5)),
}
GRADIENTS = {"central": 3, "flooding": 1}
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
    rng, key = np.random.default_rng(seed), jax.random.key(seed, impl="unsafe_rbg")
    w, v, x = (rng.normal(size=size).astype(np.float32) for size in [(3, 6), (6, 4), (5, 3)])
    return {"w": w, "v": v}, ({"x": x, "y": rng.integers(4, size=5)}, key, None), {"weight": 2.0}


def small():
    params, (batch, *_), _ = problem()
    return params, batch["x"]


def transformed(tx, value_fn, params, state):
    """Return the output of the transformation for the gradient, and its state."""
    value, gradient = jax.value_and_grad(value_fn)(params)
    return tx.update(gradient, state, params, value=value, value_fn=value_fn)


def by_transformation(tx, value_fn, params):
    return transformed(tx, value_fn, params, tx.init(params))[0]


@pytest.mark.parametrize("name", ["central", "product, reverse", "flooding", "chain"])
def test_gradient_and_value_are_those_of_the_transformation_and_of_the_loss(counter, name):
    """Bit for bit in the value, with as many gradients as the transformation takes."""
    params, args, kwargs = problem()
    tx, alone, of_the_key = FAMILIES[name], type(counter)(), type(counter)()

    @jax.jit
    def ways(params, batch, key):
        def closed(p):
            return loss_fn(p, batch, key, None, **kwargs)

        def ours(counter):
            return regularized_loss(counter.wrap(loss_fn), tx)

        found = jax.value_and_grad(ours(counter))(params, batch, key, None, **kwargs)
        value = ours(alone)(params, batch, key, None, **kwargs)
        by_weight = jax.grad(lambda w: ours(of_the_key)(params, batch, key, None, weight=w))(2.0)
        return found, value, by_weight, closed(params), by_transformation(tx, closed, params)

    (value, gradient), again, by_weight, expected, updates = ways(params, *args[:2])
    assert value == again == expected
    close(flat(gradient), flat(updates))
    close(2 * by_weight, value)
    gradients = GRADIENTS.get(name, 2)
    assert counter.read() == (gradients, gradients)
    assert alone.read() == of_the_key.read() == (1, 0)  # nothing that is not asked for


def penalised_quartic(p, factor=1.0, gamma=0.3, epsilon=0.2):
    """The gradient of ``factor`` times ``two.quartic`` with its forward difference."""
    gradient = 4 * factor * p**3
    return gradient + gamma / epsilon * (4 * factor * (p + epsilon * gradient) ** 3 - gradient)


def test_without_jit_they_are_too():
    loss = regularized_loss(two.quartic, FD)
    value, gradient = jax.value_and_grad(loss)(two.P)
    assert value == loss(two.P) == two.quartic(two.P)
    close(gradient, penalised_quartic(np.asarray(two.P)))


def test_aux_is_that_of_the_clean_pass_whatever_it_holds():
    params, args, kwargs = problem()
    loss = regularized_loss(loss_and_aux, FAMILIES["chain"], has_aux=True)
    plain = regularized_loss(loss_fn, FAMILIES["chain"])

    @jax.jit
    def both(params, batch, key):
        args = params, batch, key, None
        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(*args, **kwargs)
        assert (aux["word"], aux["none"], aux["size"]) == ("text", None, 5)
        expected = jax.value_and_grad(plain)(*args, **kwargs)
        return (value, aux["loss"], gradient), (expected[0], expected[0], expected[1])

    np.testing.assert_array_equal(*map(flat, both(params, *args[:2])))


def test_what_aux_contributes_to_a_gradient_is_added_unregularized():
    def with_logits(params, x):
        hidden = jnp.tanh(x @ params["w"])
        return jnp.mean((hidden @ params["v"]) ** 2), {"hidden": hidden, "n": 5}

    loss = regularized_loss(with_logits, FD, has_aux=True)

    @jax.jit
    def gradients(params, x):
        def contrast(loss, weight, params):
            value, aux = loss(params, x)
            return weight * value + jnp.sum(aux["hidden"] ** 2)

        regularized = jax.grad(lambda p: loss(p, x)[0])(params)
        of_aux = jax.grad(functools.partial(contrast, with_logits, 0.0))(params)
        return regularized, of_aux, jax.grad(functools.partial(contrast, loss, 3.0))(params)

    regularized, of_aux, both = map(flat, gradients(*small()))
    np.testing.assert_allclose(both, 3 * regularized + of_aux, rtol=1e-5, atol=1e-6)


def split_loss(x, w, y, v):
    """The parameters are the second and the fourth argument."""
    return jnp.mean((jnp.tanh(x @ w) @ v - y) ** 2)


def split_problem():
    params, x = small()
    return x, params["w"], np.ones((5, 4), np.float32), params["v"]


@pytest.mark.parametrize("argnums", [-1, (3, 1), [1, -1]])
def test_argnums_names_the_parameters(argnums):
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    loss = regularized_loss(split_loss, FD, argnums=argnums)
    by_function = gr.fd_value_and_grad(split_loss, gamma=0.3, epsilon=0.2, argnums=argnums)

    @jax.jit
    def ways(*args):
        def of_params(params):
            full = list(args)
            for n, p in zip(numbers, params, strict=True):
                full[n] = p
            return split_loss(*full)

        found = jax.grad(loss, argnums=tuple(n % 4 for n in numbers))(*args)
        expected = by_transformation(FD, of_params, [args[n] for n in numbers])
        return found, expected, by_function(*args), loss(*args)

    found, expected, (value, same), alone = ways(*split_problem())
    close(flat(found), flat(expected))
    close(flat(same), flat(expected))
    assert value == alone


def test_a_keyword_reaches_the_argument_that_argnums_counts_in_the_signature():
    loss = regularized_loss(split_loss, FD, argnums=1)

    @jax.jit
    def gradients(x, w, y, v):
        by_name = jax.grad(lambda w: loss(x, v=v, y=y, w=w))(w)
        return by_name, jax.grad(loss, argnums=1)(x, w, y, v)

    np.testing.assert_array_equal(*gradients(*split_problem()))


# the difference: see test_transformations; flooding: the counts above
def test_a_product_costs_what_its_gradient_function_costs():
    args = [jnp.ones((16, 16))] * 2, jnp.ones((32, 16))

    def dense_loss(kernels, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ kernels[0]) @ kernels[1]) ** 2)

    def flops(function):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    loss = regularized_loss(dense_loss, FAMILIES["product"])
    by_function = gr.dbp_value_and_grad(dense_loss, gamma=0.3)
    assert flops(jax.value_and_grad(loss)) <= 1.01 * flops(by_function)


def test_the_wrapper_has_name_and_signature_of_the_loss_for_trainers_that_bind_keywords():
    params, (batch, key, label), _ = problem()
    loss_fn.note = "of the user"
    loss = regularized_loss(loss_fn, FD)
    for made in (loss, gr.fd_value_and_grad(loss_fn, gamma=0.1, epsilon=0.1)):
        assert inspect.signature(made) == inspect.signature(loss_fn)
        assert (made.__name__, made.__doc__) == (loss_fn.__name__, loss_fn.__doc__)
        assert not hasattr(made, "note")
    by_name = {"label": label, "key": key, "batch": batch, "params": params, "weight": 2.0}
    partial = regularized_loss(functools.partial(loss_fn, label=None, weight=2.0), FD)
    found, expected = jax.jit(lambda: (loss(**by_name), partial(params, batch, key)))()
    assert found == expected


SCHEDULE = optax.piecewise_constant_schedule(0.1, {2: 3.0})
ONLY_LATE = [{"gamma": SCHEDULE}, {"epsilon": SCHEDULE}, {"start": 1}, {"interval": 2}]
NEED_THE_STEP = {
    "late, lazy, with a schedule": gr.fd_gradreg(gamma=SCHEDULE, epsilon=0.2, start=1, interval=2),
    "a chain": optax.chain(
        gr.sam(rho=SCHEDULE), gr.flooding(level=optax.linear_schedule(0.0, 30.0, 3))
    ),
}


@pytest.mark.parametrize("name", NEED_THE_STEP)
def test_the_step_comes_as_a_keyword(name):
    tx = NEED_THE_STEP[name]
    loss = regularized_loss(two.quartic, tx)

    @jax.jit
    def along(params):
        def update(state, step):
            updates, state = transformed(tx, two.quartic, params, state)
            return state, (updates, jax.grad(loss)(params, step=step))

        return jax.lax.scan(update, tx.init(params), jnp.arange(4))[1]

    close(*along(two.P))
    assert loss(two.P) == 17  # the value does not need the step


@pytest.mark.parametrize("options", ONLY_LATE)
def test_without_the_step_there_is_no_gradient(options):
    loss = regularized_loss(two.quartic, gr.fd_gradreg(**{"gamma": 0.3, "epsilon": 0.2} | options))
    with two.says(TypeError, "needs the step"):
        jax.grad(loss)(two.P)


def test_a_loss_that_has_a_step_of_its_own_shares_it():
    loss = regularized_loss(
        lambda params, step: two.quartic(params) * (1 + step),
        gr.fd_gradreg(gamma=SCHEDULE, epsilon=0.2),
    )
    for found in jax.jit(lambda p: (jax.grad(loss)(p, step=2), jax.grad(loss)(p, 2)))(two.P):
        close(found, penalised_quartic(np.asarray(two.P), 3.0))


STEPS = [-1, np.arange(3), 0.5, "late"]


def test_a_step_of_the_loss_may_be_anything_where_the_regularizer_needs_none():
    def loss(params, step):
        factor = 2.0 if isinstance(step, str) else jnp.mean(jnp.asarray(step)) + 3
        return two.quartic(params) * factor

    gradient = jax.grad(regularized_loss(loss, FD))

    @jax.jit
    def gradients(params, traced):
        return [(gradient(params, s), gradient(params, step=s)) for s in [*STEPS, traced]]

    for found, factor in zip(gradients(two.P, 0.5), [2.0, 4.0, 3.5, 2.0, 3.5], strict=True):
        for one in found:
            close(one, penalised_quartic(np.asarray(two.P), factor))
    late = regularized_loss(loss, gr.fd_gradreg(**two.PENALTY, interval=2))
    for wrap in (lambda f: f, jax.jit):
        with two.says(TypeError, "needs the step", "a whole number"):
            wrap(jax.grad(late))(two.P, 0.5)


def test_a_weighted_mean_and_a_loss_in_micro_batches_are_losses_like_others():
    def squares(params, x):
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"]) ** 2, axis=1)

    def weighted(params, x):
        return gr.Weighted(squares(params, x).sum(), len(x))

    losses = [lambda p, x: squares(p, x).mean(), weighted, gr.microbatched(weighted, 4)]

    @jax.jit
    def ways(params, x):
        return [jax.value_and_grad(regularized_loss(loss, FD))(params, x) for loss in losses]

    params, x = small()
    plain, *found = map(flat, ways(params, np.concatenate([x, x[::-1], x[:2]])))
    for one in found:
        close(one, plain)


def test_complex_parameters_have_the_gradient_in_the_convention_of_jax(x64):
    z = np.array([1.0 + 2.0j, 0.0, -1.0j])
    loss = regularized_loss(lambda z: jnp.sum(jnp.abs(z) ** 2) / 2, FD)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(z), 1.3 * np.conj(z), rtol=1e-12)


ADDS_STATE = {
    "momentum behind it": optax.chain(FD, optax.trace(0.9)),
    "an optimizer": optax.adam(1e-3),
    "a stateful ascent": gr.fd_gradreg(gamma=0.3, epsilon=0.2, ascent=optax.trace(0.9)),
}


@pytest.mark.parametrize("name", ADDS_STATE)
def test_a_regularizer_with_more_state_than_a_counter_is_refused(name):
    with pytest.raises(ValueError, match=r"regularized_loss: .*keeps more state.*optax.chain"):
        jax.grad(regularized_loss(two.quartic, ADDS_STATE[name]))(two.P)


WRONG = [  # (arguments of the maker, arguments of the call, the error)
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
]


@pytest.mark.parametrize(("make", "call", "error", "sentence"), WRONG)
def test_what_is_wrong_is_said_in_a_sentence(make, call, error, sentence):
    made = {"loss_fn": lambda p: jnp.sum(p**2), "regularizer": FD} | make
    with pytest.raises(error, match=sentence):
        regularized_loss(**made)(*map(jnp.asarray, call))


@pytest.mark.parametrize("step", [-1, 0.5])
def test_a_step_that_is_no_whole_number_is_refused(step):
    loss = regularized_loss(two.quartic, gr.fd_gradreg(gamma=SCHEDULE, epsilon=0.1))
    with two.says((TypeError, ValueError), "regularized_loss: step"):
        loss(two.P, step=step)


def test_a_regularized_loss_is_not_regularized_again():
    loss, clipped = (regularized_loss(two.mean_square, tx) for tx in (two.FD, optax.clip(0.1)))
    for wrap in (lambda loss: loss, jax.jit, lambda loss: gr.microbatched(loss, 2)):
        with two.says(ValueError, "regularized_loss: ", "penalise twice", "chain"):
            jax.grad(regularized_loss(wrap(loss), gr.sam(rho=0.1)))(two.P, two.BATCH)
        # no penalty inside
        jax.eval_shape(jax.grad(regularized_loss(wrap(clipped), two.FD)), two.P, two.BATCH)
