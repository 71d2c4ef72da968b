"""A reward that can be hacked: gradient regularization instead of a KL penalty.

A small language model is fine-tuned by policy gradients on a reward *model*, which was fitted to a
few hundred samples and is unreliable on other sequences. As the policy moves away, the model's
reward increases and the true reward, which training does not use, decreases. The usual remedy is a
penalty on the KL divergence from the initial policy. Ackermann et al. (arXiv:2602.18037) penalise
the gradient norm instead, which favours flat regions, where the reward model is more reliable. They
exclude embeddings and head by name, and clip the ascent direction.

    python policy_gradient.py

Strengths are selected on tuning seeds and evaluated on others, with differences paired by seed.

Result with the settings below (eight seeds, ± one standard error): without a penalty the true
reward decreases from 0.29 to 0.11 ± 0.12 while the model's increases to 1.2. The KL penalty gains
0.27 ± 0.12. Gradient regularization gains -0.07 ± 0.11: at this scale it has *no* measurable
effect, also at other strengths from 0.01 to 30, learning rates and sizes of the reward model. A
likely reason: a policy that has collapsed to one sequence has a zero gradient, and is also flat. In
practice language models are stopped long before. Needs ``pip install gradreg-optax``; takes a
minute on one core.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradreg_optax import fd_gradreg, masked

VOCABULARY, LENGTH, WIDTH = 12, 8, 32
EXCLUDED = ("embed", "head")  # not perturbed


def initial_policy(key):
    """Initialize a language model with one hidden layer, the last two tokens and the position."""
    shapes = {
        "embed": (VOCABULARY + 1, WIDTH),
        "position": (LENGTH, WIDTH),
        "last": (WIDTH, WIDTH),
        "before": (WIDTH, WIDTH),
        "hidden": (WIDTH, WIDTH),
        "head": (WIDTH, VOCABULARY),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) / WIDTH**0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def next_logits(params, last, before, position):
    """Return the logits of the next token; the token ``VOCABULARY`` marks the beginning."""
    x = params["embed"][last] @ params["last"] + params["embed"][before] @ params["before"]
    x = jnp.tanh(x + params["position"][position])
    return (x + jnp.tanh(x @ params["hidden"])) @ params["head"]


def sample(params, key, count):
    """Sample sequences from the policy; shape (count, LENGTH)."""

    def draw(carry, position):
        last, before, key = carry
        key, now = jax.random.split(key)
        token = jax.random.categorical(now, next_logits(params, last, before, position))
        return (token, last, key), token

    start = jnp.full(count, VOCABULARY)
    _, tokens = jax.lax.scan(draw, (start, start, key), jnp.arange(LENGTH))
    return tokens.T


def log_probs(params, tokens):
    """Return the log-probabilities of all next tokens; shape (count, LENGTH, VOCABULARY)."""
    padded = jnp.pad(tokens, ((0, 0), (2, 0)), constant_values=VOCABULARY)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    logits = next_logits(params, padded[:, 1:-1], padded[:, :-2], positions)
    return jax.nn.log_softmax(logits)


def chosen(log_probs, tokens):
    """Return the log-probabilities of the given tokens."""
    return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


def human_texts(key, count):
    """Pretraining data: random sequences that increase more often than they decrease."""
    first, steps = jax.random.split(key)
    start = jax.random.randint(first, (count, 1), 0, VOCABULARY)
    moves = jax.random.randint(steps, (count, LENGTH - 1), -2, 4)
    return jnp.cumsum(jnp.concatenate([start, moves], axis=1), axis=1) % VOCABULARY


def true_reward(tokens):
    """Return the fraction of small steps upwards minus that of repetitions at distance two."""
    moves = tokens[:, 1:] - tokens[:, :-1]
    rises = jnp.mean((moves >= 1) & (moves <= 3), axis=1)
    return rises - jnp.mean(tokens[:, 2:] == tokens[:, :-2], axis=1)


def model_reward(weights, tokens):
    """Evaluate the reward model, a perceptron of the whole sequence."""
    x = jax.nn.one_hot(tokens, VOCABULARY).reshape(len(tokens), -1)
    return (jnp.tanh(x @ weights["first"]) @ weights["last"])[:, 0]


def fitted(loss_fn, params, steps, rate):
    """Minimize a loss of parameters and a key with Adam."""
    tx = optax.adam(rate)

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


def reference_and_reward_model(key, judged):
    """Fit a policy to human texts, and a reward model to noisy scores of ``judged`` samples."""
    keys = jax.random.split(key, 6)

    def imitation(params, key):
        texts = human_texts(key, 128)
        return -jnp.mean(chosen(log_probs(params, texts), texts))

    reference = fitted(imitation, initial_policy(keys[0]), 300, 1e-2)
    samples = sample(reference, keys[1], judged)
    scores = true_reward(samples) + 0.1 * jax.random.normal(keys[2], (judged,))

    def regression(weights, key):
        rows = jax.random.randint(key, (64,), 0, judged)
        return jnp.mean((model_reward(weights, samples[rows]) - scores[rows]) ** 2)

    weights = {
        "first": jax.random.normal(keys[3], (LENGTH * VOCABULARY, 64)) / 10,
        "last": jax.random.normal(keys[4], (64, 1)) / 8,
    }
    return reference, fitted(regression, weights, 300, 1e-2)


def clipped(gradient, params, largest=1.0):
    """Return the clipped ascent direction, without embeddings and head."""
    clip = optax.clip_by_global_norm(largest)
    direction, _ = clip.update(gradient, clip.init(params))
    return masked({name: name not in EXCLUDED for name in params})(direction, params)


def fine_tuned(gamma, kl, key, args):
    """Fine-tune; return true reward, model reward and KL divergence before and after each tenth."""
    key, first = jax.random.split(key)
    reference, weights = reference_and_reward_model(first, args.judged)
    regularizer = fd_gradreg(gamma=gamma, epsilon=args.epsilon, ascent=clipped)
    tx = optax.chain(regularizer, optax.clip_by_global_norm(1.0), optax.adam(args.learning_rate))

    def loss_fn(params, tokens, advantages):
        now, then = log_probs(params, tokens), log_probs(reference, tokens)
        divergence = jnp.sum(jnp.exp(now) * (now - then), axis=-1)
        gain = jnp.sum(chosen(now, tokens), axis=1) * advantages
        return -jnp.mean(gain) + kl * jnp.mean(jnp.sum(divergence, axis=1))

    def step(carry, key):
        params, state = carry
        tokens = sample(params, key, args.batch_size)
        rewards = model_reward(weights, tokens)
        value_fn = functools.partial(
            loss_fn, tokens=tokens, advantages=(rewards - rewards.mean()) / (rewards.std() + 1e-6)
        )
        updates, state = tx.update(jax.grad(value_fn)(params), state, params, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), None

    def judge(params, key):
        tokens = sample(params, key, 512)
        now, then = log_probs(params, tokens), log_probs(reference, tokens)
        distance = jnp.mean(jnp.sum(chosen(now - then, tokens), axis=1))
        return jnp.stack(
            [true_reward(tokens).mean(), model_reward(weights, tokens).mean(), distance]
        )

    def part(carry, key):
        carry, _ = jax.lax.scan(step, carry, jax.random.split(key, max(1, args.steps // 10)))
        return carry, judge(carry[0], key)

    start = judge(reference, key)
    _, later = jax.lax.scan(part, (reference, tx.init(reference)), jax.random.split(key, 10))
    return jnp.concatenate([start[None], later])


def mean_and_error(x):
    """Format the mean over seeds and its standard error."""
    return f"{np.mean(x):+.3f} ± {np.std(x, ddof=1) / len(x) ** 0.5:.3f}"


def main(argv=None):
    """Tune a strength for each method, and compare the methods on evaluation seeds."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--judged", type=int, default=200, help="samples of the reward model")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--gammas", type=float, nargs="+", default=[1e-2, 1.0, 3.0])
    parser.add_argument("--kls", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--seeds", type=int, default=8, help="tuning seeds, and evaluation seeds")
    args = parser.parse_args(argv)

    def one(gamma, kl, seed):
        return fine_tuned(gamma, kl, jax.random.key(seed), args)

    run = jax.jit(jax.vmap(one, in_axes=(None, None, 0)))
    choose, judge = np.arange(args.seeds), args.seeds + np.arange(args.seeds)

    candidates = {
        "none": [(0.0, 0.0)],
        "KL penalty": [(0.0, kl) for kl in args.kls],
        "gradient regularization": [(gamma, 0.0) for gamma in args.gammas],
    }
    print(f"{args.steps} policy-gradient steps; mean ± one standard error over {args.seeds} seeds")
    print(f"\nFinal true reward on the tuning seeds {choose[0]} to {choose[-1]}:")
    best = {}
    for name, settings in candidates.items():
        ends = {s: np.asarray(run(*s, choose))[:, -1, 0] for s in settings}
        best[name] = max(ends, key=lambda s: ends[s].mean())
        for setting, end in ends.items():
            strength = f"{max(setting):g}" if max(setting) else ""
            print(f"  {name:24} {strength:>6}  {mean_and_error(end)}")
    print(f"\nAfter training, on the evaluation seeds {judge[0]} to {judge[-1]}:")
    curves = {name: np.asarray(run(*setting, judge)) for name, setting in best.items()}
    plain = curves["none"][:, -1, 0]
    print(f"  {'before training':24} true reward {mean_and_error(curves['none'][:, 0, 0])}")
    for name, curve in curves.items():
        true, model, distance = curve[:, -1].T
        print(
            f"  {name:24} true reward {mean_and_error(true)}, model reward {mean_and_error(model)},"
            f" KL {distance.mean():.1f}"
        )
        if name != "none":
            print(f"  {'':24} gain over none, paired by seed: {mean_and_error(true - plain)}")
    return curves


if __name__ == "__main__":
    main()
