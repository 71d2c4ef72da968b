"""Convolutions under conditionals and loops: the same values, and never XLA's slow path on a
CPU."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradreg_optax import curvature, dbp_gradreg, fd_gradreg, make_train_step, microbatched
from gradreg_optax._convolutions import canonical_convolutions
from problems import convolve, flat

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the slow path is the CPU backend's"
)

PARAMS = {
    "first": jnp.linspace(-1.0, 1.0, 3 * 3 * 2 * 8).reshape(3, 3, 2, 8),
    "second": jnp.linspace(1.0, -1.0, 9 * 64).reshape(3, 3, 8, 8),
}
BATCH = jnp.sin(jnp.arange(8 * 6 * 6 * 2.0)).reshape(8, 6, 6, 2)


def loss_fn(params, batch):
    hidden = jnp.tanh(convolve(batch, params["first"]))
    return jnp.mean(jnp.tanh(convolve(hidden, params["second"])) ** 2)


def compiled(fun, *args):
    return (fun if hasattr(fun, "lower") else jax.jit(fun)).lower(*args).compile()


def orders(program):
    """The orders of dimensions of all convolutions in a compiled program."""
    return set(re.findall(r" convolution\(.*dim_labels=([\w>-]+)", program.as_text()))


CASES = [  # orders of the input, of the kernel and of the output; options
    (("CNW", "WOI", "WNC"), {"window_strides": (2,)}),
    (("HNCW", "OHWI", "CWNH"), {"rhs_dilation": (1, 2), "feature_group_count": 2}),
    (("DNHCW", "IDHOW", "CDWNH"), {"lhs_dilation": (2, 1, 2), "batch_group_count": 2}),
]


@pytest.mark.parametrize(("numbers", "options"), CASES)
def test_values_and_derivatives_are_those_of_the_convolution(x64, numbers, options):
    """Of one to three dimensions, with stride, padding, dilations and groups."""
    lengths = {"N": 4, "C": 4, "D": 4, "H": 5, "W": 6}
    windows = {"O": 6, "I": 4 // options.get("feature_group_count", 1), "D": 1, "H": 2, "W": 3}
    rank, rng = len(numbers[0]) - 2, np.random.default_rng(0)
    options = {"window_strides": (1,) * rank, "padding": [(1, 2)] * rank} | options
    pairs = zip(numbers[:2], (lengths, windows), strict=True)
    operands = [rng.normal(size=[sizes[axis] for axis in order]) for order, sizes in pairs]

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)

    def value_and_derivatives(fun):
        value, pull_back = jax.vjp(fun, *operands)
        return value, pull_back(value)

    several = canonical_convolutions(convolution), convolution
    found, expected = jax.jit(lambda: [value_and_derivatives(fun) for fun in several])()
    scale = np.abs(flat(expected)).max()
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-10, atol=1e-10 * scale)
    assert [x.shape for x in jax.tree.leaves(found)] == [x.shape for x in jax.tree.leaves(expected)]


def step_of(regularizer, loss=loss_fn):
    init, step = make_train_step(loss, optax.sgd(0.1), regularizer)
    return compiled(step, init(PARAMS), BATCH)


def eigenvalue(params, batch):
    value_fn = functools.partial(loss_fn, batch=batch)
    return curvature.top_hessian_eigenvalue(value_fn, params, jax.random.key(0), num_matvecs=3)


LAZY = {"gamma": 0.1, "interval": 4}
PROGRAMS = {
    "lazy product": lambda: step_of(dbp_gradreg(**LAZY)),
    "lazy, in parts": lambda: step_of(fd_gradreg(epsilon=0.1, **LAZY), microbatched(loss_fn, 4)),
    "eigenvalue": lambda: compiled(eigenvalue, PARAMS, BATCH),
}


@on_cpu
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_convolution_has_the_order_of_the_fast_kernel(program):
    assert orders(PROGRAMS[program]()) == {"b01f_01io->b01f"}


def in_a_scan(fun, params, batch):
    return jax.lax.scan(lambda p, _: (fun(p, batch), None), params, length=3)[0]


def in_a_loop(fun, params, batch):
    count = jnp.where(jnp.sum(batch) > 0, 2, 3)  # unknown: no scan
    return jax.lax.fori_loop(0, count, lambda _, p: fun(p, batch), params)


def in_a_branch(fun, params, batch):
    return jax.lax.cond(jnp.sum(batch) > 0, lambda: fun(params, batch), lambda: params)


@on_cpu
def test_every_depth_is_reached():
    """In a scan, in a loop, in a branch and in a program of its own."""

    def plain(params, batch):
        gradient = jax.grad(jax.checkpoint(loss_fn))
        places = in_a_scan, in_a_loop, in_a_branch
        nested = in_a_scan(jax.jit(gradient), params, batch)
        return [nested, *(place(gradient, params, batch) for place in places)]

    expected = compiled(plain, PARAMS, BATCH)
    found = compiled(canonical_convolutions(plain), PARAMS, BATCH)
    assert len(orders(expected)) > 1, "XLA has learnt to do this itself: the module can go"
    assert orders(found) == {"b01f_01io->b01f"}
    results = (flat(program(PARAMS, BATCH)) for program in (found, expected))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_other_platforms_get_the_convolutions_as_they_are():
    def labels(fun, platform):
        module = jax.export.export(jax.jit(fun), platforms=[platform])(PARAMS, BATCH).mlir_module()
        return sorted(re.findall(r"dim_numbers = (.*?), window", module))

    gradient = jax.grad(loss_fn)
    assert labels(canonical_convolutions(gradient), "cuda") == labels(gradient, "cuda")
    assert labels(canonical_convolutions(gradient), "cpu") != labels(gradient, "cpu")


def test_what_is_shared_is_compiled_once():
    @jax.jit
    def block(x, kernel):
        return jnp.tanh(convolve(x, kernel))

    def many(x, kernel):
        for _ in range(5):
            x = block(x, kernel)
        return x

    program = jax.jit(canonical_convolutions(many)).lower(jnp.ones((1, 4, 4, 8)), PARAMS["second"])
    assert program.as_text().count("stablehlo.convolution") == 1


def test_under_shard_map():
    automatic = (jax.sharding.AxisType.Auto,)
    mesh, spec = jax.make_mesh((1,), ("data",), axis_types=automatic), jax.sharding.PartitionSpec

    def sharded(fun):
        return jax.shard_map(fun, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())

    def gradient(params, batch):
        return jax.grad(lambda p: jax.lax.pmean(loss_fn(p, batch), "data"))(params)

    inside = sharded(canonical_convolutions(gradient))
    outside = canonical_convolutions(sharded(gradient))
    expected = jax.jit(jax.grad(loss_fn))(PARAMS, BATCH)
    for found in (inside, outside):
        trees = jax.jit(found)(PARAMS, BATCH), expected
        np.testing.assert_allclose(*map(flat, trees), rtol=1e-5, atol=1e-7)


def test_with_jit_disabled_the_function_is_called_as_it_is():
    gradient = canonical_convolutions(jax.grad(loss_fn))
    expected = jax.jit(gradient)(PARAMS, BATCH)
    with jax.disable_jit():
        found = gradient(PARAMS, BATCH)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-4, atol=1e-6)
