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
    _convolutions,
    _transforms,
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


def orders(fun: Callable[..., Any], *args: Any) -> set[str]:
    """The orders of dimensions of all convolutions in the compiled program."""
    compiled = fun.lower(*args) if hasattr(fun, "lower") else jax.jit(fun).lower(*args)
    return set(re.findall(r" convolution\(.*dim_labels=([\w>-]+)", compiled.compile().as_text()))


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
    sizes = dict(
        zip(space, draw(st.lists(st.integers(4, 6), min_size=rank, max_size=rank)), strict=True)
    )
    windows = dict(
        zip(space, draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)), strict=True)
    )
    sizes |= {"N": 4, "C": 4}
    windows |= {"O": 6, "I": 4 // groups.get("feature_group_count", 1)}
    per_axis = st.lists(st.integers(1, 2), min_size=rank, max_size=rank).map(tuple)
    options = {
        "window_strides": draw(per_axis),
        "lhs_dilation": draw(per_axis),
        "rhs_dilation": draw(per_axis),
    }
    options["padding"] = draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=rank, max_size=rank)
    )
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


def regularized_step(regularizer: Any) -> Callable[[], set[str]]:
    init, step = make_train_step(loss_fn, optax.sgd(0.1), regularizer)
    return lambda: orders(step, init(PARAMS), BATCH)


PROGRAMS = {
    "lazy difference": regularized_step(fd_gradreg(gamma=0.1, epsilon=0.1, interval=4)),
    "lazy product": regularized_step(dbp_gradreg(gamma=0.1, interval=4)),
    "lazy, in micro-batches": lambda: orders(
        make_train_step(
            microbatched(loss_fn, 4), optax.sgd(0.1), fd_gradreg(gamma=0.1, epsilon=0.1, interval=4)
        ).step,
        make_train_step(loss_fn, optax.sgd(0.1), fd_gradreg(gamma=0.1, epsilon=0.1)).init(PARAMS),
        BATCH,
    ),
    "micro-batches": lambda: orders(jax.grad(microbatched(loss_fn, 4)), PARAMS, BATCH),
    "eigenvalue": lambda: orders(
        lambda params, batch: curvature.top_hessian_eigenvalue(
            lambda p: loss_fn(p, batch), params, jax.random.key(0)
        ),
        PARAMS,
        BATCH,
    ),
}


@on_cpu
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_convolution_has_the_order_of_the_fast_kernel(program: str) -> None:
    assert PROGRAMS[program]() == {"b01f_01io->b01f"}


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


def under_jit(fun: Callable[..., Any], params: Any, batch: jax.Array) -> Any:
    return in_a_scan(jax.jit(fun), params, batch)


@on_cpu
@pytest.mark.parametrize("place", [in_a_scan, in_a_loop, in_a_branch, under_jit])
def test_every_depth_is_reached(place: Callable[..., Any]) -> None:
    def plain(params: Any, batch: jax.Array) -> Any:
        return place(jax.grad(jax.checkpoint(loss_fn)), params, batch)

    assert len(orders(plain, PARAMS, BATCH)) > 1, (
        "XLA has learnt to do this itself: the module can go"
    )
    assert orders(canonical_convolutions(plain), PARAMS, BATCH) == {"b01f_01io->b01f"}
    for found, expected in zip(
        jax.tree.leaves(canonical_convolutions(plain)(PARAMS, BATCH)),
        jax.tree.leaves(plain(PARAMS, BATCH)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_under_shard_map(where: str) -> None:
    mesh, spec = (
        jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        jax.sharding.PartitionSpec,
    )

    def sharded(fun: Callable[..., Any]) -> Callable[..., Any]:
        return jax.shard_map(fun, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())

    def gradient(params: Any, batch: jax.Array) -> Any:
        return jax.grad(lambda p: jax.lax.pmean(loss_fn(p, batch), "data"))(params)

    fun = (
        sharded(canonical_convolutions(gradient))
        if where == "inside"
        else canonical_convolutions(sharded(gradient))
    )
    for found, expected in zip(
        jax.tree.leaves(jax.jit(fun)(PARAMS, BATCH)),
        jax.tree.leaves(jax.grad(loss_fn)(PARAMS, BATCH)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_the_function_is_traced_once() -> None:
    traces = 0

    def counted(params: Any) -> jax.Array:
        nonlocal traces
        traces += 1
        return loss_fn(params, BATCH)

    jax.jit(canonical_convolutions(jax.grad(counted))).lower(PARAMS)
    assert traces == 1


@pytest.mark.parametrize("make", [fd_gradreg, dbp_gradreg])
def test_without_a_convolution_a_lazy_update_is_what_cond_alone_gives(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"gamma": 0.1, "interval": 4} | ({"epsilon": 0.1} if make is fd_gradreg else {})

    def dense(params: Any) -> jax.Array:
        return jnp.sum(jnp.tanh(params["first"]) ** 2)

    def convolved(params: Any) -> jax.Array:
        return loss_fn(params, BATCH)

    def jaxpr(value_fn: Callable[..., jax.Array]) -> str:
        tx = make(**options)

        def update(grads: Any, state: Any) -> Any:
            return tx.update(grads, state, PARAMS, value_fn=value_fn)

        return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(update)(PARAMS, tx.init(PARAMS))))

    rewritten = jaxpr(convolved)
    monkeypatch.setattr(_convolutions, "_rewritten", pytest.fail)  # nothing is to be rewritten
    ours = jaxpr(dense)
    monkeypatch.setattr(_transforms, "canonical_convolutions", lambda fun: fun)
    assert ours == jaxpr(dense)
    assert "cond[" in ours
    if jax.default_backend() == "cpu":
        assert rewritten != jaxpr(convolved)  # so that the comparison says something


@pytest.mark.slow
@pytest.mark.parametrize("make", [fd_gradreg, dbp_gradreg])
def test_a_network_with_convolutions_trains_without_a_compiler(make: Any) -> None:
    options = {"gamma": 0.1, "interval": 2} | ({"epsilon": 0.1} if make is fd_gradreg else {})

    def ends() -> Any:
        init, step = make_train_step(loss_fn, optax.sgd(0.1), make(**options))
        state = init(PARAMS)
        for _ in range(2):
            state, _ = step(state, BATCH)
        return state.params, canonical_convolutions(jax.grad(loss_fn))(PARAMS, BATCH)

    expected = ends()
    with jax.disable_jit():
        found = ends()
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # float32, in another order
