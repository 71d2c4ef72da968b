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
from problems import batch_of, flat, loss_fn, params_of

FD = gr.fd_gradreg(gamma=0.3, epsilon=0.2)
FAMILIES = {
    "central": gr.fd_gradreg(
        gamma=0.3, epsilon=0.2, scheme="central", ascent=optax.scale_by_trust_ratio()
    ),
    "product, reverse": gr.dbp_gradreg(gamma=0.3, mode="reverse_over_reverse"),
    "flooding": gr.flooding(level=10.0),
    "chain": optax.chain(FD, gr.flooding(level=10.0), optax.clip_by_global_norm(0.5)),
}
# float32: two gradients of some ten operations each, of whose difference 1.5 times is taken
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def with_aux(params, batch):
    """Aux that depends on the parameters, and that is no array."""
    hidden = jnp.tanh(batch["x"] @ params["kernel"])
    return loss_fn(params, batch), {"hidden": hidden, "word": "text", "none": None, "size": 5}


def transformed(tx, value_fn, params, state):
    """Return the output of the transformation for the gradient, and its state."""
    value, gradient = jax.value_and_grad(value_fn)(params)
    return tx.update(gradient, state, params, value=value, value_fn=value_fn)


def by_transformation(tx, value_fn, params):
    return transformed(tx, value_fn, params, tx.init(params))[0]


@pytest.mark.parametrize("name", ["central", "product, reverse", "flooding", "chain"])
def test_gradient_and_value_are_those_of_the_transformation_and_of_the_loss(counter, name):
    """Bit for bit in the value, with as many gradients as the transformation takes."""
    tx, alone, of_the_scale = FAMILIES[name], type(counter)(), type(counter)()

    @jax.jit
    def ways(params, batch):
        def closed(p):
            return loss_fn(p, batch, scale=2.0)

        def ours(counter):
            return regularized_loss(counter.wrap(loss_fn), tx)

        found = jax.value_and_grad(ours(counter))(params, batch, scale=2.0)
        value = ours(alone)(params, batch, scale=2.0)
        by_scale = jax.grad(lambda scale: ours(of_the_scale)(params, batch, scale=scale))(2.0)
        return found, value, by_scale, closed(params), by_transformation(tx, closed, params)

    (value, gradient), again, by_scale, expected, updates = ways(params_of(), batch_of())
    assert value == again == expected
    close(flat(gradient), flat(updates))
    close(2 * by_scale, value)
    gradients = {"central": 3, "flooding": 1}.get(name, 2)
    assert counter.read() == (gradients, gradients)
    assert alone.read() == of_the_scale.read() == (1, 0)  # nothing that is not asked for


def penalised_quartic(p, factor=1.0, gamma=0.3, epsilon=0.2):
    """The gradient of ``factor`` times ``two.quartic`` with its forward difference."""
    gradient = 4 * factor * p**3
    return gradient + gamma / epsilon * (4 * factor * (p + epsilon * gradient) ** 3 - gradient)


def test_aux_is_that_of_the_clean_pass_and_its_gradient_is_added_unregularized():
    loss = regularized_loss(with_aux, FAMILIES["chain"], has_aux=True)
    plain = regularized_loss(loss_fn, FAMILIES["chain"])

    @jax.jit
    def ways(params, batch):
        def contrast(params, loss, weight):
            value, aux = loss(params, batch)
            return weight * value + jnp.sum(aux["hidden"] ** 2)

        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
        assert (aux["word"], aux["none"], aux["size"]) == ("text", None, 5)
        found = value, aux["hidden"], gradient
        expected = jax.value_and_grad(plain)(params, batch)
        of_aux = jax.grad(contrast)(params, with_aux, 0.0)
        both = jax.grad(contrast)(params, loss, 3.0)
        clean = with_aux(params, batch)[1]["hidden"]
        return found, (expected[0], clean, expected[1]), of_aux, both

    found, expected, of_aux, both = ways(params_of(), batch_of())
    np.testing.assert_array_equal(flat(found), flat(expected))
    total = 3 * flat(expected[2]) + flat(of_aux)
    np.testing.assert_allclose(flat(both), total, rtol=1e-5, atol=1e-6)


def split_loss(x, w, y, v):
    """The parameters are the second and the fourth argument."""
    return jnp.mean((jnp.tanh(x @ w) @ v - y) ** 2)


def split_problem():
    params, batch = params_of(), batch_of()
    return batch["x"], params["kernel"], batch["y"], params["out"]


@pytest.mark.parametrize("argnums", [-1, (3, 1), [1, -1]])
def test_argnums_names_the_parameters(argnums):
    """By position in a call and by name, counted in the signature."""
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    loss = regularized_loss(split_loss, FD, argnums=argnums)
    by_function = gr.fd_value_and_grad(split_loss, gamma=0.3, epsilon=0.2, argnums=argnums)

    @jax.jit
    def ways(*args):
        def of_params(params, function):
            chosen = {"xwyv"[n]: p for n, p in zip(numbers, params, strict=True)}
            return function(**dict(zip("xwyv", args, strict=True)) | chosen)

        params = [args[n] for n in numbers]
        closed = functools.partial(of_params, function=split_loss)
        gradients = [
            by_transformation(FD, closed, params),
            jax.grad(loss, argnums=tuple(n % 4 for n in numbers))(*args),
            jax.grad(of_params)(params, loss),
        ]
        return gradients, by_function(*args), loss(*args)

    (expected, *found), (value, gradient), alone = ways(*split_problem())
    for one in (*found, gradient):
        close(flat(one), flat(expected))
    assert value == alone


