"""The problem that the core tests share: a small network, its batches, the penalty written by hand,
and each family of regularizers once as a transformation and once as a gradient function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax import (
    adaptive,
    asam,
    dbp_gradreg,
    dbp_value_and_grad,
    fd_gradreg,
    fd_value_and_grad,
    gradient_norm_penalty,
    normalized,
    sam,
)


def loss_fn(params, batch, shift=0.0, scale=1.0):
    hidden = jnp.tanh(batch["x"] @ params["kernel"])
    return scale * jnp.mean((hidden @ params["out"] - batch["y"] - shift) ** 2)


def batch_of(seed=0, size=8):
    rng = np.random.default_rng(seed)
    return {"x": jnp.asarray(rng.normal(size=(size, 3))), "y": jnp.asarray(rng.normal(size=size))}


def params_of(seed=1, dtype=None):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=(3, 4)), dtype),
        "out": jnp.asarray(rng.normal(size=4), dtype),
    }


def convolve(x, kernel):
    order = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=order)


def add(a, b, scale=1.0):
    return jax.tree.map(lambda x, y: x + scale * y, a, b)


def correction(params, batch, gamma=0.3, epsilon=0.2, **kwargs):
    """``gamma / epsilon (g' - g)``."""
    gradient = jax.grad(loss_fn)(params, batch, **kwargs)
    ahead = jax.grad(loss_fn)(add(params, gradient, epsilon), batch, **kwargs)
    return jax.tree.map(lambda a, g: gamma / epsilon * (a - g), ahead, gradient)


def regularized(params, batch, gamma=0.3, epsilon=0.2, **kwargs):
    """``g + gamma / epsilon (g' - g)``."""
    gradient = jax.grad(loss_fn)(params, batch, **kwargs)
    return add(gradient, correction(params, batch, gamma, epsilon, **kwargs))


def update_of(tx, gradient, params, state=None, **extra_args):
    """What the transformation makes of ``gradient``, in its first step where no state is given."""
    return tx.update(gradient, tx.init(params) if state is None else state, params, **extra_args)[0]


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def relative_error(tree, expected):
    return float(optax.tree.norm(optax.tree.sub(tree, expected)) / optax.tree.norm(expected))


SCHEMES = ("forward", "backward", "central")
MODES = ("forward_over_reverse", "reverse_over_reverse")
FD = {"gamma": 0.3, "epsilon": 0.2}
REGULARIZERS = {
    **{f"fd {s}": functools.partial(fd_gradreg, **FD, scheme=s) for s in SCHEMES},
    **{f"dbp {m}": functools.partial(dbp_gradreg, gamma=0.3, mode=m) for m in MODES},
    "sam": functools.partial(sam, rho=0.2),
    "asam": functools.partial(asam, rho=0.2),
    "gnp": functools.partial(gradient_norm_penalty, **FD),
}
GRADIENT_FUNCTIONS = {
    **{f"fd {s}": functools.partial(fd_value_and_grad, **FD, scheme=s) for s in SCHEMES},
    **{f"dbp {m}": functools.partial(dbp_value_and_grad, gamma=0.3, mode=m) for m in MODES},
    "sam": functools.partial(fd_value_and_grad, gamma=0.2, epsilon=0.2, ascent=normalized),
    "asam": functools.partial(fd_value_and_grad, gamma=0.2, epsilon=0.2, ascent=adaptive),
    "gnp": functools.partial(fd_value_and_grad, **FD, ascent=normalized),
}
# gradients beyond the incoming one, as the paper counts; the first half of a Hessian-vector product
# is one
EXTRA_GRADIENTS = dict.fromkeys(REGULARIZERS, 1) | {"fd central": 2}
