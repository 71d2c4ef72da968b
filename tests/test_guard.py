"""The guard sees every case of updates that are not the gradient, and no other."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr
from gradreg_optax import GradientMismatch, checking, fd_gradreg, relative_gradreg, sam

PARAMS = {"w": np.linspace(-1.0, 1.0, 3, dtype=np.float32), "b": np.ones(2, np.float32)}
BATCH = np.sin(np.arange(12, dtype=np.float32)).reshape(4, 3)


def loss_fn(params, batch):
    return jnp.mean(jnp.tanh(batch @ params["w"]) ** 2) + jnp.sum(params["b"] ** 4)


gradient_of = jax.jit(jax.grad(loss_fn))


def run(*several, batches=(BATCH, BATCH)):
    """Updates with the gradient on the first kind of batch and the loss on the second."""

    @jax.jit
    def step(states, batch, other):
        gradient, value_fn = jax.grad(loss_fn)(PARAMS, batch), lambda p: loss_fn(p, other)
        pairs = zip(several, states, strict=True)
        return [tx.update(gradient, state, PARAMS, value_fn=value_fn)[1] for tx, state in pairs]

    states = [tx.init(PARAMS) for tx in several]
    for _ in range(3):
        states = step(states, *batches)


def findings_of(run, *args, **kwargs):
    with checking() as findings, warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientMismatch)
        run(*args, **kwargs)
    return findings


fd, clip = functools.partial(fd_gradreg, gamma=0.1, epsilon=0.1), optax.clip_by_global_norm(0.1)
chain = optax.chain


def turn(tx, number):
    return optax.conditionally_transform(tx, lambda step: step % 2 == number)


RIGHT = [
    fd(),
    gr.dbp_gradreg(gamma=0.1, interval=2),
    sam(rho=0.1),
    relative_gradreg(),
    chain(fd(), clip, optax.adam(0.1)),
    chain(clip, fd(reuse_updates=False)),
    # regularizers that take turns
    chain(fd(interval=2), sam(rho=0.1, interval=2, start=1)),
    chain(turn(fd(), 0), turn(sam(rho=0.1), 1)),
    chain(fd(gamma=lambda step: 0.1 * (step < 2)), relative_gradreg(start=2)),
]


def test_what_is_right_is_not_reported():
    assert findings_of(run, *RIGHT) == []


WRONG = {
    "point the same way: clipping": chain(clip, fd()),
    "a transformation or a regularizer before it": chain(optax.add_decayed_weights(0.5), fd()),
    "before it in the chain": chain(fd(), sam(rho=0.1)),
    "3 times as long and point the same way": chain(optax.scale(3.0), relative_gradreg()),
}


@pytest.mark.parametrize("cause", WRONG)
def test_what_is_wrong_is_reported_once_with_its_cause(cause):
    (finding,) = findings_of(run, WRONG[cause])
    assert ": the incoming updates are not the gradient of the loss: they differ by" in finding
    assert cause in finding


def test_another_batch_is_seen():
    (finding,) = findings_of(run, fd(), batches=(BATCH, -2 * BATCH[::-1] + 1))
    assert "another batch" in finding


def test_accumulation_around_a_regularizer_is_seen():
    tx = optax.MultiSteps(chain(fd(loss_fn), optax.sgd(0.1)), 2)

    @jax.jit
    def update(state, batch):
        return tx.update(jax.grad(loss_fn)(PARAMS, batch), state, PARAMS, batch=batch)[1]

    def two_micro_batches():
        update(update(tx.init(PARAMS), BATCH), 3 * BATCH + 1)

    assert any("optax.MultiSteps" in finding for finding in findings_of(two_micro_batches))


def test_a_step_with_another_loss_is_seen_and_micro_batches_are_the_same_loss():
    def other(params, batch):
        return jnp.sum(params["b"] ** 2) * jnp.mean(batch**2)

    def train(regularizer, loss=loss_fn):
        init, step = gr.make_train_step(loss, optax.sgd(0.1), regularizer)
        step(init(PARAMS), BATCH)

    assert len(findings_of(train, fd(other))) == 1
    assert findings_of(train, fd(other, reuse_updates=False)) == []
    # two means of halves: the same gradient up to rounding
    assert findings_of(train, fd(), gr.microbatched(loss_fn, 2)) == []


def test_it_warns_and_off_it_costs_nothing(counter):
    wrong = chain(optax.scale(2.0), fd(counter.wrap(loss_fn)))
    gradient = gradient_of(PARAMS, BATCH)
    with pytest.warns(GradientMismatch, match="2 times as long"), checking():
        wrong.update(gradient, wrong.init(PARAMS), PARAMS, batch=BATCH)
    assert counter.read()[1] == 2
    wrong.update(gradient, wrong.init(PARAMS), PARAMS, batch=BATCH)
    assert counter.read()[1] == 1


@pytest.mark.parametrize(("size", "off"), [(1e-6, 0.0), (1e-6, 0.01), (1e6, 0.0), (1e6, 0.01)])
def test_what_is_found_does_not_depend_on_the_size_of_the_loss(size, off):
    first = optax.scale(size * (1 + off))
    tx = chain(first, fd(lambda params: size * loss_fn(params, BATCH)))
    assert bool(findings_of(run, tx)) == bool(off)


def test_replicas_that_average_their_gradients_but_not_their_losses_drift_apart():
    tx = fd(loss_fn)

    @jax.jit
    @functools.partial(jax.vmap, axis_name="data", in_axes=(0, None))  # as in pmap
    def on_replica(batch, averaged):
        own = jax.grad(loss_fn)(PARAMS, batch)
        mean = jax.lax.pmean(own, "data")
        gradient = jax.tree.map(lambda g, m: jnp.where(averaged, m, g), own, mean)
        return tx.update(gradient, tx.init(PARAMS), PARAMS, batch=batch)[0]["w"]

    replicas = BATCH.reshape(2, 2, 3)
    assert findings_of(on_replica, replicas, False) == []
    (finding,) = findings_of(on_replica, replicas, True)
    assert "averaged over replicas" in finding


@pytest.mark.slow
def test_an_update_without_a_penalty_is_not_compared_under_vmap_either():
    tx = fd(interval=2)

    @jax.vmap  # turns the branch into a select that computes both sides
    def lane(step):
        state = tx.init(PARAMS)._replace(step=step)
        wrong = jax.tree.map(lambda p: (1 + step) * p, jax.grad(loss_fn)(PARAMS, BATCH))
        return tx.update(wrong, state, PARAMS, value_fn=lambda p: loss_fn(p, BATCH))[0]["w"]

    assert findings_of(lane, jnp.arange(2)) == []
    assert len(findings_of(lane, jnp.arange(1, 3))) == 1


def test_a_skipped_update_costs_no_gradient_under_the_guard(counter):
    tx = fd(counter.wrap(loss_fn), interval=2)
    gradient = gradient_of(PARAMS, BATCH)
    with checking():
        state = tx.init(PARAMS)
        for expected in (2, 0, 2):
            _, state = tx.update(gradient, state, PARAMS, batch=BATCH)
            assert counter.read()[1] == expected


def test_findings_go_to_the_innermost_guard_that_is_open():
    def wrong():
        run(chain(optax.scale(2.0), fd()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientMismatch)
        with checking() as outer:
            with checking() as inner:
                pass
            assert (len(outer), len(inner)) == (0, 0)
            wrong()
            assert (len(outer), len(inner)) == (1, 0)
            with checking() as inner:
                wrong()
            assert (len(outer), len(inner)) == (1, 1)
            with pytest.raises(KeyError), checking():
                raise KeyError
            wrong()
            assert (len(outer), len(inner)) == (2, 1)
        wrong()
    assert (len(outer), len(inner)) == (2, 1)