def test_the_wrapper_has_name_and_signature_of_the_loss_for_trainers_that_bind_keywords(
    monkeypatch,
):
    monkeypatch.setattr(loss_fn, "note", "of the user", raising=False)
    loss = regularized_loss(loss_fn, FD)
    for made in (loss, gr.fd_value_and_grad(loss_fn, gamma=0.1, epsilon=0.1)):
        assert inspect.signature(made) == inspect.signature(loss_fn)
        assert (made.__name__, made.__doc__) == (loss_fn.__name__, loss_fn.__doc__)
        assert not hasattr(made, "note")
    partial = regularized_loss(functools.partial(loss_fn, scale=2.0), FD)
    params, batch = params_of(), batch_of()
    ways = jax.jit(lambda: (loss(scale=2.0, batch=batch, params=params), partial(params, batch)))
    assert operator.eq(*ways())


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


def with_a_step(params, step):
    """Of a step of any kind."""
    return two.quartic(params) * (1.0 if isinstance(step, str) else jnp.mean(jnp.asarray(step)) + 2)


def test_a_loss_that_has_a_step_of_its_own_shares_it():
    loss = regularized_loss(with_a_step, gr.fd_gradreg(gamma=SCHEDULE, epsilon=0.2))
    for found in jax.jit(lambda p: (jax.grad(loss)(p, step=2), jax.grad(loss)(p, 2)))(two.P):
        close(found, penalised_quartic(np.asarray(two.P), 4.0))


def test_a_step_of_the_loss_may_be_anything_where_the_regularizer_needs_none():
    gradient = jax.grad(regularized_loss(with_a_step, FD))

    @jax.jit
    def gradients(params, traced):
        steps = [-1, np.arange(3), 0.5, "late", traced]
        return [(gradient(params, s), gradient(params, step=s)) for s in steps]

    for found, factor in zip(gradients(two.P, 0.5), [1.0, 3.0, 2.5, 1.0, 2.5], strict=True):
        for one in found:
            close(one, penalised_quartic(np.asarray(two.P), factor))
    late = regularized_loss(with_a_step, gr.fd_gradreg(**two.PENALTY, interval=2))
    for wrap in (lambda f: f, jax.jit):
        with two.says(TypeError, "needs the step", "a whole number"):
            wrap(jax.grad(late))(two.P, 0.5)


def test_a_weighted_mean_and_a_loss_in_micro_batches_are_losses_like_others():
    def weighted(params, batch):
        return gr.Weighted(len(batch["y"]) * loss_fn(params, batch), len(batch["y"]))

    @jax.jit
    def ways(*args):
        losses = loss_fn, weighted, gr.microbatched(weighted, 4)
        return [jax.value_and_grad(regularized_loss(loss, FD))(*args) for loss in losses]

    plain, *found = map(flat, ways(params_of(), batch_of()))
    for one in found:
        close(one, plain)


@pytest.mark.parametrize(
    "way", [regularized_loss, lambda f, _: gr.microbatched(f, 4)], ids=["regularized", "in parts"]
)
def test_leaves_that_are_no_arrays_of_numbers_are_constants_as_in_a_module_of_equinox(way):
    """A Python number stays one: the loss may branch on it."""
    constants = {"rate": 0.5, "count": jnp.asarray(3), "on": True, "function": jnp.tanh, "no": None}

    def of_module(module, batch):
        scale = module["count"] * (2.0 if module["on"] and module["rate"] > 0 else 1.0)
        return module["function"](scale * loss_fn(module["params"], batch))

    def gradient(loss):
        return jax.jit(jax.grad(lambda params, batch: loss(constants | {"params": params}, batch)))

    @jax.jit
    def of_params(params, batch):
        return way(lambda p, b: of_module(constants | {"params": p}, b), FD)(params, batch)

    args = params_of(), batch_of()
    close(flat(gradient(way(of_module, FD))(*args)), flat(jax.grad(of_params)(*args)))


def test_complex_parameters_have_the_gradient_in_the_convention_of_jax(x64):
    z = np.array([1.0 + 2.0j, 0.0, -1.0j])
    loss = regularized_loss(lambda z: jnp.sum(jnp.abs(z) ** 2) / 2, FD)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(z), 1.3 * np.conj(z), rtol=1e-12)


@pytest.mark.parametrize(
    "tx", [optax.chain(FD, optax.trace(0.9)), gr.dbp_gradreg(gamma=0.3, ascent=optax.trace(0.9))]
)
def test_a_regularizer_with_more_state_than_a_counter_is_refused(tx):
    with two.says(ValueError, "regularized_loss: ", "keeps more state", "optax.chain"):
        jax.grad(regularized_loss(two.quartic, tx))(two.P)


WRONG = [  # (arguments of the maker, arguments of the call, the error)
    ({"regularizer": 0.1}, (1.0,), TypeError, "regularized_loss: .*transformation"),
    ({"loss_fn": 3}, (1.0,), TypeError, "regularized_loss: the loss must be a function"),
    ({"has_aux": True}, (1.0,), TypeError, r"must return \(value, aux\)"),
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
