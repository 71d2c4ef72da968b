"""The same numbers under every strict mode of JAX, through every public entry point."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
from gradreg_optax import curvature

PARAMS = {
    "kernel": np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(3, 4),
    "out": np.linspace(0.5, 1.0, 4, dtype=np.float32),
}
BATCH = np.sin(np.arange(24, dtype=np.float32)).reshape(8, 3)
KEY = np.asarray([0, 1], np.uint32)


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["kernel"]) @ params["out"] - 1.0) ** 2)


def closed(params):
    return loss_fn(params, BATCH)


def updates_of(tx):
    """Two updates at the same parameters, of which with ``interval=2`` only one is due."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    value, gradient = jax.value_and_grad(closed)(params)
    extra = {"value": value, "value_fn": closed, "held_out_fn": lambda p: loss_fn(p, -BATCH)}
    state, results = tx.init(params), []
    for _ in range(2):
        updates, state = tx.update(gradient, state, params, **extra)
        results.append(updates)
    return results


def steps(**options):
    init, step = gr.make_train_step(loss_fn, optax.sgd(0.1), donate=False, **options)
    state, _ = step(init(PARAMS), BATCH)
    state, info = step(state, BATCH)
    return state.params, info.loss


FD = {"gamma": 0.1, "epsilon": 0.1}
LAZY = {"interval": 2, "start": 1}
SCHEDULE = {"gamma": lambda step: 0.1 / (1.0 + step.astype(jnp.float32)), "epsilon": 0.1}
NUMPY = {"gamma": np.float64(0.1), "epsilon": np.float32(0.1), "interval": np.int64(2)}
REVERSE = {"mode": "reverse_over_reverse", "interval": 2}
TRANSFORMATIONS = {
    "forward": lambda: gr.fd_gradreg(**FD),
    "backward": lambda: gr.fd_gradreg(**FD, scheme="backward"),
    "central, lazy": lambda: gr.fd_gradreg(**FD, scheme="central", **LAZY),
    "schedule": lambda: gr.fd_gradreg(**SCHEDULE),
    "numpy scalars": lambda: gr.fd_gradreg(**NUMPY),
    "masked": lambda: gr.fd_gradreg(**FD, ascent=gr.masked({"kernel": True, "out": False})),
    "momentum": lambda: gr.fd_gradreg(**FD, ascent=optax.trace(0.9)),
    "dbp": lambda: gr.dbp_gradreg(gamma=0.1),
    "dbp, reverse, lazy": lambda: gr.dbp_gradreg(gamma=0.1, **REVERSE),
    "asam, lazy": lambda: gr.asam(rho=0.1, interval=2),
    "gnp": lambda: gr.gradient_norm_penalty(**FD),
    "flooding": lambda: gr.flooding(level=10.0),
    "relative": lambda: gr.relative_gradreg(),
    "self-tuned": lambda: gr.relative_gradreg(strength=None),
}
USES = {
    **{name: lambda make=make: updates_of(make()) for name, make in TRANSFORMATIONS.items()},
    "fd function": lambda: gr.fd_value_and_grad(loss_fn, **FD)(PARAMS, BATCH),
    "dbp function": lambda: gr.dbp_value_and_grad(loss_fn, gamma=0.1)(PARAMS, BATCH),
    "regularized loss": lambda: jax.value_and_grad(gr.regularized_loss(loss_fn, gr.sam(rho=0.1)))(
        PARAMS, BATCH
    ),
    "micro-batches": lambda: jax.value_and_grad(gr.microbatched(loss_fn, 4))(PARAMS, BATCH),
    "train step": lambda: steps(regularizer=gr.sam(rho=0.1)),
    "lazy on a part": lambda: steps(
        regularizer=gr.fd_gradreg(**FD, interval=2), penalty_fraction=0.25
    ),
    "groups": lambda: steps(regularizer=gr.fd_gradreg(**FD), ascent_groups=2),
    "eigenvalue": lambda: curvature.top_hessian_eigenvalue(closed, PARAMS, KEY).value,
    "trace": lambda: curvature.hessian_trace(closed, PARAMS, KEY, num_samples=4),
    "product": lambda: curvature.hessian_vector_product(closed, PARAMS, PARAMS),
    "sharpness": lambda: curvature.perturbed_sharpness(closed, PARAMS, 0.1),
    "norm": lambda: curvature.gradient_norm(closed, PARAMS),
    "difference": lambda: curvature.difference_error(closed, PARAMS, 0.1),
    "scale": lambda: curvature.penalty_scale(loss_fn, PARAMS, BATCH, penalty_fraction=0.5),
}
MODES = {
    "promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "nans": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
    "leaks": lambda: jax.checking_leaks(),
    "no jit": lambda: jax.disable_jit(),
    "x64 switched on late": lambda: jax.enable_x64(True),
}


@contextlib.contextmanager
def switched_on(*modes):
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(MODES[mode]())
        yield


def traced():
    """All uses as one program."""
    return jax.jit(lambda: {name: use() for name, use in USES.items()}).trace()


@pytest.fixture(scope="module")
def strict():
    """(the program, what it returns) in the strict modes; ranks are never promoted here."""
    with switched_on("promotion", "nans", "infs", "leaks"):
        program = traced()
        return program.jaxpr, program.lower().compile()()


def test_every_use_is_the_same_program_in_the_strict_modes_together(strict):
    plain, (program, _) = traced().jaxpr, strict
    without_addresses = [re.sub(r"0x\w+", "", str(x.jaxpr)) for x in (plain, program)]
    assert without_addresses[0] == without_addresses[1]
    for a, b in zip(plain.consts, program.consts, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same(found, expected, dtypes=True):
    for name, results in found.items():
        for a, b in zip(*map(jax.tree.leaves, (results, expected[name])), strict=True):
            # float32, one gradient divided by epsilon, summed in another order
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=name)
            assert not dtypes or jnp.asarray(a).dtype == b.dtype


def test_without_jit_no_operation_returns_nan_or_infinity(strict):
    with switched_on("nans", "infs"):
        assert_same({name: USES[name]() for name in ("gnp", "self-tuned")}, strict[1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_use_gives_the_same_numbers_in_every_strict_mode(strict, mode):
    late = mode == "x64 switched on late"  # a state of default floats, and other random signs
    uses = [name for name in USES if not (late and name in ("self-tuned", "trace"))]
    with switched_on(mode):
        found = {name: USES[name]() for name in uses}
    assert_same(found, strict[1], dtypes=not late)
