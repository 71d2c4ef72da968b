"""Arguments are validated early; errors name the function, the value and the remedy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
import two_parameters as two
from gradreg_optax import curvature
from gradreg_optax._sharding import leading_devices
from two_parameters import says

PARAMS = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}
BATCH = np.ones(2, np.float32)
MODES = ("forward_over_reverse", "reverse_over_reverse")
NAN, INF = float("nan"), float("inf")


def loss_fn(params, batch):
    return jnp.sum(params["a"] * batch) + jnp.sum(params["b"] ** 2)


def linear(params):
    return jnp.sum(params["a"])


OPTIONS = {
    "fd_gradreg": {"gamma": 0.1, "epsilon": 0.1},
    "dbp_gradreg": {"gamma": 0.1},
    "sam": {"rho": 0.1},
    "asam": {"rho": 0.1},
    "gradient_norm_penalty": {"gamma": 0.1, "epsilon": 0.1},
    "flooding": {"level": 0.1},
    "fd_value_and_grad": {"gamma": 0.1, "epsilon": 0.1},
    "dbp_value_and_grad": {"gamma": 0.1},
}
FAMILIES = list(OPTIONS)[:6]
families = pytest.mark.parametrize("function", FAMILIES)


def make(function, *args, **options):
    return getattr(gr, function)(*args, **OPTIONS[function] | options)


fd = functools.partial(make, "fd_gradreg")
dbp = functools.partial(make, "dbp_gradreg")
by_difference = functools.partial(make, "fd_value_and_grad")
by_product = functools.partial(make, "dbp_value_and_grad")
flooding, relative = functools.partial(make, "flooding"), gr.relative_gradreg
train_step = functools.partial(gr.make_train_step, loss_fn, optax.sgd(0.1))


def update(tx, params=PARAMS, updates=PARAMS, **extra_args):
    return tx.update(updates, tx.init(PARAMS), params, **extra_args)


@pytest.mark.parametrize("function", [name for name in OPTIONS if "gamma" in OPTIONS[name]])
def test_a_negative_gamma_is_refused(function):
    for gamma in (-0.5, np.float64(-0.5), jnp.asarray(-0.5, jnp.bfloat16)):
        must = f"{function}: gamma must be finite and >= 0"
        with says(ValueError, must, "-0.5", "negate the loss"):
            make(function, loss_fn, gamma=gamma)


at_one = functools.partial(curvature.difference_error, lambda p: p**2, np.float32(1.0))
LIMITS = {  # the function for the limit of a small epsilon
    "fd_gradreg": "dbp_gradreg",
    "gradient_norm_penalty": "dbp_gradreg(..., ascent=normalized)",
    "fd_value_and_grad": "dbp_value_and_grad",
    "difference_error": "hessian_vector_product",
}


@pytest.mark.parametrize("function", LIMITS)
def test_an_epsilon_that_is_not_positive_is_refused(function):
    for epsilon in (0, -0.25, np.float32(0), jnp.asarray(-0.25), NAN, 1e-60):
        must = f"{function}: epsilon must be finite and > 0, got {epsilon}"
        with says(ValueError, must, 'scheme="backward"', LIMITS[function]):
            at_one(epsilon) if function not in OPTIONS else make(function, loss_fn, epsilon=epsilon)


@pytest.mark.parametrize("function", ["sam", "asam"])
@pytest.mark.parametrize("rho", [-0.25, NAN, INF])
def test_a_negative_rho_is_refused_with_a_remedy_that_exists(function, rho):
    must = f"{function}: rho must be finite and >= 0, got {rho}"
    with says(ValueError, must, 'gradient_norm_penalty(..., scheme="backward")'):
        make(function, rho=rho)


@pytest.mark.parametrize("function", ["fd_gradreg", "dbp_gradreg", "sam", "asam"])
def test_an_interval_is_a_positive_whole_number(function):
    for interval in (0, -3, 2.5, NAN, INF):
        with says(ValueError, ": interval must be a whole number >= 1, got", f"{interval:g}"):
            make(function, interval=interval)


@jax.jit
def traced_epsilon(params, epsilon):
    return by_difference(lambda p: jnp.sum(p**2), gamma=-1.0, epsilon=epsilon)(params)


PRODUCT, KEY = curvature.hessian_vector_product, jax.random.key(0)
SCHEME = "scheme must be one of 'forward', 'backward', 'central', got 'centered'"
MODE = "mode must be one of 'forward_over_reverse', 'reverse_over_reverse', got 'reverse'"
NO_SAMPLES, NO_AXIS = two.BATCH[:0], (np.ones(4, np.float32), 1.0)
SHARE = "needs a batch whose leaves share their leading axis"


def starred(params, *batches):
    return sum(two.mean_square(params, batch) for batch in batches)


def split(batch=two.BATCH, **options):
    return two.one_step(lambda p, batch: jnp.sum(p), batch=batch, **options)


def in_parts(batch, count=2, loss=two.mean_square):
    return gr.microbatched(loss, count)(two.P, batch)


def directed(make, ascent):
    return update(make(linear, ascent=ascent))


WHOLE, MOMENTUM = np.asarray([3, 4]), optax.trace(0.9)
MASK = gr.masked({"a": np.ones((3, 1), bool), "b": True})
THREE = {"a": np.ones(3), "b": np.ones(3)}
VALUE_ERRORS = {  # the error, with ... for what is left out -> a call
    # concrete values raise their error under jit as well, and a schedule where it is concrete
    "fd_value_and_grad: gamma must be ... got -1": lambda: traced_epsilon(np.ones(2), 0.1),
    "fd_gradreg: gamma must be finite and >= 0, got -1": lambda: update(
        fd(loss_fn, gamma=lambda step: -1.0), batch=BATCH
    ),
    "fd_gradreg: epsilon must be a scalar, got shape (2,) ... vmap": lambda: fd(epsilon=[0.1, 0.2]),
    "flooding: level must be a number, got nan": lambda: flooding(level=NAN),
    "flooding: value must be a scalar, got ... (3,)": lambda: update(flooding(), value=np.ones(3)),
    "fd_gradreg: start must": lambda: fd(start=-1),
    "relative_gradreg: strength must be finite and >= 0": lambda: relative(strength=-0.1),
    "relative_gradreg: reach must be finite and > 0": lambda: relative(reach=0.0),
    "relative_gradreg: decay must lie in [0, 1)": lambda: relative(decay=1.0),
    "relative_gradreg: interval must be a whole number >= 1": lambda: relative(interval=0),
    f"fd_gradreg: {SCHEME}": lambda: fd(scheme="centered"),
    f"difference_error: {SCHEME}": lambda: at_one(0.1, "centered"),
    f"dbp_value_and_grad: {MODE}": lambda: by_product(loss_fn, mode="reverse"),
    "hessian_trace: num_samples must be a whole number >= 2, got 1": lambda: (
        curvature.hessian_trace(two.quartic, two.P, KEY, num_samples=1)
    ),
    "top_hessian_eigenvalue: num_matvecs must be a whole number >= 1, got 0": lambda: (
        curvature.top_hessian_eigenvalue(two.quartic, two.P, KEY, num_matvecs=0)
    ),
    "product: vector must have the shape (2,) of its parameter, got (3,)": lambda: PRODUCT(
        two.quartic, two.P, np.ones(3)
    ),
    # trees
    "updates must have the structure": lambda: update(fd(linear), updates={"a": BATCH}),
    "updates['a'] must have the shape (2,) ... (3,)": lambda: update(fd(linear), updates=THREE),
    "ascent must have the structure": lambda: directed(fd, lambda gradient, _: gradient["a"]),
    "fd_gradreg: the direction returned by ascent['a'] ... got (3, 2)": lambda: directed(fd, MASK),
    "adaptive: the gradient must have the structure": lambda: gr.adaptive(two.P, None),
    # parts of a batch
    "penalty_fraction must lie in (0, 1], got 0": lambda: train_step(fd(), penalty_fraction=0),
    "penalty_fraction must lie in ... 1.5": lambda: train_step(fd(), penalty_fraction=1.5),
    "ascent_groups must be a whole number >= 1, got 0": lambda: train_step(fd(), ascent_groups=0),
    "penalty_fraction and ... need a regularizer ... regularizer=": lambda: train_step(
        penalty_fraction=0.5
    ),
    f"penalty_fraction {SHARE} ... (4,) ... ()": lambda: split(NO_AXIS, penalty_fraction=0.5),
    "ascent_groups must ... divide the batch size 4, got 3": lambda: split(ascent_groups=3),
    "microbatched: count must ... divide the batch size 4, got 3": lambda: in_parts(two.BATCH, 3),
    "microbatched: count needs a batch with samples": lambda: in_parts(NO_SAMPLES),
    f"microbatched: count {SHARE}": lambda: in_parts(np.float32(1)),
    f"microbatched: count {SHARE[:-13]}": lambda: in_parts({}),
}
TYPE_ERRORS = {
    "sam: rho must be a real number or a schedule, got 1j": lambda: update(
        gr.sam(loss_fn, rho=lambda step: 1j), batch=BATCH
    ),
    "flooding: level must be a real number or a schedule": lambda: flooding(level=None),
    "gamma must be a number, got a schedule ... gamma=schedule(step)": lambda: by_difference(
        loss_fn, gamma=lambda step: 0.1
    ),
    "relative_gradreg: ... held_out_fn= ... held_out=": lambda: two.updated(
        relative(strength=None)
    ),
    "fd_gradreg: ascent must be a function ... dict": lambda: fd(ascent={"a": True, "b": False}),
    "dbp_value_and_grad: ascent must be a function": lambda: by_product(linear, ascent="momentum"),
    "fd_value_and_grad: ascent must not keep state": lambda: by_difference(linear, ascent=MOMENTUM)(
        PARAMS
    ),
    "dtype int ... have a gradient": lambda: gr.normalized(WHOLE, two.P),
    "adaptive: the parameters ... dtype int ... have a gradient": lambda: gr.adaptive(two.P, WHOLE),
    "updates['a'] must be real, like its parameter": lambda: update(
        fd(linear), updates=PARAMS | {"a": BATCH + 1j}
    ),
    "interval must be a whole number, got a schedule": lambda: fd(interval=lambda step: 2),
    "fd_gradreg: the loss needs 'batch', which is positional-only ... value_fn=": lambda: update(
        fd(lambda params, batch=None, /: 0.0), batch=BATCH
    ),
    "needs 'batches', which is positional-only ... value_fn=": lambda: update(
        fd(starred), batches=BATCH
    ),
    "needs 'batches', which this call does not pass by name": lambda: two.one_step(
        starred, regularizer=fd(starred)
    ),
    "fd_gradreg: the loss needs 'batches', which is positional-only": lambda: two.one_step(
        regularizer=fd(starred)
    ),
    "fd_value_and_grad: with has_aux=True the loss must return (value, aux)": lambda: by_difference(
        linear, has_aux=True
    )(PARAMS),
    "fd_value_and_grad: the parameters has dtype": lambda: by_difference(two.quartic)(
        np.ones(2, np.longdouble)
    ),
    "regularizer must be an Optax transformation, made by": lambda: train_step(gr.fd_gradreg),
    "optimizer must be an Optax transformation ... optimizer=optax.adam(": lambda: (
        gr.make_train_step(two.mean_square, optax.sgd)
    ),
}


@pytest.mark.parametrize("text", VALUE_ERRORS)
def test_a_wrong_value_is_named_with_its_function_and_remedy(text):
    with says(ValueError, *text.split(" ... ")):
        VALUE_ERRORS[text]()


@pytest.mark.parametrize("text", TYPE_ERRORS)
def test_a_wrong_type_is_named_with_its_function_and_remedy(text):
    with says(TypeError, *text.split(" ... ")):
        TYPE_ERRORS[text]()


@families
def test_a_loss_and_parameters_are_needed(function):
    with says(ValueError, f"{function}: update needs a loss", "value_fn="):
        update(make(function))
    must = f"{function}: the loss must be a function of the parameters, got float"
    with says(TypeError, must):
        make(function, 0.1)
    with says(TypeError, must):
        update(make(function), value_fn=0.1)
    needs = f"{function}: update needs the parameters"
    with says(ValueError, needs, "update(grads, state, params)"):
        update(make(function, loss_fn), params=None, batch=BATCH)


@families
def test_a_required_argument_of_the_loss_is_asked_for_by_name(function):
    def needs_more(params, batch, key, *, train):
        return loss_fn(params, batch)

    needs = f"{function}: the loss needs"
    with says(TypeError, f"{needs} 'batch', which update did not receive", "batch=..."):
        update(make(function, loss_fn), batchs=BATCH)
    with says(TypeError, f"{needs} 'key', 'train'", "key=..., train=..."):
        update(make(function, needs_more), batch=BATCH)


@pytest.mark.parametrize("name", ["state", "value", "grad", "value_fn", "updates"])
def test_an_argument_that_update_keeps_for_itself_is_named(name):
    given = {name: 1.0} if name in ("value", "grad") else {}
    losses = [eval(f"lambda params, {name}: 0.0")]
    if given:  # one with a default is not shared with update either
        losses.append(eval(f"lambda params, {name}=2.0: {name} * 1.0"))
    for loss in losses:
        reserved = f"fd_gradreg: the loss needs '{name}', a name that Optax's update reserves"
        with says(TypeError, reserved, "value_fn="):
            update(fd(loss), **given)


@pytest.mark.parametrize("function", FAMILIES[:-1])
def test_parameters_hidden_by_a_wrapper_are_named(function):
    tx = make(function, loss_fn)
    for wrapped in (
        optax.masked(tx, {"a": True, "b": False}),
        optax.partition({"r": tx, "f": optax.set_to_zero()}, {"a": "r", "b": "f"}),
    ):
        hidden = f"{function}: some parameters are hidden (MaskedNode)"
        with says(ValueError, hidden, f"optax.chain({function}(...), optax.masked(tx, mask))"):
            update(wrapped, batch=BATCH)


BAD_LOSSES = {
    "shape (2,). Take its mean or sum": lambda p: p["a"],
    "dtype complex64. Take its real part": lambda p: jnp.sum(p["a"]) + 1j,
    "dtype int32": lambda p: 3,
    "NoneType": lambda p: None,
    "a tuple. If it returns (value, aux), pass has_aux=True": lambda p: (1.0, 1),
}


@pytest.mark.parametrize("got", BAD_LOSSES)
def test_a_loss_that_is_no_real_scalar_is_described(got):
    loss, text = BAD_LOSSES[got], f": the loss must return a real scalar, got {got}"
    calls = {name: lambda name=name: update(make(name, loss)) for name in FAMILIES} | {
        "dbp_gradreg": lambda: update(dbp(has_aux=True), value_fn=loss),
        "fd_value_and_grad": lambda: by_difference(loss)(PARAMS),
        "regularized_loss": lambda: gr.regularized_loss(loss, two.FD)(PARAMS),
        "dbp_value_and_grad": lambda: by_product(loss)(PARAMS),
        "make_train_step": lambda: two.one_step(lambda p, batch: loss({"a": p})),
        "microbatched": lambda: in_parts(two.BATCH, loss=lambda p, batch: loss({"a": p})),
    }
    for function, call in calls.items():
        with says(TypeError, function + text):
            call()


@families
def test_has_aux_that_does_not_fit_is_named(function):
    must = f"{function}: with has_aux=True the loss must return (value, aux), got"
    scalar = "Array" if function == "flooding" else "Tracer"
    outputs = {scalar: linear, "list": lambda p: [1.0, 1], "tuple": lambda p: (1.0, 2, 3)}
    for got, output in outputs.items():
        with says(TypeError, must, got):
            update(make(function, output, has_aux=True))


def test_a_wrong_mask_is_described():
    for mask in ({"a": 1, "b": 0}, {"a": "yes", "b": True}, {"a": np.ones(2), "b": True}):
        with says(TypeError, "masked: the mask must hold bools, got"):
            gr.masked(mask)(PARAMS, PARAMS)
    two_of_three, wide = [True, False], {"a": np.ones(3, bool), "b": True}
    for mask in ({"a": True}, {"a": True, "b": True, "c": True}, two_of_three, wide):
        must = "masked: the mask must be bools in a prefix of the parameters"
        with says(ValueError, must):
            gr.masked(mask)(PARAMS, PARAMS)


def first_derivative_only():
    """A kernel as flash attention is written: a gradient by hand, outside of JAX."""
    out = jax.ShapeDtypeStruct((), jnp.float32)

    @jax.custom_vjp
    def kernel(x):
        return jax.pure_callback(lambda x: np.float32(np.sum(np.cosh(x))), out, x)

    def backward(x, cotangent):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (cotangent * jax.pure_callback(lambda x: np.sinh(np.asarray(x)), shape, x),)

    kernel.defvjp(lambda x: (kernel(x), x), backward)
    return kernel


def test_a_loss_with_first_derivatives_only_has_a_penalty_by_differences():
    params = np.asarray([1.0, -2.0], np.float32)
    _, found = jax.jit(by_difference(first_derivative_only(), gamma=0.2))(params)
    gradient = np.sinh(params)
    expected = gradient + 2 * (np.sinh(params + 0.1 * gradient) - gradient)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("jit", [False, True])
def test_double_backpropagation_says_why_it_cannot_without_second_derivatives(mode, jit):
    kernel, params = first_derivative_only(), jnp.asarray([1.0, -2.0])
    tx = dbp(kernel, mode=mode)
    calls = {
        "dbp_gradreg": lambda p: tx.update(p, tx.init(p), p)[0],
        "dbp_value_and_grad": by_product(kernel, mode=mode),
    }
    for function, call in calls.items():
        must = f"{function}: the loss must have a second derivative"
        with says(TypeError, must, "use fd_gradreg or fd_value_and_grad"):
            (jax.jit(call) if jit else call)(params)


@pytest.mark.parametrize("mode", MODES)
def test_a_mistake_inside_the_loss_shows_as_itself(mode):
    for mistake in (
        lambda p: jnp.sum(p @ jnp.ones((3, 3))),
        lambda p: jnp.sum(p, axis="rows"),
        lambda p: p.no_such_thing,
    ):
        try:
            jax.grad(mistake)(jnp.ones(2))
        except Exception as error:
            kind, text = type(error), str(error)[:40]
        for make in (by_product(mistake, mode=mode), by_difference(mistake)):
            with pytest.raises(kind) as raised:
                make(jnp.ones(2))
            assert str(raised.value).startswith(text)


@families
def test_integer_updates_are_refused_and_not_truncated(function):
    tx = make(function)
    for dtype in (np.int32, np.uint8, np.bool_):
        with says(TypeError, "updates has dtype", "have a gradient"):
            updates = np.ones(2, dtype)
            tx.update(updates, tx.init(two.P), two.P, value=0.0, value_fn=two.quartic)


@pytest.mark.parametrize("kind", ["dict", "tuple", "list", "None"])
def test_a_state_that_came_back_as_something_else_is_named(kind):
    convert = {"dict": lambda state: state._asdict(), "tuple": tuple, "list": list}
    restored = convert.get(kind, lambda state: None)
    several = {name: make(name) for name in FAMILIES} | {"relative_gradreg": gr.relative_gradreg()}
    for name, tx in several.items():
        with says(TypeError, f"{name}: the state must be the", "that init made"):
            state = restored(tx.init(two.P))
            tx.update(two.P, state, two.P, value=1.0, value_fn=two.quartic)
    init, step = gr.make_train_step(two.mean_square, optax.sgd(0.1), two.FD)
    with says(TypeError, "make_train_step: the state must be the TrainState that init made"):
        step(restored(init(two.P)), two.BATCH)


def test_aux_that_cannot_leave_a_program_is_named():
    def loss(params, batch):
        return two.mean_square(params, batch), {"logits": batch @ params, "name": "text"}

    parts = gr.microbatched(loss, 2, has_aux=True)
    for call in (
        lambda: parts(two.P, two.BATCH),
        lambda: jax.grad(parts, has_aux=True)(two.P, two.BATCH),
        lambda: two.one_step(loss, has_aux=True),
        lambda: two.one_step(loss, has_aux=True, ascent_groups=2),
    ):
        with says(TypeError, "aux['name'] must be an array, got str", "arrays only"):
            call()


def test_a_batch_split_over_two_axes_at_once_is_split_over_their_product():
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.sharding.AbstractMesh((2, 3), ("d", "m"), axis_types=explicit)
    for names, devices in {(("d", "m"), None): 6, ("d", "m"): 2, (None, "m"): 1, (): 1}.items():
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
        assert leading_devices(jax.ShapeDtypeStruct((6, 3), BATCH.dtype, sharding=split)) == devices
