"""Gradients, evaluations and traces: counted, not assumed."""

import jax
import numpy as np
import optax
import pytest

import problems
from gradreg_optax import make_train_step, regularized_loss
from problems import REGULARIZERS, batch_of, flat, loss_fn, params_of


@pytest.mark.parametrize("name", [name for name in REGULARIZERS if name not in ("asam", "gnp")])
def test_gradients_per_update_are_those_of_the_table_and_skipped_updates_cost_none(counter, name):
    reuse = name in ("fd forward", "dbp forward_over_reverse")
    params, batch, interval = params_of(), batch_of(), 3
    tx = REGULARIZERS[name](counter.wrap(loss_fn), interval=interval, reuse_updates=reuse)
    gradient = jax.grad(loss_fn)(params, batch)
    regularized = jax.jit(problems.GRADIENT_FUNCTIONS[name](loss_fn))(params, batch)[1]
    update = jax.jit(lambda g, s, p, b: tx.update(g, s, p, batch=b))
    state, counts = tx.init(params), []
    for step in range(5):
        assert int(state.step) == step
        updates, state = update(gradient, state, params, batch)
        counts.append(counter.read()[1])
        penalty = flat(updates) - flat(gradient)
        if step % interval:
            assert not penalty.any()
        else:  # float32 rounding of the difference, divided by epsilon and times interval gamma
            correction = flat(regularized) - flat(gradient)
            np.testing.assert_allclose(penalty, interval * correction, atol=1e-5)
    # dbp evaluates the gradient inside its product, and does not do so twice for a direction of its
    # own
    expected = problems.EXTRA_GRADIENTS[name] + (not reuse and not name.startswith("dbp"))
    assert counts == [expected, 0, 0, expected, 0]
    assert update._cache_size() == 1


def counted_loss():
    """Return the loss, and a list that grows when it is traced."""
    traces = []
    return lambda params, batch: traces.append(None) or loss_fn(params, batch), traces


@pytest.mark.parametrize("name", ["fd forward", "dbp forward_over_reverse", "asam"])
def test_ten_steps_trace_the_loss_as_often_as_one(name):
    tx, batch, params = REGULARIZERS[name](interval=2), batch_of(), params_of()
    counted, traces = counted_loss()

    @jax.jit
    # a new lambda on every trace, and no retracing on account of it
    def step(params, state, batch):
        gradient = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(gradient, state, params, value_fn=lambda p: counted(p, batch))
        return optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates)), state

    state = tx.init(params)
    params, state = step(params, state, batch)
    first = len(traces)
    for _ in range(9):
        params, state = step(params, state, batch)
    assert (len(traces), step._cache_size(), int(state.step)) == (first, 1, 10)


@pytest.mark.parametrize("name", ["fd central", "dbp forward_over_reverse"])
@pytest.mark.parametrize("interval", [1, 3])
def test_a_program_traces_the_loss_once(name, interval):
    tx, batch, params = REGULARIZERS[name](interval=interval), batch_of(), params_of()
    counted, traces = counted_loss()
    init, step = make_train_step(counted, optax.lbfgs(), tx)
    step.lower(init(params), batch)
    for loss in (regularized_loss(counted, tx), jax.grad(regularized_loss(counted, tx))):
        jax.jit(loss).lower(params, batch, step=0)
    assert len(traces) == 3  # one for each
