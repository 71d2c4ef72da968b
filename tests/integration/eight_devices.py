"""Trains one small network on one and on eight virtual devices and prints, as JSON, what came out
and what was communicated.

A program of its own, because the number of devices is fixed once JAX has started;
``test_sharding.py`` runs it.
"""

import collections
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradreg_optax as gr
from gradreg_optax._sharding import varying

STEPS = 4
PENALTY = {"gamma": 0.05, "epsilon": 0.01}
FD, ADAM = gr.fd_gradreg(**PENALTY), optax.adam(1e-2)


def initial_params():
    """Every parameter but the last bias has a leading axis that eight devices can share."""
    rng = np.random.default_rng(1)
    w1, w2 = rng.normal(size=(16, 32)) / 4, rng.normal(size=(32, 4)) / 6
    return jax.tree.map(jnp.float32, {"w1": w1, "w2": w2, "b2": np.zeros(4)})


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b2"] - y) ** 2)


def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 16)).astype(np.float32), rng.normal(size=(64, 4)).astype(np.float32)


def collectives(compiled):
    """How often each collective stands in the program, apart from those that carry scalars, and the
    number of elements each moves."""
    counts, elements = collections.Counter(), collections.Counter()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})\(", compiled.as_text()):
        shapes = [shape.split(",") for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        sizes = [math.prod(int(n) for n in shape if n) for shape in shapes]
        counts["scalars" if max(sizes) == 1 else kind] += 1
        elements[kind] += sum(sizes)
    return {"counts": counts, "elements": elements}


def trained(step, state, *args, **kwargs):
    """(state after some steps, the collectives of one step)."""
    compiled = step.lower(state, *args, **kwargs).compile()
    for _ in range(STEPS):  # steps in flight could starve each other of threads
        state, _ = jax.block_until_ready(compiled(state, *args, **kwargs))
    return state, collectives(compiled)


def train(loss, regularizer, mesh=None, fsdp=False, make=gr.make_train_step, **options):
    """Train with ``make_train_step``: (parameters, the collectives of one step, whether all
    parameters stayed where they were)."""
    params, data = initial_params(), batch()
    others = {"held_out": jax.tree.map(np.negative, data)} if options.pop("held_out", 0) else {}
    init, step = make(loss, ADAM, regularizer, **options)
    if mesh is not None:

        def place(x):
            sharded = fsdp and x.shape[0] % mesh.devices.size == 0
            return jax.device_put(x, NamedSharding(mesh, P("data") if sharded else P()))

        params = jax.tree.map(place, params)
        data, others = jax.device_put((data, others), NamedSharding(mesh, P("data")))
    like = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params)}
    state, moved = trained(step, init(params), data, **others)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in like and leaf.ndim]
    stayed = all(leaf.sharding.is_equivalent_to(like[leaf.shape], leaf.ndim) for leaf in moments)
    return state[0], moved, stayed


