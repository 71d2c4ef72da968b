"""Generated cases against formulas in NumPy: any tree, any of the families, any entry point.

The loss is a sum of waves and half the square of the sum of all parameters, averaged over a batch,
so that gradient and Hessian are known in closed form and no derivative of JAX's is trusted. More
cases: ``GRADREG_CASES=3000 pytest tests/test_properties.py``; under JAX's strict modes, one or
several at once: ``GRADREG_MODE=jax_debug_nans,jax_debug_infs``.
"""

import contextlib
import os

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax import (
    asam,
    checking,
    dbp_gradreg,
    dbp_value_and_grad,
    fd_gradreg,
    fd_value_and_grad,
    flooding,
    gradient_norm_penalty,
    make_train_step,
    microbatched,
    normalized,
    regularized_loss,
    relative_gradreg,
    sam,
)

CASES = int(os.environ.get("GRADREG_CASES", "12")) // 4  # over four theorems
MODES = [mode for mode in os.environ.get("GRADREG_MODE", "").split(",") if mode]
cases = hypothesis.settings(max_examples=max(CASES, 1))
SIZE = 4  # of a batch


@contextlib.contextmanager
def environment():
    """float64, but where a strict mode asks for float32 throughout."""
    with contextlib.ExitStack() as stack:
        if WIDE:
            stack.enter_context(jax.enable_x64(True))
        for mode in MODES:
            stack.callback(jax.config.update, mode, getattr(jax.config, mode))
            jax.config.update(mode, {"jax_numpy_dtype_promotion": "strict"}.get(mode, True))
        yield


WIDE = MODES in ([], ["jax_enable_x64"])
ROUNDING = {"rtol": 1e-8, "atol": 1e-8} if WIDE else {"rtol": 3e-3, "atol": 3e-3}

shapes = st.sampled_from([(), (1,), (3,), (2, 2)])
trees = st.recursive(
    shapes,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=2)
        | st.tuples(inner, inner)
        | st.fixed_dictionaries({"a": inner, "b": inner})
        | st.tuples(inner, st.none())
    ),
    max_leaves=3,
).filter(lambda tree: tree is not None)


def is_shape(node):
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


class Waves:
    """The loss of a random tree: parameters, batch, and its derivatives on flat vectors."""

    def __init__(self, tree, seed):
        rng, dtype = np.random.default_rng(seed), np.float64 if WIDE else np.float32
        self.params = jax.tree.map(
            lambda shape: np.asarray(rng.normal(size=shape), dtype), tree, is_leaf=is_shape
        )
        self.x = flat(self.params)
        self.a, self.b = rng.normal(size=(2, self.x.size))
        self.phases = np.asarray(rng.normal(size=SIZE), dtype)

    def loss_fn(self, params, batch):
        dtype = np.float64 if WIDE else np.float32
        total, wave, start = jnp.zeros([], dtype), jnp.zeros(batch.shape, dtype), 0
        for leaf in jax.tree.leaves(params):
            x = jnp.reshape(leaf, (-1,))
            a, b = (np.asarray(v[start : start + x.size], dtype) for v in (self.a, self.b))
            inside = (b * x)[None, :] + batch[:, None]
            wave, total = wave + jnp.sum(a[None, :] * jnp.cos(inside), axis=1), total + jnp.sum(x)
            start += x.size
        return jnp.mean(wave) + total**2 / 2

    def value_fn(self, params):
        return self.loss_fn(params, self.phases)

    def inside(self, x, phases=None):
        return self.b * x + (self.phases if phases is None else phases)[:, None]

    def value(self, x):
        return np.mean(np.cos(self.inside(x)) @ self.a) + x.sum() ** 2 / 2

    def gradient(self, x, phases=None):
        return -(self.a * self.b * np.sin(self.inside(x, phases))).mean(axis=0) + x.sum()

    def hessian(self, x, phases=None):
        waves = -(self.a * self.b**2 * np.cos(self.inside(x, phases))).mean(axis=0)
        return np.diag(waves) + np.ones((x.size, x.size))


