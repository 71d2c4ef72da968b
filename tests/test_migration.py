"""Every row of ``docs/how-to/migration.md``: what others compute, and the same of this package.

Optax's SAM is called; PyTorch's, Keras 2's, GNP's and TRL's are written out after their sources.
Everything to 1e-6, in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
from problems import flat, update_of

RHO, RATE, STEPS = 0.1, 0.05, 4
close = {"rtol": 1e-6, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _in_float64(x64):
    """The mathematics, not the rounding."""


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["kernel"]) + params["embed"] ** 2
    return jnp.mean((hidden @ params["head"] - 1) ** 2)


def problem():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "embed": (8, 4), "head": (4, 2)}
    params = {name: rng.normal(size=s) / 2 for name, s in shapes.items()}
    return params, rng.normal(size=(8, 3))


def shift(params, length, direction):
    return optax.tree.add_scale(params, length, direction)


def unit(tree):
    return optax.tree.scale(1 / optax.tree.norm(tree), tree)


def signs(gradient, params):
    return jax.tree.map(jnp.sign, gradient)


def unit_leaves(gradient, params):
    return jax.tree.map(lambda g: g / jnp.linalg.norm(g), gradient)


def train(tx, steps=STEPS, extra=None, finish=lambda updates, gradient: updates):
    """The parameters after a few steps with a transformation of Optax or of ours."""
    params, x = problem()
    extra = {"value_fn": lambda p: loss_fn(p, x)} if extra is None else extra
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state):
        gradient = jax.grad(loss_fn)(params, x)
        updates, state = tx.update(gradient, state, params, **extra)
        return optax.apply_updates(params, finish(updates, gradient)), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return flat(params)


def descend(direction):
    """The same by hand, along ``direction(step, params, gradient, gradient function)``."""
    params, x = problem()

    def grad(params):
        return jax.grad(loss_fn)(params, x)

    @jax.jit
    def step(i, params):
        return shift(params, -RATE, direction(i, params, grad(params), grad))

    for i in range(STEPS):
        params = step(i, params)
    return flat(params)


def train_with_optax_sam(optimizer, adversary, opaque=True, **options):
    theirs = optax.contrib.sam(optimizer, adversary, opaque_mode=opaque, **options)
    extra = {"grad_fn": lambda p, _: jax.grad(loss_fn)(p, problem()[1])} if opaque else {}
    return train(theirs, STEPS if opaque else 2 * STEPS, extra)


normalize, sgd, adam = optax.contrib.normalize, optax.sgd, optax.adam
ADVERSARIES = {
    "normalize, sgd": (optax.chain(normalize(), sgd(RHO)), gr.sam(rho=RHO)),
    "sgd": (sgd(RHO), gr.fd_gradreg(gamma=RHO, epsilon=RHO)),
    "normalize, adam": (  # the sign, but for Adam's eps
        optax.chain(normalize(), adam(RHO, eps=1e-13)),
        gr.fd_gradreg(gamma=RHO, epsilon=RHO, ascent=signs),
    ),
    "layer by layer": (
        optax.chain(optax.stateless(unit_leaves), sgd(RHO)),
        gr.fd_gradreg(gamma=RHO, epsilon=RHO, ascent=unit_leaves),
    ),
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_optax_sam_by_its_adversary(name):
    adversary, ours = ADVERSARIES[name]
    optimizer = adam(RATE) if name == "sgd" else sgd(RATE, momentum=0.9)
    theirs = train_with_optax_sam(optimizer, adversary)
    np.testing.assert_allclose(train(optax.chain(ours, optimizer)), theirs, **close)


def test_optax_sam_with_an_adversary_that_remembers():
    adversary = sgd(RHO, momentum=0.9)
    theirs = train_with_optax_sam(sgd(RATE), adversary, reset_state=False)
    uphill = optax.chain(adversary, optax.scale(-1.0))
    ours = gr.fd_gradreg(gamma=1.0, epsilon=1.0, ascent=uphill)
    np.testing.assert_allclose(train(optax.chain(ours, sgd(RATE))), theirs, **close)
    forgetful = train_with_optax_sam(sgd(RATE), adversary)
    assert np.abs(theirs - forgetful).max() > 1e-3


def test_optax_sam_in_transparent_mode_on_the_same_batch_twice():
    adversary = optax.chain(normalize(), sgd(RHO))
    theirs = train_with_optax_sam(adam(RATE), adversary, opaque=False)
    np.testing.assert_allclose(train(optax.chain(gr.sam(rho=RHO), adam(RATE))), theirs, **close)


@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "adaptive=True"])
def test_two_steps_in_pytorch(adaptive):
    """first_step climbs, second_step comes back and descends with the gradient from there."""

    def direction(i, params, g, grad):
        scaled = jax.tree.map(lambda p, d: jnp.abs(p) * d, params, g) if adaptive else g
        e_w = jax.tree.map(lambda p, d: p**2 * d, params, g) if adaptive else g
        return grad(shift(params, RHO / (optax.tree.norm(scaled) + 1e-12), e_w))

    ours = (gr.asam if adaptive else gr.sam)(rho=RHO)
    np.testing.assert_allclose(train(optax.chain(ours, sgd(RATE))), descend(direction), **close)


def test_sharpness_aware_minimization_of_keras_2_adds_up_its_splits():
    params, x = problem()
    splits, params = 4, {**params, "embed": params["embed"][:1]}  # shared by the samples

    @jax.jit
    def ahead(params, part):
        g = jax.grad(loss_fn)(params, part)
        return jax.grad(loss_fn)(shift(params, RHO, unit(g)), part)

    several = [ahead(params, part) for part in np.split(x, splits)]
    total = jax.tree.map(lambda *g: sum(g), *several)
    theirs = shift(params, -RATE, total)
    init, step = gr.make_train_step(
        loss_fn, sgd(splits * RATE), gr.sam(rho=RHO), ascent_groups=splits
    )
    state, _ = step(init(params), x)
    np.testing.assert_allclose(flat(state.params), flat(theirs), **close)


def test_gnp_with_its_r_and_alpha():
    r, alpha = 0.2, 0.8

    def direction(i, params, g, grad):
        there = grad(shift(params, r, unit(g)))
        return jax.tree.map(lambda a, b: (1 - alpha) * a + alpha * b, g, there)

    ours = gr.gradient_norm_penalty(gamma=alpha * r, epsilon=r)
    np.testing.assert_allclose(train(optax.chain(ours, sgd(RATE))), descend(direction), **close)


# TRL with the gradient regularization of Ackermann et al.: strength, eps, warm-up, both clips, and
# names that are left out.
STRENGTH, EPS, INCLUDED = 1e-2, 1e-3, {"kernel": True, "embed": False, "head": False}


def clip(gradient, largest):
    return optax.tree.scale(jnp.minimum(1, largest / (optax.tree.norm(gradient) + 1e-6)), gradient)


def test_trl_as_long_as_nothing_is_clipped():
    """Two steps of warm-up, then each name that is included, and the others once they are given
    their second gradient, which the names left out keep. Our correction reaches these too."""
    warmup, largest = 2, 1e3

    def direction(i, params, g, grad):
        first = clip(g, largest)
        climb = jax.tree.map(lambda d, kept: kept * d, first, INCLUDED)
        there = clip(grad(shift(params, EPS, climb)), largest)

        def combined(a, b, kept):
            after = a + STRENGTH / EPS * (b - a) if kept else b
            return jnp.where(i < warmup, a, after)

        return jax.tree.map(combined, first, there, INCLUDED)

    def finish(updates, gradient):
        second = jax.tree.map(
            lambda u, d, kept: u if kept else d + EPS / STRENGTH * (u - d),
            updates,
            gradient,
            INCLUDED,
        )
        return optax.tree.scale(-RATE, second)

    ascent = gr.masked(INCLUDED)
    ours = gr.fd_gradreg(gamma=STRENGTH, epsilon=EPS, ascent=ascent, start=warmup)
    found = train(ours, finish=finish)
    np.testing.assert_allclose(found, descend(direction), **close)


def test_trl_with_its_first_clip_at_work_clips_the_direction():
    """One step, of the names that take part: their second gradient, and the difference to the
    gradient, where they take that to the clipped gradient."""
    params, x = problem()
    grad = jax.jit(jax.grad(loss_fn))
    g = grad(params, x)
    half = float(optax.tree.norm(g)) / 2
    there = grad(shift(params, EPS / 2, gr.masked(INCLUDED)(g, params)), x)

    def climb(gradient, params):
        return gr.masked(INCLUDED)(clip(gradient, half), params)

    tx = gr.fd_gradreg(gamma=STRENGTH, epsilon=EPS, ascent=climb)
    updates = update_of(tx, g, params, value_fn=lambda p: loss_fn(p, x))
    expected = g["kernel"] + STRENGTH / EPS * (there["kernel"] - g["kernel"])
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)
