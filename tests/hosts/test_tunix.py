"""Tunix: ``PeftTrainer.with_loss_fn``, after ``docs/how-to/tunix.md``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gradreg_optax as gr

peft_trainer = pytest.importorskip("tunix.sft.peft_trainer")

pure = getattr(nnx, "as_pure", None) or nnx.pure  # the older name, before flax 0.12.8
GAMMA, EPSILON, RATE, STEPS = 0.5, 0.2, 0.1, 4
FD = gr.fd_gradreg(gamma=GAMMA, epsilon=EPSILON)


class Decoder(nnx.Module):
    """One head of causal attention, with the call that Tunix makes."""

    def __init__(self, rngs, lora=False):
        linear = nnx.LoRALinear if lora else nnx.Linear
        options = {"lora_rank": 2} if lora else {}
        self.embed = nnx.Embed(11, 16, rngs=rngs)
        self.qkv = linear(16, 48, rngs=rngs, **options)
        self.out = nnx.Linear(16, 11, rngs=rngs)

    def __call__(self, tokens, positions, cache, attention_mask):
        x = self.embed(tokens) + jnp.sin(positions)[..., None] / 4
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        scores = jnp.where(attention_mask, q @ jnp.swapaxes(k, 1, 2) / 4, -1e9)
        return self.out(x + jax.nn.softmax(scores) @ v), cache


def batches():
    rng = np.random.default_rng(0)
    return [
        peft_trainer.TrainingInput(
            input_tokens=rng.integers(0, 11, (4, 8)), input_mask=rng.random((4, 8)) < 0.8
        )
        for _ in range(STEPS)
    ]


def model_input(x):
    mask = jnp.tril(jnp.ones((8, 8), bool))
    return {
        "input_tokens": x.input_tokens,
        "input_mask": x.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(8), x.input_tokens.shape),
        "attention_mask": jnp.broadcast_to(mask, (4, 8, 8)),
    }


def token_loss(model, input_tokens, input_mask, positions, attention_mask):
    """The mean over the tokens that count."""
    logits, _ = model(input_tokens, positions, None, attention_mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], input_tokens[:, 1:])
    return jnp.sum(losses * input_mask[:, 1:]) / jnp.sum(input_mask[:, 1:])


def network(lora):
    model = Decoder(nnx.Rngs(0), lora)
    if lora:
        factor = model.qkv.lora.lora_b  # zero at the start, where the other has no gradient
        factor[...] = jnp.linspace(-0.3, 0.3, factor[...].size).reshape(factor[...].shape)
    return model


def fine_tuned(loss_fn, lora, has_aux=False):
    model = network(lora)
    config = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=STEPS)
    trainer = peft_trainer.PeftTrainer(model, optax.sgd(RATE), config)
    trainer = trainer.with_gen_model_input_fn(model_input).with_loss_fn(loss_fn, has_aux=has_aux)
    trainer.train(batches())
    return model


def by_hand(lora):
    """Plain descent along g + gamma/epsilon (g' - g), both at the same batch."""
    wrt = nnx.LoRAParam if lora else nnx.Param
    graphdef, params, rest = nnx.split(network(lora), wrt, ...)
    params, rest = pure(params), pure(rest)
    for batch in batches():

        def of_params(params, batch=batch):
            return token_loss(nnx.merge(graphdef, params, rest), **model_input(batch))

        g = jax.grad(of_params)(params)
        ahead = jax.grad(of_params)(optax.tree.add_scale(params, EPSILON, g))
        g = jax.tree.map(lambda a, b: a + GAMMA / EPSILON * (b - a), g, ahead)
        params = optax.tree.add_scale(params, -RATE, g)
    return nnx.merge(graphdef, params, rest)


def flat(model, wrt=nnx.Param):
    state = nnx.to_pure_dict(nnx.state(model, wrt))
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)])


@pytest.mark.parametrize("lora", [False, True], ids=["all parameters", "LoRA"])
def test_the_trainer_equals_the_loop_by_hand(lora):
    wrt = nnx.LoRAParam if lora else nnx.Param
    loss = gr.nnx_regularized_loss(token_loss, FD, wrt=wrt)
    found, plain = fine_tuned(loss, lora), fine_tuned(token_loss, lora)
    np.testing.assert_allclose(flat(found), flat(by_hand(lora)), rtol=1e-5, atol=1e-5)
    assert np.abs(flat(found) - flat(plain)).max() > 1e-4
    if lora:
        frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
        np.testing.assert_array_equal(flat(found, frozen), flat(network(lora), frozen))
