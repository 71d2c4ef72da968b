"""A language model fine-tuned with a gradient penalty, in a realistic setup.

A small decoder of bytes, in Flax NNX, is trained on one kind of text and fine-tuned on a little of
another, with

- LoRA: only the adapters are differentiated, perturbed and updated;
- bfloat16 compute, with the epsilon that minimises ``difference_error``;
- remat, and accumulation that weighs micro-batches by their unpadded tokens;
- the lazy penalty: every 4th step, on 25 % of the batch;
- a ('data', 'model') mesh of eight virtual devices;
- checkpoints: run it again with the same ``--checkpoints`` to resume.

    python language_model.py --checkpoints /tmp/language_model

It prints the held-out loss, the gradient norm, and at the end both runs, with and without the
penalty, on several seeds. Result with three seeds (± one standard error), gamma 0.1, epsilon 0.3,
where the relative error of the difference is 9 %: the gradient norm on held-out text decreases from
0.338 by 0.083 ± 0.021, and the held-out loss, 3.148, does not change (+0.004 ± 0.005). In forty
steps the model does not overfit, so there is nothing for a penalty to prevent.

Text is the source and the documentation of installed packages, so the numbers depend on their
versions. Needs ``pip install "gradreg-optax[flax]" orbax-checkpoint``; a minute on one core, most
of it compilation.
"""

import argparse
import functools
import inspect
import math
import pathlib
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gradreg_optax import Weighted, fd_gradreg, make_train_step, microbatched
from gradreg_optax.curvature import difference_error, gradient_norm

CONTEXT, BYTES = 32, 128  # the length of a sequence, and ASCII


class Block(nnx.Module):
    """Causal attention and a perceptron with LoRA adapters, in bfloat16."""

    def __init__(self, width, heads, rngs):
        linear = functools.partial(
            nnx.LoRALinear, lora_rank=4, rngs=rngs, dtype=jnp.bfloat16, lora_dtype=jnp.bfloat16
        )
        self.heads = heads
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x):
        """Apply the block to activations of shape (batch, time, width)."""
        split = (*x.shape[:2], 3, self.heads, -1)
        q, k, v = jnp.moveaxis(self.qkv(self.norm(x)).reshape(split), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Decoder(nnx.Module):
    """A decoder-only transformer over bytes."""

    def __init__(self, rngs, width=32, layers=2, heads=2):
        self.embed = nnx.Embed(BYTES, width, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.head = nnx.Linear(width, BYTES, rngs=rngs)

    def __call__(self, tokens):
        """Return the logits of the next byte: (batch, time) -> (batch, time, BYTES), float32."""
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)  # recompute activations
        return self.head(x).astype(jnp.float32)


def sequences(text, seed):
    """Lines of text, wrapped to the context and padded with zeros, shuffled."""
    lines = [
        piece
        for line in text.splitlines()
        if line.strip()
        for piece in textwrap.wrap(line, CONTEXT, drop_whitespace=False)
    ]
    rows = np.zeros((len(lines), CONTEXT), np.int32)
    for row, line in zip(rows, lines, strict=True):
        code = np.frombuffer(line.encode("ascii", "replace"), np.uint8)[:CONTEXT]
        row[: len(code)] = np.minimum(code, BYTES - 1)
    return np.random.default_rng(seed).permutation(rows)


def corpora(args):
    """Return source code for pretraining, prose for fine-tuning, and held-out prose."""
    code = sequences(inspect.getsource(argparse) + inspect.getsource(inspect), args.seed)
    prose = sequences("\n".join(inspect.getdoc(m) or "" for m in documented()), args.seed)
    return code, prose[: args.sentences], prose[args.sentences : args.sentences + 256]


def documented():
    """Return functions of NumPy with long docstrings."""
    members = [value for _, value in inspect.getmembers(np) if callable(value)]
    return [m for m in members if len(inspect.getdoc(m) or "") > 1500][:40]


def loss_of(graphdef):
    """Return the cross entropy of unpadded tokens, as a sum and its weight."""

    def loss_fn(params, tokens, rest):
        model = nnx.merge(graphdef, params, rest)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(tokens)[:, :-1], tokens[:, 1:]
        )
        counts = tokens[:, 1:] != 0
        return Weighted(jnp.sum(losses * counts), jnp.sum(counts))

    return loss_fn