def plain_step(gradient, state, data):
    """One step without a regularizer, on a regularized gradient."""
    params, opt_state = state
    updates, opt_state = ADAM.update(gradient(params, data), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None


def of_loss(loss):
    return jax.grad(gr.regularized_loss(loss, FD))


def plain_loop(loss, optimizer, regularizer):
    step = functools.partial(plain_step, of_loss(loss))
    return lambda params: (params, optimizer.init(params)), jax.jit(step, donate_argnums=0)


def train_in_shard_map(mesh, local):
    """Gradients inside ``shard_map``: every device uses its own ascent direction, or all use the
    common one."""

    def own(params, data):
        # otherwise the gradient of replicated parameters would already be the sum over the devices
        params = varying(params, frozenset({"data"}))
        gradient = gr.fd_value_and_grad(loss_fn, **PENALTY)(params, data)[1]
        return jax.lax.pmean(gradient, "data")

    common = of_loss(lambda p, b: jax.lax.pmean(loss_fn(p, b), "data"))
    step = functools.partial(plain_step, own if local else common)
    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    params = initial_params()
    state, moved = trained(jax.jit(step), (params, ADAM.init(params)), batch())
    return state[0], moved, True


def derivatives(mesh):
    """Errors of derivatives in ``shard_map``, in parameters, a sharded batch and a further one.

    A loss that is averaged over the devices has the regularized gradient of the whole batch. A
    loss of each device's own samples has the sum of the devices' regularized gradients.
    """

    def local(params, x, scale):
        return scale**2 * jnp.mean(jnp.tanh(x @ params) ** 2)

    def common(*args):
        return jax.lax.pmean(local(*args), "data")

    def in_shard_map(loss):
        gradient, specs = jax.grad(loss, argnums=(0, 1, 2)), (P(), P("data"), P())
        return jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs))(*inputs)

    rng = np.random.default_rng(2)
    inputs = jax.tree.map(jnp.float32, (rng.normal(size=3), rng.normal(size=(32, 3)), 1.5))
    ways = {
        "regularized": gr.regularized_loss,
        "micro-batches": lambda loss, _: gr.microbatched(loss, 2),
        "both": lambda loss, tx: gr.regularized_loss(gr.microbatched(loss, 2), tx),
    }
    pairs = {}
    for name, way in ways.items():
        gradient = jax.jit(jax.grad(way(local, FD), argnums=(0, 1, 2)))
        params, x, scale = inputs
        own = zip(*(gradient(params, part, scale) for part in jnp.split(x, 8)), strict=True)
        of_params, of_x, of_scale = map(jnp.stack, own)
        summed = jnp.sum(of_params, axis=0), jnp.concatenate(of_x), jnp.sum(of_scale)
        pairs[name, "common"] = in_shard_map(way(common, FD)), gradient(*inputs)
        pairs[name, "local"] = in_shard_map(way(local, FD)), summed
    return {
        " ".join(names): max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*pair, strict=True))
        for names, pair in pairs.items()
    }


def refusal(**options):
    """The error for parts that an explicit mesh of eight devices does not divide."""
    data = jax.device_put(batch(), NamedSharding(jax.sharding.get_mesh(), P("data")))
    init, step = gr.make_train_step(loss_fn, optax.sgd(0.1), FD, **options)
    try:
        step(init(initial_params()), data)
    except ValueError as error:
        return str(error)


def main():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    tuned = gr.relative_gradreg(strength=None)
    ways = {
        "plain": functools.partial(train, loss_fn, None),
        "fd": functools.partial(train, loss_fn, FD),
        "groups": functools.partial(train, loss_fn, FD, ascent_groups=8),
        "relative": functools.partial(train, loss_fn, gr.relative_gradreg(strength=0.5)),
        "self-tuned": functools.partial(train, loss_fn, tuned, held_out=True),
    }
    one = {name: way()[0] for name, way in ways.items() if name != "plain"}
    accumulated = functools.partial(train, gr.microbatched(loss_fn, 4), FD)
    wrapped = functools.partial(train, loss_fn, FD, make=plain_loop)
    runs = {f"{name}, data-parallel": (name, way(mesh)) for name, way in ways.items()}
    runs |= {
        "plain, FSDP": ("plain", ways["plain"](mesh, fsdp=True)),
        "fd, FSDP": ("fd", ways["fd"](mesh, fsdp=True)),
        "groups, FSDP": ("groups", ways["groups"](mesh, fsdp=True)),
        "loss, FSDP": ("fd", wrapped(mesh, fsdp=True)),
        "loss, shard_map, common ascent": ("fd", train_in_shard_map(mesh, False)),
        "function, shard_map, own ascent": ("groups", train_in_shard_map(mesh, True)),
    }
    with jax.set_mesh(explicit):
        runs["loss, explicit mesh"] = ("fd", wrapped(explicit))
        runs["groups, explicit mesh"] = ("groups", ways["groups"](explicit))
        runs["micro-batches, explicit mesh"] = ("fd", accumulated(explicit))
        refusals = refusal(ascent_groups=4), refusal(penalty_fraction=0.05)
        report = {"refusals": refusals, "runs": {}}
    for name, (reference, (params, moved, stayed)) in runs.items():
        reference = one.get(reference, params)  # for "plain" nothing of ours is to be compared
        expected = np.concatenate([np.ravel(x) for x in jax.tree.leaves(reference)])
        found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        report["runs"][name] = {"error": error, "stayed": stayed, **moved}
    report["derivatives"] = derivatives(mesh)
    print(json.dumps(report))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
