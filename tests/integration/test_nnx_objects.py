"""Flax NNX: the training loop of Flax's MNIST tutorial with a regularized loss."""

import jax
import numpy as np
import optax
from flax import nnx

import gradreg_optax as gr
import nnx_cases as cases
from nnx_cases import FD


def network():
    """Some layers of the tutorial, without convolutions."""
    # A bias in front of BatchNorm has no gradient but rounding, which Adam would normalize.
    first = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    last = nnx.Linear(4, 3, rngs=nnx.Rngs(1))
    return nnx.Sequential(
        first, nnx.BatchNorm(4, rngs=nnx.Rngs(2)), nnx.Dropout(rate=0.1), nnx.relu, last
    )


def loss_fn(model, rngs, batch):
    logits = model(batch["image"], rngs=rngs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, logits


def by_hand(loss_fn, **_):
    """The two gradients on copies of the objects from before the step."""

    def value_and_grad(model, rngs, batch):
        copy, keys = nnx.clone((model, rngs))
        output, g = nnx.value_and_grad(loss_fn, has_aux=True)(model, rngs, batch)
        params = nnx.state(copy, nnx.Param)
        nnx.update(copy, jax.tree.map(lambda p, d: p + cases.EPSILON * d, params, g))
        steep, _ = nnx.grad(loss_fn, has_aux=True)(copy, keys, batch)
        return output, jax.tree.map(
            lambda a, b: a + cases.GAMMA / cases.EPSILON * (b - a), g, steep
        )

    return value_and_grad


def trained(loss_fn, value_and_grad=nnx.value_and_grad):
    """Two steps, each followed by an evaluation."""
    model, rngs = network(), nnx.Rngs(0)
    optimizer = nnx.Optimizer(model, optax.adamw(0.005, 0.9), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    @nnx.jit
    def train_step(model, optimizer, metrics, rngs, batch):
        (loss, logits), grads = value_and_grad(loss_fn, has_aux=True)(model, rngs, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, grads)

    @nnx.jit
    def eval_step(model, metrics, rngs, batch):
        loss, logits = loss_fn(model, rngs, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])

    draws = np.random.default_rng(0)
    history = []
    for _ in range(2):
        images, labels = draws.normal(size=(8, 4)), draws.integers(0, 3, 8)
        batch = {"image": images.astype(np.float32), "label": labels}
        model.train()
        train_step(model, optimizer, metrics, rngs, batch)
        model.eval()
        eval_step(model, metrics, rngs, batch)
        history += metrics.compute().values()
    return cases.numbers((model, rngs)) + history


def test_the_loop_of_the_tutorial_of_flax_changes_one_line():
    regularized = gr.nnx_regularized_loss(loss_fn, FD, has_aux=True)  # the line
    for a, b in zip(trained(regularized), trained(loss_fn, by_hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # adamw divides by small gradients