def flat(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def unit(g):
    return g / max(np.linalg.norm(g), 1e-150)


problems = st.builds(Waves, trees, st.integers(0, 2**32 - 1))
strengths = st.floats(0.0, 2.0)
steps = st.floats(0.05, 2.0)
schemes = st.sampled_from(["forward", "backward", "central"])
modes = st.sampled_from(["forward_over_reverse", "reverse_over_reverse"])
kinds = st.sampled_from([float, np.float64, np.float32, jnp.asarray, lambda x: lambda step: x])
families = st.sampled_from(["fd", "dbp", "gnp", "sam", "asam"])


class Case:
    """A family with its hyperparameters, and its gradient by formula."""

    def __init__(self, family, gamma, epsilon, scheme, mode):
        self.family, self.scheme, self.mode = family, scheme, mode
        self.gamma, self.epsilon = float(np.float32(gamma)), float(np.float32(epsilon))
        if family in ("sam", "asam"):
            self.gamma, self.scheme = self.epsilon, "forward"

    def __repr__(self):
        return f"{self.family}({self.gamma}, {self.epsilon}, {self.scheme}, {self.mode})"

    def make(self, kind=float, **options):
        gamma, epsilon = kind(self.gamma), kind(self.epsilon)
        return {
            "fd": lambda: fd_gradreg(gamma=gamma, epsilon=epsilon, scheme=self.scheme, **options),
            "gnp": lambda: gradient_norm_penalty(
                gamma=gamma, epsilon=epsilon, scheme=self.scheme, **options
            ),
            "dbp": lambda: dbp_gradreg(gamma=gamma, mode=self.mode, **options),
            "sam": lambda: sam(rho=epsilon, **options),
            "asam": lambda: asam(rho=epsilon, **options),
        }[self.family]()

    def correction(self, problem, x, phases=None):
        g = problem.gradient(x, phases)
        direction = {
            "gnp": lambda: unit(g),
            "sam": lambda: unit(g),
            "asam": lambda: np.abs(x) * unit(np.abs(x) * g),
        }.get(self.family, lambda: g)()
        if self.family == "dbp":
            return self.gamma * problem.hessian(x, phases) @ direction
        ahead = problem.gradient(x + self.epsilon * direction, phases)
        behind = problem.gradient(x - self.epsilon * direction, phases)
        change = {
            "forward": ahead - g,
            "backward": g - behind,
            "central": (ahead - behind) / 2,
        }[self.scheme]
        return self.gamma / self.epsilon * change


settings = st.builds(Case, families, strengths, steps, schemes, modes)
DIFFERENCE = Case("fd", 0.9, 0.2, "central", None)
PRODUCT = Case("dbp", 0.3, 1.0, None, "reverse_over_reverse")


def close(found, expected, scale=1.0):
    np.testing.assert_allclose(
        flat(found), expected, rtol=ROUNDING["rtol"], atol=ROUNDING["atol"] * (1 + scale)
    )


@cases
@given(problems, settings, kinds, st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_a_transformation_is_its_formula_on_the_updates_it_takes(
    problem, case, kind, interval, start, reuse
):
    with environment():
        tx = case.make(kind, interval=interval, start=start, reuse_updates=reuse)
        state, extra = tx.init(problem.params), {"meant_for_others": object()}

        @jax.jit
        def update(state):
            gradient = jax.grad(problem.value_fn)(problem.params)
            return tx.update(gradient, state, problem.params, value_fn=problem.value_fn, **extra)

        with checking() as findings:
            for step in range(3):
                updates, state = update(state)
                due = step >= start and (step - start) % interval == 0
                correction = due * interval * case.correction(problem, problem.x)
                expected = problem.gradient(problem.x) + correction
                close(updates, expected, interval * case.gamma / case.epsilon)
                assert jax.tree.structure(updates) == jax.tree.structure(problem.params)
        assert not findings
        assert int(state.step) == 3


@cases
@given(problems, settings, st.integers(0, 1), st.booleans(), st.sampled_from([1, 2, 4]))
@hypothesis.example(Waves([(3,), ()], 0), DIFFERENCE, 0, True, 4)
@hypothesis.example(Waves([(2, 2)], 1), PRODUCT, 0, False, 2)
def test_gradient_functions_and_losses_are_that_formula_too(problem, case, argnum, has_aux, count):
    """In micro-batches as well, where the batch is the second argument."""

    def whole_loss(*args):
        params, batch = args[argnum], args[1 - argnum]
        value = problem.loss_fn(params, batch)
        return (value, {"batch": batch}) if has_aux else value

    with environment():
        loss_fn = whole_loss if argnum else microbatched(whole_loss, count, has_aux=has_aux)
        args = [problem.params, problem.phases][:: 1 if argnum == 0 else -1]
        options = {"argnums": argnum, "has_aux": has_aux}
        expected = problem.gradient(problem.x) + case.correction(problem, problem.x)
        regularized = regularized_loss(loss_fn, case.make(), **options)
        functions = [jax.value_and_grad(regularized, **options)]
        if case.family == "dbp":
            functions.append(
                dbp_value_and_grad(loss_fn, gamma=case.gamma, mode=case.mode, **options)
            )
        if case.family in ("fd", "gnp", "sam"):
            pair = {"gamma": case.gamma, "epsilon": case.epsilon, "scheme": case.scheme}
            ascent = None if case.family == "fd" else normalized
            functions.append(fd_value_and_grad(loss_fn, **pair, ascent=ascent, **options))
        for value, gradient in jax.jit(lambda *args: [f(*args) for f in functions])(*args):
            close(value[0] if has_aux else value, [problem.value(problem.x)])
            close(gradient, expected, case.gamma / case.epsilon)
        value = jax.jit(regularized)(*args)
        close(value[0] if has_aux else value, [problem.value(problem.x)])


@cases
@given(problems, settings, st.sampled_from([1, 2, 4]), st.sampled_from([1.0, 0.5, 0.3, 0.25]))
@hypothesis.example(Waves([(3,), ()], 0), DIFFERENCE, 2, 1.0)
@hypothesis.example(Waves([(2, 2)], 1), PRODUCT, 1, 0.3)
def test_a_train_step_is_its_formula_in_parts_and_groups(problem, case, groups, kept):
    options = {"ascent_groups": groups, "penalty_fraction": kept}
    with environment():
        tx = case.make(interval=3)
        init, step = make_train_step(problem.loss_fn, optax.sgd(0.5), tx, **options)
        state, info = step(init(problem.params), jnp.asarray(problem.phases))
        parts, x = np.split(problem.phases, groups), problem.x
        corrections = [
            case.correction(problem, x, part[: int(np.ceil(kept * len(part)))]) for part in parts
        ]
        moved = x - 0.5 * (problem.gradient(x) + 3 * np.mean(corrections, axis=0))
        close(state.params, moved, 3 * case.gamma / case.epsilon)
        close(info.loss, [problem.value(x)])
        norms = [np.linalg.norm(problem.gradient(x, part)) for part in parts]
        close(info.grad_norm, [np.sqrt(np.mean(np.square(norms)))])


@cases
@given(problems, st.floats(0.0, 1.0), st.floats(-5.0, 5.0))
def test_the_relative_penalty_has_its_share_and_flooding_its_sign(problem, strength, level):
    @jax.jit
    def update(params):
        gradient, extra = jax.grad(problem.value_fn)(params), {"value_fn": problem.value_fn}
        both = relative_gradreg(strength=strength), flooding(level=level)
        return [tx.update(gradient, tx.init(params), params, **extra) for tx in both]

    with environment():
        (updates, state), (flooded, _) = update(problem.params)
        g = problem.gradient(problem.x)
        added = np.linalg.norm(flat(updates) - g)
        hypothesis.assume(float(state.norms.product) > 1e-3 * np.linalg.norm(g))
        close(added, [strength * np.linalg.norm(g)], 10 * np.linalg.norm(g))
        hypothesis.assume(abs(problem.value(problem.x) - level) > 1e-3)
        close(flooded, np.sign(problem.value(problem.x) - level) * g)
