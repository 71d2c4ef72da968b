"""What a step costs, by XLA's own count: deterministic, unlike its time."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import gradreg_optax as gr
from problems import convolve, update_of

# Everything beyond the gradients (the perturbation, the difference, the norm) touches each
# parameter a few times, while a gradient touches it several times for each sample of the batch: 2%
# leave room for that at 64 samples.
ONE, TWO, THREE = 1.01, 2.02, 3.03
GAMMA, EPSILON, RATE = 0.1, 0.05, 0.1


def network_of(layer, shapes, x):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    kernels = [jax.random.normal(k, s) / 8 for k, s in zip(keys, shapes, strict=True)]

    def loss_fn(params, batch):
        x, labels = batch
        for kernel in params[:-1]:
            x = jax.nn.gelu(layer(x, kernel))
        logits = jnp.mean(x, axis=tuple(range(1, x.ndim - 1))) @ params[-1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return loss_fn, kernels, (x, jnp.zeros(len(x), int))


DENSE = [(64, 128), (128, 128), (128, 128), (128, 10)]
CONVOLUTIONAL = [(3, 3, 3, 8), (3, 3, 8, 8), (3, 3, 8, 8), (8, 10)]
NETWORKS = {
    "dense": network_of(jnp.matmul, DENSE, jnp.ones((128, 64))),
    "convolutional": network_of(convolve, CONVOLUTIONAL, jnp.ones((16, 12, 12, 3))),
}


def flops(step, *args):
    return step.lower(*args).compile().cost_analysis()["flops"]


@functools.cache
def train_step_flops(name, regularizer, penalty_fraction=1.0):
    loss_fn, params, batch = NETWORKS[name]
    options = {"penalty_fraction": penalty_fraction} if regularizer else {}
    init, step = gr.make_train_step(loss_fn, optax.sgd(RATE), regularizer, **options)
    return flops(step, init(params), batch)


FORWARD = gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON)
PRODUCT = gr.dbp_gradreg(gamma=GAMMA)
REVERSE = gr.dbp_gradreg(gamma=GAMMA, mode="reverse_over_reverse")
# the tangent of the input is zero, so the first layer of the Hessian-vector product is cheaper:
# less than 3
COSTS = {
    "forward": (FORWARD, 1.98, TWO),
    "central": (gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON, scheme="central"), 2.94, THREE),
    "dbp forward_over_reverse": (PRODUCT, 2.7, 3.05),
    "dbp reverse_over_reverse": (REVERSE, 2.7, 3.05),
    "flooding": (gr.flooding(level=0.1), 0.99, ONE),
}
ON_CONVOLUTIONS = ("central", "dbp forward_over_reverse")  # all that one evaluates, twice


@pytest.mark.parametrize(
    ("network", "name"),
    [("dense", name) for name in COSTS] + [("convolutional", name) for name in ON_CONVOLUTIONS],
)
def test_a_step_costs_the_gradients_that_the_paper_counts(network, name):
    regularizer, least, most = COSTS[name]
    cost = train_step_flops(network, regularizer) / train_step_flops(network, None)
    assert least <= cost <= most


def test_every_way_in_costs_what_the_loop_written_by_hand_costs():
    loss_fn, *args = NETWORKS["dense"]

    @jax.jit
    def by_hand(params, batch):
        gradient = jax.grad(loss_fn)(params, batch)
        ahead = jax.grad(loss_fn)(optax.tree.add_scale(params, EPSILON, gradient), batch)
        return optax.tree.add_scale(gradient, GAMMA / EPSILON, optax.tree.sub(ahead, gradient))

    @jax.jit
    def by_chain(params, batch):
        gradient, tx = jax.grad(loss_fn)(params, batch), optax.chain(FORWARD, optax.scale(-RATE))
        return update_of(tx, gradient, params, value_fn=lambda p: loss_fn(p, batch))

    by_function = jax.jit(gr.fd_value_and_grad(loss_fn, gamma=GAMMA, epsilon=EPSILON))
    costs = {
        "fd_value_and_grad": flops(by_function, *args),
        "optax.chain": flops(by_chain, *args),
        "make_train_step": train_step_flops("dense", FORWARD),
    }
    least = flops(by_hand, *args)
    assert {name: cost for name, cost in costs.items() if cost > 1.01 * least} == {}


def test_a_regularized_loss_costs_with_a_product_what_the_gradient_function_costs():
    """With a difference: see test_transformations.py."""
    loss_fn, *args = NETWORKS["dense"]
    loss = jax.jit(jax.value_and_grad(gr.regularized_loss(loss_fn, PRODUCT)))
    by_function = jax.jit(gr.dbp_value_and_grad(loss_fn, gamma=GAMMA))
    assert flops(loss, *args) <= 1.01 * flops(by_function, *args)


def test_a_lazy_penalty_on_a_quarter_of_the_batch_costs_half_a_gradient_where_it_is_due():
    # XLA counts the more expensive branch, with two gradients on a quarter of the batch: 1 + 2/4
    lazy = train_step_flops("dense", gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON, interval=4), 0.25)
    plain = train_step_flops("dense", None)
    assert lazy / plain <= 1.52
    averaged = (lazy / plain + 3) / 4
    assert averaged <= 1.15


def test_sam_takes_the_memory_of_optax_sam_and_the_difference_one_gradient_more():
    def loss_fn(params, batch):  # the parameters outweigh the activations
        return jnp.mean(jnp.tanh(jnp.tanh(batch @ params["first"]) @ params["second"]) ** 2)

    params = {"first": jnp.ones((256, 256)), "second": jnp.ones((256, 256))}
    batch = jnp.ones((4, 256))

    def temporary(optimizer, **extra_args):
        def step(params, state):
            gradient = jax.grad(loss_fn)(params, batch)
            updates, state = optimizer.update(gradient, state, params, **extra_args)
            return optax.apply_updates(params, updates), state

        lowered = jax.jit(step, donate_argnums=0).lower(params, optimizer.init(params))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(EPSILON))
    theirs = optax.contrib.sam(optax.sgd(RATE), adversary, opaque_mode=True)
    extra = {"value_fn": lambda p: loss_fn(p, batch)}
    ours = temporary(optax.chain(gr.sam(rho=EPSILON), optax.sgd(RATE)), **extra)
    difference = temporary(optax.chain(FORWARD, optax.sgd(RATE)), **extra)
    gradient = sum(leaf.nbytes for leaf in params.values())
    init, step = gr.make_train_step(loss_fn, optax.sgd(RATE), gr.sam(rho=EPSILON))
    in_a_step = step.lower(init(params), batch).compile().memory_analysis().temp_size_in_bytes
    # and a few norms
    least = temporary(theirs, grad_fn=lambda p, _: jax.grad(loss_fn)(p, batch))
    assert max(ours, in_a_step) <= 1.02 * least
    assert ours < difference <= ours + 1.02 * gradient