def placed(mesh, tree):
    """Shard the last dimension of kernels over the model axis, and replicate other arrays."""

    def place(leaf):
        splits = leaf.ndim == 2 and leaf.shape[1] % mesh.shape["model"] == 0
        return jax.device_put(leaf, NamedSharding(mesh, P(None, "model") if splits else P()))

    return jax.tree.map(place, tree)


def on_mesh(mesh, tree):
    """Replicate unsharded arrays, such as counters, so that a checkpoint can restore them."""

    def place(leaf):
        there = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
        return jax.device_put(leaf, there or NamedSharding(mesh, P()))

    return jax.tree.map(place, tree)


def split(model, wrt):
    """Split a model into graph, parameters and the rest, as plain arrays."""
    pure = getattr(nnx, "as_pure", None) or nnx.pure  # the older name, before flax 0.12.8
    graphdef, params, rest = nnx.split(model, wrt, ...)
    return graphdef, pure(params), pure(rest)


def batch_of(mesh, rows, step, args):
    """Return batch number ``step``, which depends only on the seed and the step."""
    chosen = np.random.default_rng((args.seed, step)).integers(0, len(rows), args.batch_size)
    return jax.device_put(rows[chosen], NamedSharding(mesh, P("data")))


BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))  # the parameters of pretraining


def training_steps(args, epsilon):
    """Return the train steps by name, created once so that each is compiled once."""
    model = Decoder(nnx.Rngs(0))
    base, adapters = (loss_of(split(model, wrt)[0]) for wrt in (BASE, nnx.LoRAParam))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(args.learning_rate))
    penalty = fd_gradreg(gamma=args.gamma, epsilon=epsilon, interval=4)
    pieces = microbatched(adapters, 2)
    return {
        "pretraining": make_train_step(base, optax.adamw(3e-3)),
        "without": make_train_step(pieces, tx),
        "with": make_train_step(pieces, tx, penalty, penalty_fraction=0.25),
    }


def pretrained(mesh, train, rows, args):
    """Train all parameters of a decoder on source code, without a penalty."""
    graphdef, params, rest = split(Decoder(nnx.Rngs(args.seed)), BASE)
    state, rest = train.init(placed(mesh, params)), placed(mesh, rest)
    for i in range(args.pretraining):
        # wait for each step: virtual devices share few threads, and concurrent steps compete
        state, _ = jax.block_until_ready(train.step(state, batch_of(mesh, rows, i, args), rest))
    return nnx.merge(graphdef, state.params, rest)


def best_epsilon(loss_fn, params, tokens, rest):
    """Return the ascent step with the smallest difference error, a large one in bfloat16."""
    value_fn = functools.partial(mean_loss, loss_fn, tokens=tokens, rest=rest)
    error = jax.jit(lambda p, epsilon: difference_error(value_fn, p, epsilon))
    errors = {e: float(error(params, e).relative_error) for e in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)}
    print("epsilon: relative error of the difference", errors)
    return min(errors, key=lambda e: errors[e])


def mean_loss(loss_fn, params, tokens, rest):
    """Return the loss as a scalar."""
    total, weight = loss_fn(params, tokens, rest)
    return total / weight


@functools.cache
def watching():
    """Return a compiled function for loss and gradient norm of the adapters on held-out text."""
    loss_fn = loss_of(split(Decoder(nnx.Rngs(0)), nnx.LoRAParam)[0])

    def watch(params, tokens, rest):
        value_fn = functools.partial(mean_loss, loss_fn, tokens=tokens, rest=rest)
        return jnp.stack([value_fn(params), gradient_norm(value_fn, params)])

    return jax.jit(watch)


