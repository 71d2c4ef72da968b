"""Keras 3 on JAX: ``fit`` with a regularized train step, after ``docs/how-to/keras.md``."""

import os
import pathlib
import re

import jax
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import gradreg_optax as gr

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "jax":
    pytest.skip("Keras runs on another backend", allow_module_level=True)

GAMMA, EPSILON = 0.3, 0.2


class Regularized(keras.Model):
    """A model whose ``fit`` penalises the gradient norm: Keras's own step with another gradient."""

    def __init__(self, *args, regularizer=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.regularizer = regularizer

    def compute_loss_and_updates(self, *args, **kwargs):
        whole = super().compute_loss_and_updates
        if self.regularizer is None or not kwargs.get("training"):
            return whole(*args, **kwargs)
        return gr.regularized_loss(whole, self.regularizer, has_aux=True)(*args, **kwargs)


def compiled(regularizer=None):
    """A classifier with BatchNorm and dropout, to be trained by SGD."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(32, activation="tanh")(inputs)
    hidden = keras.layers.Dropout(0.3)(keras.layers.BatchNormalization()(hidden))
    model = Regularized(inputs, keras.layers.Dense(10)(hidden), regularizer=regularizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss=loss, metrics=["accuracy"])
    return model


def digits():
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y


def weights(model):
    return np.concatenate([np.ravel(v.numpy()) for v in model.trainable_variables])


def by_hand(model, x, y):
    """Return the penalised gradient of the model's loss on this batch, and the states after one
    clean pass."""
    trainable = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]

    def loss_fn(trainable):
        out, new, *_ = model.stateless_call(trainable, rest, x, training=True)
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), new

    g, after = jax.grad(loss_fn, has_aux=True)(trainable)
    ahead, _ = jax.grad(loss_fn, has_aux=True)(optax.tree.add_scale(trainable, EPSILON, g))
    regularized = [a + GAMMA / EPSILON * (b - a) for a, b in zip(g, ahead, strict=True)]
    return np.concatenate([np.ravel(x) for x in regularized]), after


def test_a_step_of_fit_is_the_one_by_hand_with_batchnorm_and_dropout():
    x, y = digits()
    model = compiled(gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON))
    regularized, after = by_hand(model, x[:64], y[:64])
    before = weights(model)
    model.fit(x[:64], y[:64], batch_size=64, epochs=1, shuffle=False, verbose=0)
    # float32: parameters of order one moved by a tenth of the gradient
    np.testing.assert_allclose((before - weights(model)) / 0.1, regularized, atol=1e-5)
    for found, expected in zip(model.non_trainable_variables, after, strict=True):
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-6)


def test_evaluation_and_prediction_and_saving_stay_keras_own(tmp_path):
    x, y = digits()
    model, plain = compiled(gr.sam(rho=0.05)), compiled()
    assert model.evaluate(x[:64], y[:64], verbose=0) == plain.evaluate(x[:64], y[:64], verbose=0)
    model.fit(x[:256], y[:256], batch_size=64, epochs=1, verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    plain.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(model.predict(x[:8], verbose=0), plain.predict(x[:8], verbose=0))


def test_the_code_of_the_page_trains():
    page = pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "keras.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    x, y = digits()
    names = {"x": x[:100], "y": y[:100]}
    exec(code.replace("epochs=60", "epochs=2, verbose=0"), names)
    history = names["model"].history.history
    assert history["loss"][1] < history["loss"][0]
    assert "accuracy" in history
