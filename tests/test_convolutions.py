"""Convolutions under conditionals and loops: the same values, and never XLA's slow path on a
CPU."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax import (
    curvature,
    dbp_gradreg,
    fd_gradreg,
    make_train_step,
    microbatched,
)
from gradreg_optax._convolutions import canonical_convolutions

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the slow path is the CPU backend's"
)

PARAMS = {
    "first": jnp.linspace(-1.0, 1.0, 3 * 3 * 2 * 8).reshape(3, 3, 2, 8),
    "second": jnp.linspace(1.0, -1.0, 9 * 64).reshape(3, 3, 8, 8),
}
BATCH = jnp.sin(jnp.arange(8 * 6 * 6 * 2.0)).reshape(8, 6, 6, 2)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean(
        jnp.tanh(convolve(jnp.tanh(convolve(batch, params["first"])), params["second"])) ** 2
    )


def compiled(fun: Callable[..., Any], *args: Any) -> Any:
    return (fun if hasattr(fun, "lower") else jax.jit(fun)).lower(*args).compile()


def orders(program: Any) -> set[str]:
    """The orders of dimensions of all convolutions in a compiled program."""
    return set(re.findall(r" convolution\(.*dim_labels=([\w>-]+)", program.as_text()))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Callable[..., jax.Array], tuple[jax.Array, jax.Array]]:
    """A convolution of one to three dimensions in any order, with stride, dilation, padding and
    groups, and its operands."""
    rank = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([{}, {"feature_group_count": 2}, {"batch_group_count": 2}]))
    space = "DHW"[-rank:]
    lhs, rhs, out = (
        "".join(draw(st.permutations(letters + space))) for letters in ("NC", "OI", "NC")
    )

    def lengths(least: int, most: int) -> Any:
        return st.lists(st.integers(least, most), min_size=rank, max_size=rank)

    sizes = dict(zip(space, draw(lengths(4, 6)), strict=True))
    windows = dict(zip(space, draw(lengths(1, 3)), strict=True))
    sizes |= {"N": 4, "C": 4}
    windows |= {"O": 6, "I": 4 // groups.get("feature_group_count", 1)}
    per_axis = ("window_strides", "lhs_dilation", "rhs_dilation")
    options: Any = {name: tuple(draw(lengths(1, 2))) for name in per_axis}
    options["padding"] = list(zip(draw(lengths(0, 2)), draw(lengths(0, 2)), strict=True))
    rng = np.random.default_rng(draw(st.integers(0, 100)))
    operands = (
        jnp.asarray(rng.normal(size=[sizes[c] for c in lhs])),
        jnp.asarray(rng.normal(size=[windows[c] for c in rhs])),
    )
    return lambda x, k: jax.lax.conv_general_dilated(
        x, k, dimension_numbers=(lhs, rhs, out), **options, **groups
    ), operands


@given(convolutions())
@pytest.mark.slow
def test_values_and_derivatives_are_those_of_the_convolution(case: Any) -> None:
    with jax.enable_x64(True):
        fun, operands = case
        operands = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), operands)

        @functools.partial(jax.value_and_grad, argnums=(1, 2), has_aux=True)
        def energy(
            fun: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            out = fun(x, kernel)
            return jnp.sum(out**2), out

        both = jax.jit(
            lambda *operands: [energy(f, *operands) for f in (canonical_convolutions(fun), fun)]
        )
        for a, b in zip(*map(jax.tree.leaves, both(*operands)), strict=True):
            np.testing.assert_allclose(
                a, b, rtol=1e-10, atol=1e-10 * float(jnp.max(jnp.abs(b), initial=0))
            )


def step_of(regularizer: Any, loss: Callable[..., Any] = loss_fn) -> Any:
    init, step = make_train_step(loss, optax.sgd(0.1), regularizer)
    return compiled(step, init(PARAMS), BATCH)


def eigenvalue(params: Any, batch: jax.Array) -> Any:
    key = jax.random.key(0)
    value_fn = functools.partial(loss_fn, batch=batch)
    return curvature.top_hessian_eigenvalue(value_fn, params, key, num_matvecs=3)


LAZY = {"gamma": 0.1, "interval": 4}
PROGRAMS = {
    "lazy product": lambda: step_of(dbp_gradreg(**LAZY)),
    "lazy, in micro-batches": lambda: step_of(
        fd_gradreg(epsilon=0.1, **LAZY), microbatched(loss_fn, 4)
    ),
    "eigenvalue": lambda: compiled(eigenvalue, PARAMS, BATCH),
}


@on_cpu
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_convolution_has_the_order_of_the_fast_kernel(program: str) -> None:
    assert orders(PROGRAMS[program]()) == {"b01f_01io->b01f"}


def in_a_scan(fun: Callable[..., Any], params: Any, batch: jax.Array) -> Any:
    return jax.lax.scan(lambda p, _: (fun(p, batch), None), params, length=3)[0]


def in_a_loop(fun: Callable[..., Any], params: Any, batch: jax.Array) -> Any:
    return jax.lax.while_loop(
        lambda p: jnp.max(p["first"]) > 0.5,
        lambda p: jax.tree.map(lambda x: x / 2, fun(p, batch)),
        params,
    )


def in_a_branch(fun: Callable[..., Any], params: Any, batch: jax.Array) -> Any:
    return jax.lax.cond(jnp.sum(batch) > 0, lambda: fun(params, batch), lambda: params)


@on_cpu
def test_every_depth_is_reached() -> None:
    """In a scan, in a loop, in a branch and in a program of its own."""

    def plain(params: Any, batch: jax.Array) -> Any:
        gradient = jax.grad(jax.checkpoint(loss_fn))
        places = in_a_scan, in_a_loop, in_a_branch
        nested = in_a_scan(jax.jit(gradient), params, batch)
        return [nested, *(place(gradient, params, batch) for place in places)]

    expected = compiled(plain, PARAMS, BATCH)
    found = compiled(canonical_convolutions(plain), PARAMS, BATCH)
    assert len(orders(expected)) > 1, "XLA has learnt to do this itself: the module can go"
    assert orders(found) == {"b01f_01io->b01f"}
    results = (program(PARAMS, BATCH) for program in (found, expected))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_other_platforms_get_the_convolutions_as_they_are() -> None:
    def labels(fun: Callable[..., Any], platform: str) -> list[str]:
        module = jax.export.export(jax.jit(fun), platforms=[platform])(PARAMS, BATCH).mlir_module()
        return sorted(re.findall(r"dim_numbers = (.*?), window", module))

    gradient = jax.grad(loss_fn)
    assert labels(canonical_convolutions(gradient), "cuda") == labels(gradient, "cuda")
    assert labels(canonical_convolutions(gradient), "cpu") != labels(gradient, "cpu")


def test_what_is_shared_is_compiled_once() -> None:
    @jax.jit
    def block(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.tanh(convolve(x, kernel))

    def many(x: jax.Array, kernel: jax.Array) -> jax.Array:
        for _ in range(5):
            x = block(x, kernel)
        return x

    text = (
        jax.jit(canonical_convolutions(many))
        .lower(jnp.ones((1, 4, 4, 8)), PARAMS["second"])
        .as_text()
    )
    assert text.count("stablehlo.convolution") == 1


def test_a_program_without_convolutions_is_not_rewritten() -> None:
    def dense(params: Any) -> jax.Array:
        return jnp.sum(jnp.tanh(params["first"]) ** 2)

    programs = [str(jax.make_jaxpr(f)(PARAMS)) for f in (canonical_convolutions(dense), dense)]
    assert programs[0] == programs[1]


def test_under_shard_map() -> None:
    automatic = (jax.sharding.AxisType.Auto,)
    mesh, spec = jax.make_mesh((1,), ("data",), axis_types=automatic), jax.sharding.PartitionSpec

    def sharded(fun: Callable[..., Any]) -> Callable[..., Any]:
        return jax.shard_map(fun, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())

    def gradient(params: Any, batch: jax.Array) -> Any:
        return jax.grad(lambda p: jax.lax.pmean(loss_fn(p, batch), "data"))(params)

    inside = sharded(canonical_convolutions(gradient))
    outside = canonical_convolutions(sharded(gradient))
    expected = jax.jit(jax.grad(loss_fn))(PARAMS, BATCH)
    for found in (inside, outside):
        trees = jax.jit(found)(PARAMS, BATCH), expected
        for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_network_with_convolutions_trains_without_a_compiler() -> None:
    def ends() -> Any:
        init, step = make_train_step(loss_fn, optax.sgd(0.1), dbp_gradreg(gamma=0.1, interval=2))
        state = init(PARAMS)
        for _ in range(2):
            state, _ = step(state, BATCH)
        return state.params, canonical_convolutions(jax.grad(loss_fn))(PARAMS, BATCH)

    expected = ends()
    with jax.disable_jit():
        found = ends()
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # float32, in another order