def fine_tune(mesh, train, model, data, args, checkpoints=None):
    """Fine-tune the adapters; return the final loss and gradient norm on held-out text."""
    rows, held_out = data
    _, params, rest = split(model, nnx.LoRAParam)
    rest, first = placed(mesh, rest), 0
    state = on_mesh(mesh, train.init(placed(mesh, params)))
    manager = ocp.CheckpointManager(checkpoints.absolute()) if checkpoints else None
    if manager and manager.latest_step():
        first = manager.latest_step()
        state = manager.restore(first, args=ocp.args.StandardRestore(state))
        print(f"resumed at step {first}")
    for i in range(first, args.steps):
        tokens = batch_of(mesh, rows, i, args)
        state, info = jax.block_until_ready(train.step(state, tokens, rest))
        if manager and (i + 1) % args.watch_every == 0:
            loss, norm = watching()(state.params, held_out, rest)
            print(
                f"step {i + 1}/{args.steps}  loss {info.loss:.3f}  |g| {info.grad_norm:.3f}"
                f"  held out {loss:.3f}  |g| {norm:.3f}",
                flush=True,
            )
            manager.save(i + 1, args=ocp.args.StandardSave(state))
    if manager:
        manager.close()
    return np.asarray(watching()(state.params, held_out, rest))


def run(args):
    """Run pairs with and without the penalty; log and save the first run with the penalty."""
    mesh = jax.make_mesh(tuple(args.mesh), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    steps, pairs = training_steps(args, args.epsilon or 1.0), []
    for seed in range(args.seed, args.seed + args.seeds):
        args.seed = seed
        code, rows, held_out = corpora(args)
        model = pretrained(mesh, steps["pretraining"], code, args)
        if not pairs and not args.epsilon:
            graphdef, params, rest = split(model, nnx.LoRAParam)
            batch = batch_of(mesh, rows, 0, args)
            args.epsilon = best_epsilon(loss_of(graphdef), params, batch, rest)
            steps = training_steps(args, args.epsilon) | {"pretraining": steps["pretraining"]}
        tune = functools.partial(fine_tune, mesh, model=model, data=(rows, held_out), args=args)
        checkpoints = args.checkpoints if not pairs else None
        pairs.append([tune(steps["without"]), tune(steps["with"], checkpoints=checkpoints)])
    report(np.array(pairs), args)
    return np.array(pairs)


def report(pairs, args):
    """Print both runs on held-out text, and their difference paired by seed."""
    print(f"\n{len(pairs)} seeds, gamma {args.gamma}, epsilon {args.epsilon}, on held-out text:")
    for index, name in enumerate(("loss", "|g|")):
        gain = pairs[:, 1, index] - pairs[:, 0, index]
        error = np.std(gain, ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else np.nan
        print(
            f"  {name:5} without {pairs[:, 0, index].mean():.3f}, with minus without (paired)"
            f" {gain.mean():+.4f} ± {error:.4f}"
        )


def parse_arguments(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoints", type=pathlib.Path, default=pathlib.Path("checkpoints"), help="directory")
    add("--pretraining", type=int, default=60, help="steps on source code")
    add("--steps", type=int, default=40, help="fine-tuning steps, including those before a resume")
    add("--watch-every", type=int, default=10, help="steps between log lines and checkpoints")
    add("--sentences", type=int, default=96, help="sequences for fine-tuning")
    add("--batch-size", type=int, default=32, help="a multiple of 8")
    add("--learning-rate", type=float, default=5e-3, help="learning rate of fine-tuning")
    add("--gamma", type=float, default=0.1, help="regularization coefficient")
    add("--epsilon", type=float, default=None, help="ascent step; by default the most accurate one")
    add("--mesh", type=int, nargs=2, default=[4, 2], help="devices for data, and for the model")
    add("--seed", type=int, default=0, help="the first seed")
    add("--seeds", type=int, default=3, help="number of pairs of runs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_arguments()
    jax.config.update("jax_num_cpu_devices", math.prod(arguments.mesh))
    run(arguments)
