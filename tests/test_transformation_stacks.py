"""Generated stacks of transformations around and inside every entry point.

The reference applies the same stack in Python: loops, conditions and no transformation at all. More
cases: ``GRADREG_CASES=5000 pytest tests/test_transformation_stacks.py`` for 250 of each theorem.
"""

import os

import hypothesis
import jax
import optax
from hypothesis import given
from hypothesis import strategies as st

import gradreg_optax as gr
from stacks import (
    EPSILON,
    FD,
    GAMMA,
    LEAVES,
    SCALES,
    TRANSFORMATIONS,
    WAYS,
    batch_of,
    close,
    gradient,
    interpreted,
    loss_fn,
    params_of,
    penalised,
    scaled,
    stacked,
    twice,
)

CASES = max(int(os.environ.get("GRADREG_CASES", "60")) // 20, 1)


def same(f):
    return f


def each_in_python(f):
    def transformed(params, *args):
        results = [f(jax.tree.map(lambda p, s=s: p * s, params), *args) for s in SCALES]
        return jax.tree.map(lambda *x: sum(x), *results)

    return transformed


IN_PYTHON = {
    "jit": same,
    "checkpoint": same,
    **dict.fromkeys(("scan", "map", "vmap"), each_in_python),
    "cond": lambda f: lambda *args: (f if args[1]["seen"].any() else twice(f))(*args),
    "switch": lambda f: lambda *args: [f, twice(f), scaled(f)][args[1]["y"].sum() % 3](*args),
}


def chained(tx):
    """One update of a chain."""

    def way(loss):
        def update(params, *args):
            optimizer = optax.chain(tx, optax.sgd(0.5))
            value, grads = jax.value_and_grad(loss)(params, *args)
            return optimizer.update(
                grads,
                optimizer.init(params),
                params,
                value=value,
                value_fn=lambda p: loss(p, *args),
            )[0]

        return update

    return way


def train_step(loss):
    """One step of ``make_train_step``."""
    init, step = gr.make_train_step(loss, optax.sgd(0.5), FD)

    def parameters_after(params, *args):
        state, info = step(init(params), *args)
        return info.loss, state.params

    return parameters_after


def step_by_hand(loss):
    """What a step is made of."""

    def parameters_after(params, *args):
        updates = chained(FD)(loss)(params, *args)
        return loss(params, *args), optax.apply_updates(params, updates)

    return parameters_after


FAMILIES = {
    "fd_gradreg": FD,
    "central": gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON, scheme="central"),
    "dbp_gradreg": gr.dbp_gradreg(gamma=GAMMA),
    "sam": gr.sam(rho=EPSILON),
    "asam": gr.asam(rho=EPSILON),
    "gradient_norm_penalty": gr.gradient_norm_penalty(gamma=GAMMA, epsilon=EPSILON),
    "relative_gradreg": gr.relative_gradreg(),
    "flooding": gr.flooding(level=10.0),
}
# a function of a loss, and its reference: formulas where there are, or itself
OTHERS = {
    "fd_value_and_grad": (
        lambda loss: gr.fd_value_and_grad(loss, gamma=GAMMA, epsilon=EPSILON),
        lambda loss: jax.value_and_grad(penalised(loss)),
    ),
    "make_train_step": (train_step, step_by_hand),
    **{name: (chained(tx), chained(tx)) for name, tx in FAMILIES.items()},
}
names = st.lists(st.sampled_from(list(TRANSFORMATIONS)), max_size=2)
leaves = st.sets(st.sampled_from(["float", "complex", "integer", "bool", "key", "None", "NumPy"]))


def in_python(stack, f):
    for name in reversed(stack):
        f = IN_PYTHON[name](f)
    return f


@st.composite
def stacks(draw):
    """(around, between the gradient and our loss, inside of our loss), three of them at most."""
    around, between, inside = draw(names), draw(names), draw(names)
    hypothesis.assume(len(around) + len(between) + len(inside) <= 3)
    return around, between, inside


def closing(make, leaf):
    """The leaf is closed over by the loss and not an argument of ours."""
    return lambda loss: lambda params, batch, _: make(lambda p, b: loss(p, b, leaf))(params, batch)


@hypothesis.settings(max_examples=CASES)
@given(st.sampled_from(list(WAYS)), stacks(), leaves, st.booleans(), st.booleans())
def test_a_stack_around_between_and_inside_is_that_stack_in_python(
    way, stack, chosen, closed_over, recorded
):
    (around, between, inside), (ours, reference) = stack, WAYS[way]
    with jax.enable_x64(True):
        args = params_of(), batch_of(), {kind: LEAVES[kind]() for kind in sorted(chosen)}

        def made(make, apply):
            def function(*args):
                way_in = closing(make, args[2]) if closed_over else make
                return apply(between, way_in(apply(inside, loss_fn)))(*args)

            return apply(around, gradient(function))

        found = made(ours, stacked)
        found = interpreted(lambda: found(*args)) if recorded else found(*args)
        close(found, made(reference, in_python)(*args))


@hypothesis.settings(max_examples=CASES)
@given(st.sampled_from(list(OTHERS)), stacks(), leaves, st.booleans())
def test_a_stack_around_an_update_a_step_or_a_gradient_is_that_stack_in_python(
    way, stack, chosen, recorded
):
    (around, between, inside), (ours, reference) = stack, OTHERS[way]
    with jax.enable_x64(True):
        args = params_of(), batch_of(), {kind: LEAVES[kind]() for kind in sorted(chosen)}
        found = stacked(around, ours(stacked([*between, *inside], loss_fn)))
        found = interpreted(lambda: found(*args)) if recorded else found(*args)
        close(found, in_python(around, reference(in_python([*between, *inside], loss_fn)))(*args))
