"""Haiku: its losses take an argument that must not be called ``state``."""

import re

import jax.numpy as jnp
import pytest

import gradreg_optax as gr


def test_a_loss_argument_called_state_is_refused_with_the_remedy():
    """Optax's update has a ``state`` of its own: the loss would never receive Haiku's."""

    def with_reserved_name(params, state):
        return jnp.sum(params["w"] ** 2) * state

    params = {"w": jnp.ones(2)}
    tx = gr.fd_gradreg(with_reserved_name, gamma=0.1, epsilon=0.1)
    message = (
        "fd_gradreg: the loss needs 'state', a name that Optax's update reserves. Rename"
        " the argument"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        tx.update(params, tx.init(params), params)
