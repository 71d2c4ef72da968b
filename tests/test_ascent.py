"""Ascent directions with state: an Optax transformation as ``ascent=``.

Every run is compared with the loop written by hand, over several steps of plain descent.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
import two_parameters as two

GAMMA, EPSILON, RATE, STEPS = 0.3, 0.2, 0.1, 5


def loss_fn(params, batch=1.0):
    return jnp.mean(jnp.sin(3 * params["w"] * batch) + params["w"] ** 2 / 2) + params["b"] ** 4


def initial():
    return {"w": jnp.linspace(-1.0, 1.0, 6), "b": jnp.asarray(0.7)}


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def friendly(sigma, decay=0.9):
    """Along what a gradient does not share with those before it."""
    mean = optax.ema(decay, debias=False)

    def update(gradient, state, params):
        common, state = mean.update(gradient, state, params)
        return optax.tree.add_scale(gradient, -sigma, common), state

    return optax.GradientTransformation(mean.init, update)


def in_order(*functions):
    """One after the other, as a function."""

    def direction(gradient, params):
        for function in functions:
            gradient = function(gradient, params)
        return gradient

    return direction


def layerwise(gradient, params):
    """Every layer climbs as far, relative to its size."""
    radius = jax.tree.map(lambda g, p: jnp.linalg.norm(p) / jnp.linalg.norm(g), gradient, params)
    return jax.tree.map(jnp.multiply, radius, gradient)


def budget(gradient, params, sigma=0.05):
    """As far as the linearised loss takes to rise by sigma."""
    return optax.tree.scale(sigma / optax.tree.norm(gradient, squared=True), gradient)


ASCENTS = {
    "momentum": optax.trace(0.9),
    "running mean": optax.ema(0.9),
    "Adam's moments": optax.scale_by_adam(eps=1e-3),
    "root mean square": optax.scale_by_rms(eps=1e-3),
    "clipped": optax.clip_by_global_norm(0.5),
    "noisy": optax.add_noise(0.1, 0.5, key=7),
    "trust ratio": optax.scale_by_trust_ratio(),
    "friendly": friendly(0.8),
    "unit momentum": optax.chain(optax.trace(0.9), optax.stateless(gr.normalized)),
}
REMEMBER = {
    "momentum", "running mean", "Adam's moments", "root mean square", "noisy", "friendly",
    "unit momentum",
}  # fmt: skip
ascents = pytest.mark.parametrize("name", ASCENTS)


def train(tx, steps=STEPS, params=None, state=None, loss=loss_fn):
    """(parameters, state) after ``steps`` steps, one jitted step at a time."""
    params = initial() if params is None else params
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return jax.tree.map(lambda p, u: p - RATE * u, params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def by_hand(direction_of, due=lambda step: True, weight=1, scheme="forward"):
    """The parameters after the same steps; ``direction_of(gradient, params)`` may remember."""
    params = initial()
    grad = jax.jit(jax.grad(loss_fn))
    for step in range(STEPS):
        g = grad(params)
        updates = g
        if due(step):
            d = direction_of(g, params)
            sides = {
                "forward": [(1, EPSILON), (-1, 0)],
                "backward": [(1, 0), (-1, -EPSILON)],
                "central": [(0.5, EPSILON), (-0.5, -EPSILON)],
            }[scheme]
            for sign, width in sides:
                there = grad(optax.tree.add_scale(params, width, d))
                updates = optax.tree.add_scale(updates, sign * weight * GAMMA / EPSILON, there)
        params = optax.tree.add_scale(params, -RATE, updates)
    return params


class Remembering:
    """An Optax transformation as a function with a memory."""

    def __init__(self, tx):
        self.tx, self.state = tx, tx.init(initial())

    def __call__(self, gradient, params):
        direction, self.state = self.tx.update(gradient, self.state, params)
        return direction


def fd(ascent, **options):
    return gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON, ascent=ascent, **options)


@ascents
def test_every_ascent_is_the_one_written_by_hand(x64, name):
    found, state = train(fd(ASCENTS[name]))
    expected = by_hand(Remembering(ASCENTS[name]))
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-10)
    assert int(state.step) == STEPS


@pytest.mark.parametrize("scheme", ["backward", "central"])
def test_the_other_schemes_climb_along_it_too(x64, scheme):
    found, _ = train(fd(optax.trace(0.9), scheme=scheme))
    expected = by_hand(Remembering(optax.trace(0.9)), scheme=scheme)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-10)


def test_the_exact_product_is_taken_along_it(x64):
    tx = gr.dbp_gradreg(gamma=GAMMA, ascent=optax.trace(0.9))
    found, _ = train(tx)
    params, memory = initial(), Remembering(optax.trace(0.9))
    for _ in range(STEPS):
        g = jax.grad(loss_fn)(params)
        product = jax.jvp(jax.grad(loss_fn), (params,), (memory(g, params),))[1]
        updates = optax.tree.add_scale(g, GAMMA, product)
        params = optax.tree.add_scale(params, -RATE, updates)
    np.testing.assert_allclose(flat(found), flat(params), rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "by_name"),
    [
        ("momentum", lambda g, m, p: optax.tree.add_scale(g, 0.9, m)),
        ("friendly", lambda g, m, p: optax.tree.add_scale(g, -0.8 * 0.1, g)),
        ("Adam's moments", lambda g, m, p: jax.tree.map(lambda x: x / (abs(x) + 1e-3), g)),
        ("trust ratio", lambda g, m, p: layerwise(g, p)),
        ("clipped", lambda g, m, p: optax.tree.scale(0.5 / optax.tree.norm(g), g)),
    ],
)
def test_the_first_direction_is_the_formula_of_the_documentation(x64, name, by_name):
    params = initial()
    g = jax.grad(loss_fn)(params)
    d = by_name(g, optax.tree.zeros_like(g), params)
    tx = fd(ASCENTS[name])
    found, _ = tx.update(g, tx.init(params), params, value_fn=loss_fn)
    ahead = jax.grad(loss_fn)(optax.tree.add_scale(params, EPSILON, d))
    expected = jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, ahead)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-9)


def test_a_random_direction_is_another_on_every_step_and_a_closed_over_key_is_not():
    noise = optax.add_noise(1.0, 0.0, key=3)

    def closed_over(gradient, params):
        return optax.tree.random_like(jax.random.key(3), gradient)

    def directions(ascent, steps=3):
        seen = []

        def remember(gradient, state, params):
            direction, state = ascent.update(gradient, state, params)
            jax.debug.callback(lambda d: seen.append(np.asarray(d["w"])), direction)
            return direction, state

        tx = fd(optax.GradientTransformation(ascent.init, remember))
        train(tx, steps, loss=lambda params: 0.0 * optax.tree.sum(params))
        jax.effects_barrier()
        return seen

    first, second, third = directions(noise)
    assert not np.allclose(first, second)
    assert not np.allclose(second, third)
    np.testing.assert_array_equal(directions(noise), [first, second, third])
    constant = directions(optax.stateless(closed_over))
    np.testing.assert_array_equal(constant[0], constant[1])


def test_a_loss_budget_raises_the_linearised_loss_by_as_much(x64):
    params = initial()
    g = jax.grad(loss_fn)(params)
    for scale in (1e-3, 1.0, 50.0):  # for any scale of the gradient
        d = budget(optax.tree.scale(scale, g), params)
        np.testing.assert_allclose(scale * optax.tree.vdot(g, d), 0.05, rtol=1e-12)
    tx = gr.fd_gradreg(gamma=1.0, epsilon=1.0, ascent=budget)
    found, _ = tx.update(g, tx.init(params), params, value_fn=loss_fn)
    there = jax.grad(loss_fn)(optax.tree.add(params, budget(g, params)))
    np.testing.assert_allclose(flat(found), flat(there), rtol=1e-10)


def test_a_clipped_ascent_is_sam_where_the_gradient_is_long_and_the_penalty_where_it_is_short(x64):
    params = initial()
    g = jax.grad(loss_fn)(params)
    norm = float(optax.tree.norm(g))

    def updates(tx):
        return flat(tx.update(g, tx.init(params), params, value_fn=loss_fn)[0])

    unit = fd(in_order(gr.normalized, lambda d, p: optax.tree.scale(norm / 2, d)))
    clipped = fd(optax.clip_by_global_norm(norm / 2))
    np.testing.assert_allclose(updates(clipped), updates(unit), rtol=1e-9)
    unclipped = fd(optax.clip_by_global_norm(2 * norm))
    np.testing.assert_allclose(updates(unclipped), updates(fd(None)), rtol=1e-12)


@ascents
@pytest.mark.parametrize("options", [{}, {"interval": 2}, {"start": 2}], ids=str)
def test_the_state_keeps_its_structure_and_dtypes(name, options):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), initial())
    tx = fd(ASCENTS[name], **options)
    state = tx.init(params)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params, value_fn=loss_fn)
        return (optax.apply_updates(params, updates), state), None

    (after, last), _ = jax.lax.scan(step, (params, state), length=3)  # a carry that changes raises
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, last)]
    assert kinds[0] == kinds[1]
    assert {p.dtype for p in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}
    numbers = [x for x in jax.tree.leaves(last.ascent) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in numbers} <= {jnp.dtype(jnp.float32)}  # what is summed is summed wide


@ascents
def test_a_run_resumes_bit_for_bit(name, tmp_path):
    tx = fd(ASCENTS[name], interval=2)
    whole = train(tx, 6)
    half = train(tx, 3)
    leaves, structure = jax.tree.flatten(half)
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    arrays = [jax.random.key_data(x) if k else x for x, k in zip(leaves, is_key, strict=True)]
    np.savez(tmp_path / "half.npz", *arrays)
    with np.load(tmp_path / "half.npz") as saved:
        restored = [jnp.asarray(saved[f"arr_{i}"]) for i in range(len(leaves))]
    restored = [
        jax.random.wrap_key_data(x) if k else x for x, k in zip(restored, is_key, strict=True)
    ]
    params, state = jax.tree.unflatten(structure, restored)
    found = train(tx, 3, params, state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        assert bool(jnp.all(a == b))


@pytest.mark.parametrize(
    "options", [{"interval": 2}, {"start": 3}, {"start": 1, "interval": 3}], ids=str
)
@pytest.mark.parametrize("name", ["momentum", "Adam's moments"])
def test_it_remembers_the_updates_that_take_the_penalty_alone(x64, name, options):
    interval, start = options.get("interval", 1), options.get("start", 0)

    def due(step):
        return step >= start and (step - start) % interval == 0

    found, _ = train(fd(ASCENTS[name], **options))
    expected = by_hand(Remembering(ASCENTS[name]), due, weight=interval)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda **o: fd(None, **o), 1),
        (lambda **o: fd(optax.trace(0.9), **o), 1),
        (lambda **o: fd(optax.scale_by_adam(), scheme="central", **o), 2),
        (lambda **o: gr.dbp_gradreg(gamma=GAMMA, ascent=optax.trace(0.9), **o), 1),
        (lambda **o: gr.sam(rho=0.2, **o), 1),
        (lambda **o: gr.asam(rho=0.2, **o), 1),
        (lambda **o: gr.gradient_norm_penalty(gamma=GAMMA, epsilon=EPSILON, **o), 1),
        (lambda **o: gr.relative_gradreg(strength=0.5, **o), 1),
    ],
    ids=["fd", "momentum", "central", "dbp", "sam", "asam", "gnp", "relative"],
)
@pytest.mark.parametrize("options", [{"start": 2}, {"start": 1, "interval": 2}], ids=str)
def test_before_its_start_a_penalty_evaluates_nothing(counter, make, extra, options):
    tx, loss = make(**options), counter.wrap(loss_fn)
    params = initial()
    gradient = jax.grad(loss_fn)(params)
    update = jax.jit(lambda state: tx.update(gradient, state, params, value_fn=loss))
    state, evaluated = tx.init(params), []
    for step in range(5):
        updates, state = update(state)
        values, gradients = counter.read()
        assert values == gradients
        evaluated.append(gradients)
        if step < options["start"]:
            np.testing.assert_array_equal(flat(updates), flat(gradient))
    interval = options.get("interval", 1)
    due = [n >= options["start"] and (n - options["start"]) % interval == 0 for n in range(5)]
    assert evaluated == [extra if d else 0 for d in due]
    assert int(state.step) == 5


def test_a_start_that_is_traced_or_late_is_the_same(x64):
    expected, _ = train(fd(optax.trace(0.9), start=2))

    @jax.jit
    def with_start(start):
        tx = fd(optax.trace(0.9), start=start)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params), state, params, value_fn=loss_fn)
            return (optax.tree.add_scale(params, -RATE, updates), state), None

        return jax.lax.scan(step, (initial(), tx.init(initial())), length=STEPS)[0][0]

    np.testing.assert_allclose(flat(with_start(2)), flat(expected), rtol=1e-12)
    plain, _ = train(optax.with_extra_args_support(optax.identity()))
    np.testing.assert_allclose(flat(with_start(STEPS)), flat(plain), rtol=1e-12)


@pytest.mark.parametrize("start", [-1, 1.5, "3"])
def test_a_start_that_is_no_whole_number_is_refused(start):
    with pytest.raises((TypeError, ValueError), match="fd_gradreg: start"):
        fd(None, start=start)


def test_complex_parameters_are_climbed_along_the_conjugate(x64):
    def loss(z):
        return jnp.sum(jnp.abs(z) ** 4) / 4

    z, tx = jnp.array([1.0 + 0.5j, -0.3j]), fd(optax.trace(0.9))
    gradient, state = jax.grad(loss)(z), tx.init(z)
    found, state = tx.update(gradient, state, z, value_fn=loss)
    ahead = jax.grad(loss)(z + EPSILON * jnp.conj(gradient))
    np.testing.assert_allclose(found, gradient + GAMMA / EPSILON * (ahead - gradient), rtol=1e-12)
    np.testing.assert_allclose(state.ascent.trace, jnp.conj(gradient), rtol=1e-12)


def test_a_train_step_keeps_the_memory_and_groups_share_their_mean():
    def loss(params, batch):
        return jnp.mean((jnp.tanh(batch @ params) - 1) ** 2)

    batch = jax.random.normal(jax.random.key(0), (8, 3))
    for groups in (1, 4):
        tx = fd(optax.trace(0.9))
        init, step = gr.make_train_step(loss, optax.sgd(RATE), tx, ascent_groups=groups)
        state, expected = init(jnp.ones(3)), jnp.zeros(3)
        for _ in range(3):
            expected = jax.grad(loss)(state.params, batch) + 0.9 * expected
            state, _ = step(state, batch)
        found = state.opt_state[0].ascent.trace
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(REMEMBER))
def test_memory_is_refused_where_it_has_no_place(name):
    ascent = ASCENTS[name]
    params = initial()
    for make in (
        functools.partial(gr.fd_value_and_grad, loss_fn, gamma=GAMMA, epsilon=EPSILON),
        functools.partial(gr.dbp_value_and_grad, loss_fn, gamma=GAMMA),
    ):
        with pytest.raises(TypeError, match=r"_value_and_grad: ascent must not keep state"):
            make(ascent=ascent)(params)
    with pytest.raises(ValueError, match=r"regularized_loss: the regularizer keeps more state"):
        jax.grad(gr.regularized_loss(loss_fn, fd(ascent)))(params)


@pytest.mark.parametrize("name", sorted(set(ASCENTS) - REMEMBER))
def test_without_memory_it_is_welcome_everywhere(x64, name):
    params = initial()
    _, one = gr.fd_value_and_grad(loss_fn, gamma=GAMMA, epsilon=EPSILON, ascent=ASCENTS[name])(
        params
    )
    two = jax.grad(gr.regularized_loss(loss_fn, fd(ASCENTS[name])))(params)
    tx = fd(ASCENTS[name])
    gradient = jax.grad(loss_fn)(params)
    three, _ = tx.update(gradient, tx.init(params), params, value_fn=loss_fn)
    np.testing.assert_allclose(flat(one), flat(three), rtol=1e-12)
    np.testing.assert_allclose(flat(two), flat(three), rtol=1e-12)


@pytest.mark.parametrize(
    "ascent", [0.9, "momentum", (optax.trace(0.9).init,)], ids=["number", "text", "tuple"]
)
def test_what_is_no_direction_is_refused(ascent):
    with pytest.raises(TypeError, match="fd_gradreg: ascent must be a function"):
        fd(ascent)


@pytest.mark.parametrize("interval", [1, 2])
def test_a_memory_keeps_the_dtype_in_which_it_began(interval):
    summed = optax.GradientTransformation(
        lambda params: jnp.zeros([], jnp.bfloat16),
        lambda gradient, state, params=None: (gradient, state + jnp.sum(gradient)),
    )
    params, tx = jnp.ones(4), fd(summed, interval=interval)
    _, state = tx.update(params, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2) / 2)
    assert state.ascent == 4
    assert state.ascent.dtype == jnp.bfloat16


def poisoned(params, bad):
    """The loss, and NaN on a bad batch."""
    return loss_fn(params) * jnp.where(bad, jnp.nan, 1.0)


FAMILIES = {
    "fd": fd,
    "fd lazy": lambda ascent: fd(ascent, interval=2),
    "dbp": lambda ascent: gr.dbp_gradreg(gamma=GAMMA, ascent=ascent),
    "relative": lambda ascent: gr.relative_gradreg(ascent=ascent),
    "self-tuned": lambda ascent: gr.relative_gradreg(strength=None, ascent=ascent),
}


@pytest.mark.parametrize(
    ("family", "name"),
    [("fd", name) for name in sorted(REMEMBER)] + [(f, "momentum") for f in FAMILIES if f != "fd"],
)
def test_a_bad_batch_leaves_no_trace_but_in_the_counter(x64, name, family):
    """With NaN at a step that takes the penalty the update is NaN, so that a guard behind it skips
    the step, and state and parameters continue as if that batch had not been.
    """
    tx = FAMILIES[family](ASCENTS[name])
    chain = optax.chain(tx, optax.apply_if_finite(optax.sgd(RATE), 3))

    @jax.jit
    def step(params, state, bad):
        value, gradient = jax.value_and_grad(poisoned)(params, bad)
        loss = functools.partial(poisoned, bad=bad)
        extra = {"value": value, "value_fn": loss, "held_out_fn": loss}
        updates, state = chain.update(gradient, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def along(batches):
        params, state = initial(), chain.init(initial())
        for bad in batches:
            if bad is None:  # as if that batch had not been: only the counter advances
                count = state[0].step + 1
                state = state[0]._replace(step=count), state[1]
            else:
                params, state = step(params, state, bad)
        return params, state

    params, (state, guard) = along([False] * 4 + [True] + [False] * 5)
    expected, (state_without, _) = along([False] * 4 + [None] + [False] * 5)
    assert int(guard.total_notfinite) == 1
    for a, b in zip(
        *map(jax.tree.leaves, ((params, state), (expected, state_without))), strict=True
    ):
        assert bool(jnp.all(a == b))
        if jnp.issubdtype(a.dtype, jnp.inexact):
            assert bool(jnp.all(jnp.isfinite(a)))


@pytest.mark.parametrize("where", ["first", "infinite", "ahead"])
@pytest.mark.parametrize("family", ["fd", "dbp", "relative"])
def test_what_is_not_finite_does_not_enter_wherever_it_comes_from(x64, family, where):
    """In the first batch, an infinity of which clipping would make a finite direction, or only at
    the perturbed parameters.
    """
    ascent = optax.chain(optax.clip(1.0), optax.scale_by_adam())
    tx, params = FAMILIES[family](ascent), initial()
    state, gradient = tx.init(params), jax.grad(loss_fn)(params)
    loss = loss_fn
    if where == "infinite":
        gradient = jax.tree.map(lambda g: g + jnp.inf, gradient)
    elif where == "first":
        gradient = jax.tree.map(lambda g: g * jnp.nan, gradient)
    else:

        def loss(p):
            return loss_fn(p) + jnp.where(p["b"] == 0.7, 0.0, jnp.inf) * p["b"]

        if family == "dbp":
            return  # evaluates nothing ahead
    updates, after = tx.update(gradient, state, params, value_fn=loss)
    if family != "relative" or where != "ahead":  # it passes the updates through there
        assert not np.all(np.isfinite(flat(updates)))
    for a, b in zip(jax.tree.leaves(after.ascent), jax.tree.leaves(state.ascent), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(after.step) == 1


def test_an_infinity_that_was_there_from_the_start_may_stay_and_go(x64):
    def update(gradient, state, params=None):
        least = jnp.minimum(state["least"], optax.tree.norm(gradient))
        return gradient, {"least": least, "none yet": state["none yet"]}

    def init(params):
        return {"least": jnp.asarray(jnp.inf), "none yet": jnp.asarray(jnp.nan)}

    tx, params = fd(optax.GradientTransformation(init, update)), initial()
    state, gradient = tx.init(params), jax.grad(loss_fn)(params)
    bad = jax.tree.map(lambda g: g * jnp.nan, gradient)
    _, state = tx.update(bad, state, params, value_fn=loss_fn)
    assert state.ascent["least"] == jnp.inf
    _, state = tx.update(gradient, state, params, value_fn=loss_fn)
    np.testing.assert_allclose(state.ascent["least"], optax.tree.norm(gradient))


@pytest.mark.parametrize("name", ["momentum", "Adam's moments", "noisy"])
def test_a_bad_group_keeps_all_groups_from_contributing(name):
    def loss(params, batch):
        return jnp.mean((jnp.tanh(batch @ params) - 1) ** 2)

    batch = jax.random.normal(jax.random.key(0), (8, 3))
    init, step = gr.make_train_step(
        loss,
        optax.apply_if_finite(optax.sgd(RATE), 3),
        fd(ASCENTS[name]),
        ascent_groups=4,
        donate=False,
    )
    state, _ = step(init(jnp.ones(3)), batch)
    after, _ = step(state, batch.at[3, 1].set(jnp.nan))
    np.testing.assert_array_equal(after.params, state.params)
    before, now = state.opt_state[0].ascent, after.opt_state[0].ascent
    assert all(
        bool(jnp.all(a == b)) for a, b in zip(*map(jax.tree.leaves, (before, now)), strict=True)
    )
    assert int(after.opt_state[0].step) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_an_ascent_is_handed_the_steepest_direction_in_float32_or_wider(dtype):
    seen = []

    def ascent(gradient, params):
        seen.append((gradient.dtype, params.dtype))
        return gradient

    two.updated(
        gr.fd_gradreg(**two.PENALTY, ascent=ascent),
        jnp.ones(2, dtype),
        lambda p: jnp.sum(jnp.abs(p.astype(jnp.result_type(dtype, jnp.float32))) ** 2),
    )
    wide = jnp.dtype(jnp.promote_types(dtype, jnp.float32))
    assert set(seen) == {(wide, jnp.dtype(dtype))}


def test_directions_of_integers_are_refused():
    whole = jnp.asarray([3, 4])
    for call in (
        lambda: gr.normalized(whole, two.P),
        lambda: gr.normalized([3, 4], two.P),
        lambda: gr.adaptive(whole, two.P),
        lambda: gr.adaptive(two.P, whole),
    ):
        with two.says(TypeError, "dtype int", "have a gradient"):
            call()
    with two.says(ValueError, "adaptive: the gradient must have the structure of the parameters"):
        gr.adaptive(two.P, None)


def test_an_ascent_that_is_no_function_is_refused_by_both_gradient_functions():
    for name, make in {
        "fd_value_and_grad": functools.partial(gr.fd_value_and_grad, epsilon=0.1),
        "dbp_value_and_grad": gr.dbp_value_and_grad,
    }.items():
        for bad in ({"w": True}, 0.1, "normalized"):
            with two.says(TypeError, f"{name}: ascent must be a function (gradient, params)"):
                make(two.quartic, gamma=0.1, ascent=bad)
