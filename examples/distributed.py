"""Regularized training on one process or on many: mesh, sharded batches, checkpoints that resume.

On one machine, with all its devices:

    python distributed.py --checkpoints /tmp/run

On a cluster that JAX recognizes (Slurm, Open MPI, TPU pods), in every process:

    srun python distributed.py --distributed --checkpoints /shared/run

On other machines, give every process its number:

    python distributed.py --distributed --coordinator 10.0.0.1:12355 --processes 2 --process 0
    --checkpoints /shared/run

Run it again with the same ``--checkpoints`` to resume, also on another number of devices; the order
of the remaining samples is the same. Needs ``pip install gradreg-optax orbax-checkpoint
scikit-learn``. To train your own model, replace the three functions ``load_data``,
``initial_params`` and ``loss_fn``.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from gradreg_optax import fd_gradreg, make_train_step


def load_data():
    """Load images in [0, 1] and labels into CPU memory.

    Memory-map a larger data set: every process reads only its own rows.
    """
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y.astype(np.int32)


def initial_params(key):
    """Initialize a multilayer perceptron as in He et al. (2015)."""
    sizes = (64, 128, 128, 10)
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"kernel": jax.random.normal(k, (n, m)) * (2 / n) ** 0.5, "bias": jnp.zeros(m)}
        for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def loss_fn(params, batch, key):
    """Cross entropy with dropout; both passes of the regularizer use the same batch and key."""
    x, y = batch
    for layer in params[:-1]:
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"])
    x = jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def local_batch(data, sharding, step, args):
    """Return batch number ``step`` as a global array; this process loads only its rows.

    The batch depends only on the seed and the step.
    """
    rows = np.random.default_rng((args.seed, step)).choice(
        len(data[1]), args.batch_size, replace=False
    )

    def place(array):
        shape = (args.batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: array[rows[index[0]]])

    return jax.tree.map(place, data)


def parameter_sharding(mesh, fsdp):
    """Replicate parameters, or shard them along the leading axis if its length allows it."""

    def place(leaf):
        sharded = fsdp and leaf.ndim > 0 and leaf.shape[0] % mesh.devices.size == 0
        return NamedSharding(mesh, P("data") if sharded else P())

    return place


def make_step(args):
    """Create optimizer, regularizer and train step, without using a device."""
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.steps)
    gamma = optax.linear_schedule(0.0, args.gamma, max(1, args.steps // 10))
    regularizer = fd_gradreg(gamma=gamma, epsilon=args.epsilon)
    return make_train_step(
        loss_fn, optax.adamw(schedule), regularizer, ascent_groups=args.ascent_groups
    )


def fresh_state(init, args):
    """Return the content of a checkpoint: parameters, optimizer state, counters, dropout key."""
    key, first = jax.random.split(jax.random.key(args.seed))
    return {"train": init(initial_params(first)), "key": key}


def resume_or_start(manager, init, mesh, args):
    """Return the latest checkpoint, or a new state, with every array sharded over this mesh."""
    shapes = jax.eval_shape(lambda: fresh_state(init, args))
    shardings = jax.tree.map(parameter_sharding(mesh, args.fsdp), shapes)
    step = manager.latest_step()
    if step is None:
        # with explicit shardings, so that Adam's moments are sharded like their parameters
        return 0, jax.jit(lambda: fresh_state(init, args), out_shardings=shardings)()
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )
    return step, manager.restore(step, args=ocp.args.StandardRestore(target))


def train(args):
    """Train to ``args.steps``, and return the last state."""
    init, step_fn = make_step(args)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    data, data_sharding = load_data(), NamedSharding(mesh, P("data"))
    options = ocp.CheckpointManagerOptions(save_interval_steps=args.save_every, max_to_keep=2)
    with ocp.CheckpointManager(args.checkpoints.absolute(), options=options) as manager:
        first, state = resume_or_start(manager, init, mesh, args)
        start = time.perf_counter()
        for step in range(first, args.steps):
            batch = local_batch(data, data_sharding, step, args)
            state["train"], info = step_fn(
                state["train"], batch, jax.random.fold_in(state["key"], step)
            )
            last = step + 1 == args.steps
            manager.save(step + 1, args=ocp.args.StandardSave(state), force=last)
            if jax.process_index() == 0 and ((step + 1) % args.log_every == 0 or last):
                seconds = time.perf_counter() - start
                print(
                    f"step {step + 1}/{args.steps}  loss {info.loss:.5f}  |g| {info.grad_norm:.5f} "
                    f" {seconds:.1f} s",
                    flush=True,
                )
    return state


def parse_arguments(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--distributed", action="store_true", help="start jax.distributed: once in every process")
    add(
        "--coordinator",
        help="address:port of process 0; not needed on clusters that JAX recognizes",
    )
    add(
        "--processes",
        type=int,
        help="number of processes; not needed on clusters that JAX recognizes",
    )
    add(
        "--process",
        type=int,
        help="number of this process; not needed on clusters that JAX recognizes",
    )
    add(
        "--checkpoints",
        type=pathlib.Path,
        default=pathlib.Path("checkpoints"),
        help="a directory that all processes can access (%(default)s)",
    )
    add("--save-every", type=int, default=100, help="steps between checkpoints (%(default)s)")
    add("--log-every", type=int, default=50, help="steps between lines of output (%(default)s)")
    add(
        "--steps",
        type=int,
        default=500,
        help="total number of steps, including those before a resume (%(default)s)",
    )
    add(
        "--batch-size",
        type=int,
        default=128,
        help="samples in a global batch, a multiple of the devices (%(default)s)",
    )
    add(
        "--learning-rate",
        type=float,
        default=1e-3,
        help="peak of the cosine schedule (%(default)s)",
    )
    add(
        "--gamma",
        type=float,
        default=0.05,
        help="regularization coefficient after the warm-up (%(default)s)",
    )
    add("--epsilon", type=float, default=0.05, help="ascent step (%(default)s)")
    add(
        "--ascent-groups",
        type=int,
        default=1,
        help=(
            "1: a common ascent direction; number of devices: one direction per device, half of"
            " the reductions (%(default)s)"
        ),
    )
    add(
        "--fsdp",
        action="store_true",
        help="also shard parameters and optimizer state over the devices",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of parameters, dropout and the order of the data (%(default)s)",
    )
    return parser.parse_args(argv)


def main():
    """Connect to the other processes with ``--distributed``, and train."""
    args = parse_arguments()
    if args.distributed:  # must run before any other use of a device
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    train(args)
    if args.distributed:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
