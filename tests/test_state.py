"""The state: a counter, by which schedules and intervals go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import two_parameters as two
from gradreg_optax import GradregState, dbp_gradreg, fd_gradreg, flooding, relative_gradreg
from problems import REGULARIZERS


def test_schedules_go_by_a_counter_that_advances_on_skipped_updates_too(x64):
    params, seen = jnp.asarray(1.0), []

    def gamma(step):
        jax.debug.callback(lambda s: seen.append(int(s)), step)
        return 0.1 * (1 + step)

    schedules = {"gamma": gamma, "epsilon": lambda step: 0.5 * (1 + step), "interval": 3}
    tx = fd_gradreg(lambda p: p**3 / 3, **schedules)
    update, state = jax.jit(lambda s: tx.update(params, s, params)), tx.init(params)
    for step in range(5):
        updates, state = update(state)
        due, gamma_now, epsilon_now = step % 3 == 0, 0.1 * (1 + step), 0.5 * (1 + step)
        # the difference of p^2 at 1 is H g + epsilon
        np.testing.assert_allclose(updates, 1 + due * 3 * gamma_now * (2 + epsilon_now))
    jax.effects_barrier()
    assert seen == [0, 1, 2, 3, 4]


def test_the_state_is_a_counter_of_fixed_type():
    params = jnp.asarray([1.0, 2.0])
    for tx in [make(two.quartic) for make in REGULARIZERS.values()] + [flooding(level=0.1)]:
        state = tx.init(params)
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        assert isinstance(state, GradregState)
        assert (state.step.dtype, state.step.shape) == (jnp.int32, ())
    full = GradregState(step=jnp.asarray(np.iinfo(np.int32).max, jnp.int32))
    assert int(tx.update(params, full, params, value=0.1)[1].step) == np.iinfo(np.int32).max


MOMENTUM, ADAM = optax.trace(0.9), optax.scale_by_adam()
FD = {"gamma": 0.3, "epsilon": 0.2}
KEY, STRENGTH = jax.random.key(0), jnp.asarray(0.5)  # arrays that the caller continues to use
FAMILIES = {
    **{name: make() for name, make in REGULARIZERS.items()},
    "flooding": flooding(level=0.1),
    "momentum": fd_gradreg(**FD, ascent=MOMENTUM),
    "moments": dbp_gradreg(gamma=0.3, ascent=ADAM),
    "noise": fd_gradreg(**FD, ascent=optax.add_noise(0.1, 0.5, key=KEY)),
    "lazy": fd_gradreg(**FD, ascent=optax.ema(0.9), interval=2, start=1),
    "relative": relative_gradreg(),
    "relative array": relative_gradreg(strength=STRENGTH),
    "relative schedule": relative_gradreg(strength=optax.constant_schedule(STRENGTH)),
    "relative momentum": relative_gradreg(ascent=MOMENTUM),
    "self-tuned": relative_gradreg(strength=None),
}


NARROW = ["fd forward", "noise", "relative array", "relative schedule", "self-tuned"]
WIDE = ["lazy", "moments", "relative momentum", "self-tuned"]


@pytest.mark.parametrize(
    ("name", "wide"), [*((name, False) for name in NARROW), *((name, True) for name in WIDE)]
)
def test_a_fresh_state_can_be_donated_again_and_again(name, wide):
    """State that holds an array of the caller, or one array twice, could be donated only once."""
    with jax.enable_x64(wide):
        tx = optax.chain(FAMILIES[name], optax.sgd(1e-2))

        def step(params, state):
            value, gradient = jax.value_and_grad(two.quartic)(params)
            extra = dict.fromkeys(["value_fn", "held_out_fn"], two.quartic)
            updates, state = tx.update(gradient, state, params, value=value, **extra)
            return optax.apply_updates(params, updates), state

        donating = jax.jit(step, donate_argnums=(0, 1))
        for init in (tx.init, tx.init, jax.jit(tx.init)):
            params = jnp.asarray([1.0, 2.0])
            state = init(params)
            assert not any(jax.typeof(x).weak_type for x in jax.tree.leaves(state))
            for _ in range(2):
                params, state = donating(params, state)
        assert donating._cache_size() == 1


STATES = ["fd forward", "momentum", "moments", "relative", "relative momentum", "self-tuned"]


@pytest.mark.parametrize("given", STATES)
@pytest.mark.parametrize("name", [*STATES, "flooding", "sam"])
def test_the_state_of_another_configuration_is_refused(name, given):
    tx, state = FAMILIES[name], FAMILIES[given].init(two.P)
    extra = dict.fromkeys(["value_fn", "held_out_fn"], two.quartic)

    def update():
        return jax.eval_shape(lambda: tx.update(two.P, state, two.P, value=1.0, **extra))

    if jax.tree.structure(state) == jax.tree.structure(tx.init(two.P)):
        update()  # of a counter alone nothing tells whose it is, and it counts the same updates
        return
    kind = "RelativeState" if name.startswith(("relative", "self")) else "GradregState"
    with two.says(TypeError, f"the state must be the {kind} that init"):
        update()
