"""Equinox: partitioned modules with None leaves, and arguments that are no arrays."""

import equinox as eqx
import jax
import optax

import gradreg_optax as gr
from frameworks import (
    KEY,
    PENALTY,
    RATE,
    batch,
    by_hand,
    equinox_loss,
    gradient_of_step,
    partitioned_equinox,
)
from problems import relative_error


def test_what_is_partitioned_away_is_neither_perturbed_nor_moved():
    """Freezing by a partition: the penalty is that of the rest of the parameters alone. The static
    part goes through ``eqx.filter_jit`` and ``update`` as an argument."""
    params, static, net_state = partitioned_equinox()
    frozen = eqx.tree_at(
        lambda p: (p.first.weight, p.first.bias),
        jax.tree.map(lambda _: True, params),
        (False, False),
    )
    trained, fixed = eqx.partition(params, frozen)
    static = eqx.combine(static, fixed)
    tx = optax.chain(gr.fd_gradreg(equinox_loss, **PENALTY, has_aux=True), optax.sgd(RATE))

    @eqx.filter_jit
    def step(params, **extra):
        gradient, _ = jax.grad(equinox_loss, has_aux=True)(params, **extra)
        updates, _ = tx.update(gradient, tx.init(params), params, **extra)
        return eqx.apply_updates(params, updates)

    after = step(trained, batch=batch(), static=static, net_state=net_state, key=KEY)

    def loss_fn(params, batch):
        return equinox_loss(params, batch, static, net_state, KEY)

    assert after.first.weight is None
    assert eqx.combine(after, static).depth == 2
    # 1e-5: float32 rounding of two gradients, times gamma / epsilon = 5, and of the parameters
    _, expected, _ = by_hand(loss_fn, trained, batch())
    assert relative_error(gradient_of_step(trained, after), expected) < 1e-5
