"""Arguments are validated early; errors name the function, the value and the remedy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
import two_parameters as two
from gradreg_optax import (
    asam,
    curvature,
    dbp_gradreg,
    dbp_value_and_grad,
    fd_gradreg,
    fd_value_and_grad,
    flooding,
    gradient_norm_penalty,
    make_train_step,
    masked,
    microbatched,
    sam,
)
from gradreg_optax._sharding import leading_devices
from gradreg_optax.curvature import difference_error, hessian_trace, top_hessian_eigenvalue
from two_parameters import says


def loss_fn(params, batch):
    return jnp.sum(params["a"] * batch) + jnp.sum(params["b"] ** 2)


PARAMS = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}
BATCH = np.ones(2, np.float32)
fd = functools.partial(fd_gradreg, gamma=0.1, epsilon=0.1)
dbp = functools.partial(dbp_gradreg, gamma=0.1)


def update(tx, params=PARAMS, **extra_args):
    return tx.update(PARAMS, tx.init(PARAMS), params, **extra_args)


GAMMA = {
    "fd_gradreg": lambda gamma: fd_gradreg(gamma=gamma, epsilon=0.1),
    "dbp_gradreg": lambda gamma: dbp_gradreg(gamma=gamma),
    "gradient_norm_penalty": lambda gamma: gradient_norm_penalty(gamma=gamma, epsilon=0.1),
    "fd_value_and_grad": lambda gamma: fd_value_and_grad(loss_fn, gamma=gamma, epsilon=0.1),
    "dbp_value_and_grad": lambda gamma: dbp_value_and_grad(loss_fn, gamma=gamma),
}
EPSILON = {
    "fd_gradreg": lambda epsilon: fd_gradreg(gamma=0.1, epsilon=epsilon),
    "gradient_norm_penalty": lambda epsilon: gradient_norm_penalty(gamma=0.1, epsilon=epsilon),
    "fd_value_and_grad": lambda epsilon: fd_value_and_grad(loss_fn, gamma=0.1, epsilon=epsilon),
    "difference_error": lambda epsilon: difference_error(lambda p: p**2, jnp.asarray(1.0), epsilon),
}


@pytest.mark.parametrize("function", GAMMA)
@pytest.mark.parametrize(
    "gamma", [-0.5, np.float64(-0.5), jnp.asarray(-0.5), jnp.asarray(-0.5, jnp.bfloat16)]
)
def test_a_negative_gamma_is_refused(function, gamma):
    with says(ValueError, f"{function}: gamma must be finite and >= 0", "-0.5", "negate the loss"):
        GAMMA[function](gamma)


@pytest.mark.parametrize("gamma", [float("nan"), float("inf")])
def test_a_gamma_that_is_no_finite_number_is_refused(gamma):
    with says(ValueError, "fd_gradreg: gamma must be finite", f"got {gamma}"):
        fd_gradreg(gamma=gamma, epsilon=0.1)


LIMIT = {
    "fd_gradreg": "dbp_gradreg",
    "gradient_norm_penalty": "dbp_gradreg(..., ascent=normalized)",
    "fd_value_and_grad": "dbp_value_and_grad",
    "difference_error": "hessian_vector_product",
}


@pytest.mark.parametrize("function", EPSILON)
@pytest.mark.parametrize(
    "epsilon",
    [0, 0.0, -0.25, np.float32(0), np.float32(-0.25), jnp.asarray(-0.25), float("nan"), 1e-60],
)
def test_an_epsilon_that_is_not_positive_is_refused(function, epsilon):
    with says(
        ValueError,
        f"{function}: epsilon must be finite and > 0, got {epsilon}",
        'scheme="backward"',
        LIMIT[function],
    ):
        EPSILON[function](epsilon)


@pytest.mark.parametrize("make", [sam, asam])
@pytest.mark.parametrize("rho", [-0.25, float("nan"), float("inf")])
def test_a_negative_rho_is_refused_with_a_remedy_that_exists(make, rho):
    with says(
        ValueError,
        f"{make.__name__}: rho must be finite and >= 0, got {rho}",
        'gradient_norm_penalty(..., scheme="backward")',
    ):
        make(rho=rho)


def test_concrete_values_are_refused_under_jit_as_well():
    def regularized(params, gamma):
        return fd_value_and_grad(lambda p: jnp.sum(p**2), gamma=-1.0, epsilon=gamma)(params)

    with says(ValueError, "fd_value_and_grad: gamma must be finite and >= 0, got -1"):
        jax.jit(regularized)(jnp.ones(2), 0.1)


def test_a_schedule_is_checked_where_it_is_concrete():
    with says(ValueError, "fd_gradreg: gamma must be finite and >= 0, got -1"):
        update(fd_gradreg(loss_fn, gamma=lambda step: -1.0, epsilon=0.1), batch=BATCH)
    with says(TypeError, "sam: rho must be a real number or a schedule, got 1j"):
        update(sam(loss_fn, rho=lambda step: 1j), batch=BATCH)


def test_scalars_are_scalars():
    for value in (None, "small", 1j, {}):
        with says(TypeError, "fd_gradreg: gamma must be a real number or a schedule, got"):
            fd_gradreg(gamma=value, epsilon=0.1)
    with says(ValueError, "fd_gradreg: epsilon must be a scalar, got shape (2,)", "jax.vmap"):
        fd_gradreg(gamma=0.1, epsilon=[0.1, 0.2])
    with says(TypeError, "flooding: level must be a real number or a schedule, got None"):
        flooding(level=None)
    with says(ValueError, "flooding: value must be a scalar, got shape (3,)"):
        update(flooding(level=0.1), value=jnp.ones(3))
    with says(
        TypeError,
        "fd_value_and_grad: gamma must be a number, got a schedule",
        "gamma=schedule(step)",
    ):
        fd_value_and_grad(loss_fn, gamma=lambda step: 0.1, epsilon=0.1)
    with says(
        TypeError,
        "fd_value_and_grad: epsilon must be a number, got a schedule",
        "epsilon=schedule(step)",
    ):
        fd_value_and_grad(loss_fn, gamma=0.1, epsilon=lambda step: 0.1)


@pytest.mark.parametrize(
    "make", [fd, dbp, functools.partial(sam, rho=0.1), functools.partial(asam, rho=0.1)]
)
@pytest.mark.parametrize("interval", [0, -3, 2.5, float("nan"), float("inf")])
def test_an_interval_is_a_positive_whole_number(make, interval):
    with says(ValueError, ": interval must be a whole number >= 1, got", f"{interval:g}"):
        make(interval=interval)
    with says(TypeError, "interval must be a whole number, got a schedule"):
        make(interval=lambda step: 2)


def test_an_unknown_scheme_or_mode_is_refused_with_the_known_ones():
    for make in (
        lambda scheme: fd(scheme=scheme),
        lambda scheme: gradient_norm_penalty(gamma=0.1, epsilon=0.1, scheme=scheme),
        lambda scheme: fd_value_and_grad(loss_fn, gamma=0.1, epsilon=0.1, scheme=scheme),
        lambda scheme: difference_error(lambda p: p**2, jnp.asarray(1.0), 0.1, scheme),
    ):
        with says(
            ValueError,
            ": scheme must be one of 'forward', 'backward', 'central', got 'centered'",
        ):
            make("centered")
    for make in (
        lambda mode: dbp(mode=mode),
        lambda mode: dbp_value_and_grad(loss_fn, gamma=0.1, mode=mode),
    ):
        with says(
            ValueError,
            ": mode must be one of 'forward_over_reverse', 'reverse_over_reverse', got 'reverse'",
        ):
            make("reverse")


ALL = {
    "fd_gradreg": fd,
    "dbp_gradreg": dbp,
    "sam": functools.partial(sam, rho=0.1),
    "asam": functools.partial(asam, rho=0.1),
    "gradient_norm_penalty": functools.partial(gradient_norm_penalty, gamma=0.1, epsilon=0.1),
    "flooding": functools.partial(flooding, level=0.1),
}


@pytest.mark.parametrize("function", ALL)
def test_a_loss_is_needed_and_must_be_a_function(function):
    with says(ValueError, f"{function}: update needs a loss", "value_fn="):
        update(ALL[function]())
    with says(TypeError, f"{function}: the loss must be a function of the parameters, got float"):
        ALL[function](0.1)
    with says(TypeError, f"{function}: the loss must be a function of the parameters, got float"):
        update(ALL[function](), value_fn=0.1)


@pytest.mark.parametrize("function", ALL)
def test_parameters_are_needed_to_evaluate_a_loss(function):
    with says(
        ValueError, f"{function}: update needs the parameters", "update(grads, state, params)"
    ):
        update(ALL[function](loss_fn), params=None, batch=BATCH)


@pytest.mark.parametrize("function", ALL)
def test_a_required_argument_of_the_loss_is_asked_for_by_name(function):
    tx = ALL[function](loss_fn)
    with says(
        TypeError, f"{function}: the loss needs 'batch', which update did not receive", "batch=..."
    ):
        update(tx, batchs=BATCH)

    def needs_more(params, batch, key, *, train):
        return loss_fn(params, batch)

    with says(TypeError, f"{function}: the loss needs 'key', 'train'", "key=..., train=..."):
        update(ALL[function](needs_more), batch=BATCH)


def test_an_argument_that_update_keeps_for_itself_is_named():
    for name in ("state", "value", "grad", "value_fn", "updates"):
        loss = eval(f"lambda params, {name}: 0.0")
        with says(
            TypeError,
            f"fd_gradreg: the loss needs '{name}', a name that Optax's update reserves",
            "value_fn=",
        ):
            update(fd(loss), **({name: 1.0} if name in ("value", "grad") else {}))
    with says(
        TypeError, "fd_gradreg: the loss needs 'batch', which is positional-only", "value_fn="
    ):
        update(fd(lambda params, batch, /: 0.0), batch=BATCH)


@pytest.mark.parametrize(
    "function", ["fd_gradreg", "dbp_gradreg", "sam", "asam", "gradient_norm_penalty"]
)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"a": True, "b": False}),
        lambda tx: optax.partition({"r": tx, "f": optax.set_to_zero()}, {"a": "r", "b": "f"}),
    ],
)
def test_parameters_hidden_by_a_wrapper_are_named(function, wrap):
    with says(
        ValueError,
        f"{function}: some parameters are hidden (MaskedNode)",
        f"optax.chain({function}(...), optax.masked(tx, mask))",
    ):
        update(wrap(ALL[function](loss_fn)), batch=BATCH)


SCALAR = "the loss must return a real scalar, got"
BAD_LOSSES = {
    f"{SCALAR} shape (2,). Take its mean or sum": lambda p: p["a"],
    f"{SCALAR} shape (1,)": lambda p: p["a"][:1],
    f"{SCALAR} dtype complex64. Take its real part": lambda p: jnp.sum(p["a"]) + 1j,
    f"{SCALAR} dtype int32": lambda p: 3,
    f"{SCALAR} NoneType": lambda p: None,
    f"{SCALAR} list": lambda p: [jnp.sum(p["a"])],
    f"{SCALAR} dict": lambda p: {"loss": jnp.sum(p["a"])},
    f"{SCALAR} str": lambda p: "low",
    f"{SCALAR} a tuple. If it returns (value, aux), pass has_aux=True": lambda p: (1.0, 1),
}


@pytest.mark.parametrize("text", BAD_LOSSES)
def test_a_loss_that_is_no_real_scalar_is_described(text):
    loss = BAD_LOSSES[text]
    for function, make in ALL.items():
        with says(TypeError, f"{function}: {text}"):
            update(make(loss))
        with says(TypeError, f"{function}: {text}"):
            update(make(has_aux=True), value_fn=loss)
    with says(TypeError, f"fd_value_and_grad: {text}"):
        fd_value_and_grad(loss, gamma=0.1, epsilon=0.1)(PARAMS)
    with says(TypeError, f"dbp_value_and_grad: {text}"):
        dbp_value_and_grad(loss, gamma=0.1)(PARAMS)
    init, step = make_train_step(lambda params, batch: loss(params), optax.sgd(0.1))
    with says(TypeError, f"make_train_step: {text}"):
        step(init(PARAMS), BATCH)


def test_has_aux_that_does_not_fit_is_named():
    for function, make in ALL.items():
        for output, got in [
            (lambda p: jnp.sum(p["a"]), "Tracer"),
            (lambda p: [jnp.sum(p["a"]), 1], "list"),
            (lambda p: (1.0, 2, 3), "tuple"),
        ]:
            if function == "flooding" and got == "Tracer":
                got = "Array"
            with says(
                TypeError,
                f"{function}: with has_aux=True the loss must return (value, aux), got",
                got,
            ):
                update(make(output, has_aux=True))
    with says(TypeError, "fd_value_and_grad: with has_aux=True the loss must return (value, aux)"):
        fd_value_and_grad(lambda p: jnp.sum(p["a"]), gamma=0.1, epsilon=0.1, has_aux=True)(PARAMS)
    with says(TypeError, "fd_value_and_grad: the loss must return a real scalar, got shape (2,)"):
        fd_value_and_grad(lambda p: (p["a"], None), gamma=0.1, epsilon=0.1, has_aux=True)(PARAMS)


def test_updates_and_directions_must_be_shaped_like_the_parameters():
    tx = fd(lambda p: jnp.sum(p["a"]))
    with says(ValueError, "fd_gradreg: updates must have the structure of the parameters"):
        tx.update({"a": BATCH}, tx.init(PARAMS), PARAMS)
    with says(
        ValueError, "fd_gradreg: updates['a'] must have the shape (2,) of its parameter, got (3,)"
    ):
        tx.update({"a": np.ones(3), "b": np.ones(3)}, tx.init(PARAMS), PARAMS)
    with says(
        ValueError,
        "fd_gradreg: the direction returned by ascent must have the structure of the parameters",
    ):
        update(fd(lambda p: jnp.sum(p["a"]), ascent=lambda gradient, params: gradient["a"]))
    with says(ValueError, "dbp_gradreg: the direction returned by ascent['b'] must have", "got ()"):
        update(
            dbp(
                lambda p: jnp.sum(p["a"]),
                ascent=lambda gradient, params: gradient | {"b": jnp.asarray(1.0)},
            )
        )
    with says(
        TypeError,
        "fd_gradreg: ascent must be a function (gradient, params) -> direction, got dict",
        "ascent=masked(mask)",
    ):
        fd(ascent={"a": True, "b": False})


def test_a_wrong_mask_is_described():
    for mask in ({"a": 1, "b": 0}, {"a": "yes", "b": True}, {"a": np.ones(2), "b": True}):
        with says(TypeError, "masked: the mask must hold bools, got"):
            masked(mask)(PARAMS, PARAMS)
    for mask in (
        {"a": True},
        {"a": True, "b": True, "c": True},
        [True, False],
        {"a": np.ones(3, bool), "b": True},
    ):
        with says(
            ValueError,
            "masked: the mask must be a tree of bools that is a prefix of the parameters",
        ):
            masked(mask)(PARAMS, PARAMS)
    with says(
        ValueError, "fd_gradreg: the direction returned by ascent['a'] must have", "got (3, 2)"
    ):
        update(
            fd(lambda p: jnp.sum(p["a"]), ascent=masked({"a": jnp.ones((3, 1), bool), "b": True}))
        )


def test_train_steps_refuse_what_cannot_be_split():
    for fraction in (0, -0.5, 1.5, float("nan")):
        with says(
            ValueError, f"make_train_step: penalty_fraction must lie in (0, 1], got {fraction}"
        ):
            make_train_step(loss_fn, optax.sgd(0.1), fd(), penalty_fraction=fraction)
    for groups in (0, -1, 1.5):
        with says(
            ValueError, f"make_train_step: ascent_groups must be a whole number >= 1, got {groups}"
        ):
            make_train_step(loss_fn, optax.sgd(0.1), fd(), ascent_groups=groups)
    for split in ({"penalty_fraction": 0.5}, {"ascent_groups": 2}):
        with says(
            ValueError,
            "make_train_step: penalty_fraction and ascent_groups need a regularizer",
            "regularizer=",
        ):
            make_train_step(loss_fn, optax.sgd(0.1), **split)
        init, step = make_train_step(
            lambda params, batch: jnp.sum(params["a"]), optax.sgd(0.1), fd(), **split
        )
        with says(
            ValueError,
            f"make_train_step: {next(iter(split))} needs a batch whose leaves share their leading"
            " axis",
            "(4,)",
            "()",
        ):
            step(init(PARAMS), (np.ones(4), 1.0))
    init, step = make_train_step(loss_fn, optax.sgd(0.1), fd(), ascent_groups=3)
    with says(
        ValueError,
        "make_train_step: ascent_groups must be at least 1 and divide the batch size 4, got 3",
    ):
        step(init(PARAMS), np.ones(4))
    with says(
        ValueError, "microbatched: count must be at least 1 and divide the batch size 4, got 3"
    ):
        microbatched(lambda params, batch: jnp.sum(params["a"]), 3)(PARAMS, np.ones(4))


def test_curvature_refuses_estimates_without_error():
    with says(ValueError, "hessian_trace: num_samples must be a whole number >= 2, got 1"):
        hessian_trace(lambda p: p**2, jnp.asarray(1.0), jax.random.key(0), num_samples=1)
    with says(ValueError, "top_hessian_eigenvalue: num_matvecs must be a whole number >= 1, got 0"):
        top_hessian_eigenvalue(lambda p: p**2, jnp.asarray(1.0), jax.random.key(0), num_matvecs=0)


def first_derivative_only():
    """A kernel as flash attention is written: a gradient by hand, outside of JAX."""
    out = jax.ShapeDtypeStruct((), jnp.float32)

    @jax.custom_vjp
    def kernel(x):
        return jax.pure_callback(lambda x: np.float32(np.sum(np.cosh(x))), out, x)

    def backward(x, cotangent):
        return (
            cotangent
            * jax.pure_callback(
                lambda x: np.sinh(np.asarray(x)), jax.ShapeDtypeStruct(x.shape, x.dtype), x
            ),
        )

    kernel.defvjp(lambda x: (kernel(x), x), backward)
    return kernel


def test_a_loss_with_first_derivatives_only_trains_by_differences():
    kernel = first_derivative_only()
    init, step = make_train_step(
        lambda params, batch: kernel(params * batch),
        optax.sgd(0.1),
        fd_gradreg(gamma=0.2, epsilon=0.1),
    )
    state = init(jnp.asarray([1.0, -2.0]))
    for _ in range(20):
        state, info = step(state, np.ones(2, np.float32))
    assert float(info.loss) < 2.01  # the minimum of the sum of two cosh is 2


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
@pytest.mark.parametrize("jit", [False, True])
def test_double_backpropagation_says_why_it_cannot_without_second_derivatives(mode, jit):
    kernel, params = first_derivative_only(), jnp.asarray([1.0, -2.0])
    tx = dbp_gradreg(kernel, gamma=0.1, mode=mode)
    calls = {
        "dbp_gradreg": lambda p: tx.update(p, tx.init(p), p)[0],
        "dbp_value_and_grad": dbp_value_and_grad(kernel, gamma=0.1, mode=mode),
    }
    for function, call in calls.items():
        with says(
            TypeError,
            f"{function}: the loss must have a second derivative",
            "use fd_gradreg or fd_value_and_grad",
        ):
            (jax.jit(call) if jit else call)(params)


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
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
        for make in (
            dbp_value_and_grad(mistake, gamma=0.1, mode=mode),
            fd_value_and_grad(mistake, gamma=0.1, epsilon=0.1),
        ):
            with says(kind, text):
                make(jnp.ones(2))


def test_the_name_in_a_sentence_is_that_of_the_function_that_was_called():
    with says(TypeError, "microbatched: the loss must return a real scalar, got shape (2,)"):
        gr.microbatched(lambda p, b: b @ p, 2)(two.P, two.BATCH)
    for batch in (jnp.float32(1), {"x": jnp.float32(1), "y": jnp.float32(2)}, {}):
        with says(ValueError, "microbatched: count needs a batch whose leaves share"):
            gr.microbatched(two.mean_square, 2)(two.P, batch)
    with says(ValueError, "microbatched: count needs a batch with samples"):
        gr.microbatched(two.mean_square, 2)(two.P, two.BATCH[:0])


def test_a_longdouble_leaf_is_named():
    with says(TypeError, "fd_value_and_grad: the parameters has dtype"):
        gr.fd_value_and_grad(two.quartic, **two.PENALTY)(np.ones(2, np.longdouble))


def test_integer_updates_are_refused_and_not_truncated():
    for tx in (two.FD, gr.sam(rho=0.1), gr.flooding(level=0.1), gr.dbp_gradreg(gamma=0.1)):
        for dtype in (jnp.int32, jnp.uint8, jnp.bool_):
            updates = jnp.ones(2, dtype)
            with says(TypeError, "updates has dtype", "have a gradient"):
                tx.update(updates, tx.init(two.P), two.P, value=0.0, value_fn=two.quartic)


def test_what_should_be_a_transformation_or_a_loss_is_named():
    with says(TypeError, "make_train_step: the loss must be a function", "NoneType"):
        gr.make_train_step(None, optax.sgd(0.1))
    with says(TypeError, "regularizer must be an Optax transformation, made by calling it"):
        gr.make_train_step(two.mean_square, optax.sgd(0.1), gr.fd_gradreg)
    with says(TypeError, "optimizer must be an Optax transformation", "optimizer=optax.adam("):
        gr.make_train_step(two.mean_square, optax.sgd)
    with says(ValueError, "flooding: level must be a number, got nan"):
        gr.flooding(level=float("nan"))
    with says(ValueError, "by ascent must have the shape (2,) of its parameter, got ()"):
        two.updated(gr.fd_gradreg(**two.PENALTY, ascent=lambda gradient, params: 1.0))
    with says(ValueError, "product: vector must have the shape (2,) of its parameter, got (3,)"):
        curvature.hessian_vector_product(two.quartic, two.P, jnp.ones(3))


STATES = {
    "dict": lambda state: state._asdict(),
    "tuple": lambda state: tuple(state),
    "list": lambda state: list(state),
    "None": lambda state: None,
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_came_back_as_something_else_is_named(kind):
    for name, tx in {
        "fd_gradreg": two.FD,
        "dbp_gradreg": gr.dbp_gradreg(gamma=0.1),
        "sam": gr.sam(rho=0.1, interval=2),
        "flooding": gr.flooding(level=0.1),
        "relative_gradreg": gr.relative_gradreg(),
    }.items():
        state = STATES[kind](tx.init(two.P))
        with says(TypeError, f"{name}: the state must be the", "that init made"):
            tx.update(two.P, state, two.P, value=1.0, value_fn=two.quartic)
    init, step = gr.make_train_step(two.mean_square, optax.sgd(0.1), two.FD)
    with says(TypeError, "make_train_step: the state must be the TrainState that init made"):
        step(STATES[kind](init(two.P)), two.BATCH)


def test_aux_that_cannot_leave_a_program_is_named():
    def loss(params, batch):
        return two.mean_square(params, batch), {"logits": batch @ params, "name": "text"}

    for call in (
        lambda: gr.microbatched(loss, 2, has_aux=True)(two.P, two.BATCH),
        lambda: jax.grad(gr.microbatched(loss, 2, has_aux=True), has_aux=True)(two.P, two.BATCH),
        lambda: two.one_step(loss, has_aux=True),
        lambda: two.one_step(loss, has_aux=True, ascent_groups=2),
    ):
        with says(TypeError, "aux['name'] must be an array, got str", "arrays only"):
            call()


def test_a_batch_without_samples_is_refused_where_it_is_split():
    for split in ({"ascent_groups": 2}, {"penalty_fraction": 0.5}):
        with says(ValueError, f"{next(iter(split))} needs a batch with samples"):
            two.one_step(batch=two.BATCH[:0], **split)


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
def test_a_mistake_in_the_loss_is_not_taken_for_a_missing_second_derivative(mode):
    def loss(params):
        raise ValueError("the mistake of the loss itself")

    with pytest.raises(ValueError, match=r"^the mistake of the loss itself"):
        gr.dbp_value_and_grad(loss, gamma=0.1, mode=mode)(two.P)


def test_a_batch_split_over_two_axes_at_once_is_split_over_their_product():
    mesh = jax.make_mesh(
        (1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    spec = jax.sharding.PartitionSpec
    for one in (spec(("data", "model"), None), spec("data", "model"), spec(None, "model"), spec()):
        with jax.set_mesh(mesh):
            batch = jax.device_put(two.BATCH, jax.sharding.NamedSharding(mesh, one))
            assert leading_devices(batch) == 1
