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

STEPS = 10
PENALTY = {"gamma": 0.05, "epsilon": 0.01}
FD = gr.fd_gradreg(**PENALTY)


def initial_params():
    """Every parameter but the last bias has a leading axis that eight devices can share."""
    keys = jax.random.split(jax.random.key(0), 2)
    w1, w2 = jax.random.normal(keys[0], (16, 32)) / 4, jax.random.normal(keys[1], (32, 4)) / 6
    return {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(4)}


def loss_fn(params, batch):
    x, y = batch
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.mean((h @ params["w2"] + params["b2"] - y) ** 2)


def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 16)).astype(np.float32), rng.normal(size=(64, 4)).astype(np.float32)


def collectives(compiled):
    """How often each collective stands in the program, apart from those that carry scalars, and the
    number of elements each moves."""
    counts, elements = collections.Counter(), collections.Counter()
    for shapes, kind in re.findall(
        r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(",
        compiled.as_text(),
    ):
        sizes = [
            math.prod(int(n) for n in shape.split(",") if n)
            for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
        ]
        counts["scalars" if max(sizes) == 1 else kind] += 1
        elements[kind] += sum(sizes)
    return {"counts": counts, "elements": elements}


def spread(mesh, tree, fsdp):
    """Parameters replicated, or sharded along their leading axis where that is possible."""
    devices = mesh.devices.size

    def place(x):
        return jax.device_put(
            x, NamedSharding(mesh, P("data") if fsdp and x.shape[0] % devices == 0 else P())
        )

    return jax.tree.map(place, tree)


def train(
    loss,
    regularizer,
    mesh=None,
    fsdp=False,
    held_out=False,
    make=gr.make_train_step,
    **options,
):
    """Train with ``make_train_step``: (parameters, the collectives of one step, whether all
    parameters stayed where they were)."""
    init, step = make(loss, optax.adam(1e-2), regularizer, **options)
    params, data = initial_params(), batch()
    if mesh is not None:
        params, data = (
            spread(mesh, params, fsdp),
            jax.device_put(data, NamedSharding(mesh, P("data"))),
        )
    state = init(params)
    others = {"held_out": jax.tree.map(lambda x: -x, data)} if held_out else {}
    compiled = step.lower(state, data, **others).compile()
    for _ in range(STEPS):
        state, _ = jax.block_until_ready(
            compiled(state, data, **others)
        )  # steps in flight could starve each other of threads
    like = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params)}
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in like and leaf.ndim]
    stayed = all(leaf.sharding.is_equivalent_to(like[leaf.shape], leaf.ndim) for leaf in moments)
    return state[0], collectives(compiled), stayed


def plain_loop(loss, optimizer, regularizer):
    """A loop without a regularizer, on a regularized loss."""
    gradient = jax.grad(gr.regularized_loss(loss, regularizer))

    def init(params):
        return params, optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, data):
        params, opt_state = state
        updates, opt_state = optimizer.update(gradient(params, data), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return init, step


def varying(tree):
    """A copy of replicated values that may differ from device to device; ``pvary`` is its name
    before JAX 0.9."""
    return (
        jax.lax.pcast(tree, "data", to="varying")
        if hasattr(jax.lax, "pcast")
        else jax.lax.pvary(tree, "data")
    )


def train_in_shard_map(mesh, local, gradient_of):
    """A gradient function inside ``shard_map``: every device uses its own ascent direction, or all
    use the common one."""
    tx = optax.adam(1e-2)

    def device_step(params, opt_state, data):
        # without pcast the gradient with respect to replicated parameters would already be the sum
        # over the devices
        if local:
            mine, loss = varying(params), loss_fn
        else:
            mine, loss = params, lambda p, b: jax.lax.pmean(loss_fn(p, b), "data")
        _, grads = gradient_of(loss)(mine, data)
        grads = jax.lax.pmean(grads, "data") if local else grads
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(
        jax.shard_map(device_step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    )
    params = initial_params()
    state = params, tx.init(params)
    compiled = step.lower(*state, batch()).compile()
    for _ in range(STEPS):
        state = jax.block_until_ready(step(*state, batch()))
    return state[0], collectives(compiled), True


def train_in_pmap():
    """The regularized loss inside ``pmap``: every device uses its own ascent direction."""
    tx, devices = optax.adam(1e-2), jax.device_count()
    gradient = jax.grad(gr.regularized_loss(loss_fn, FD))

    @functools.partial(jax.pmap, axis_name="data")
    def step(state, data):
        params, opt_state = state
        grads = jax.lax.pmean(gradient(params, data), "data")
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = initial_params()
    state = jax.tree.map(lambda x: jnp.stack([x] * devices), (params, tx.init(params)))
    data = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch())
    for _ in range(STEPS):
        state = jax.block_until_ready(step(state, data))
    return jax.tree.map(lambda x: x[0], state[0]), {}, True


def refusals():
    """Errors for parts that an explicit mesh of eight devices does not divide."""
    data = jax.device_put(batch(), NamedSharding(jax.sharding.get_mesh(), P("data")))
    said = {}
    for name, options in {
        "ascent_groups": {"ascent_groups": 4},
        "penalty_fraction": {"penalty_fraction": 0.05},
    }.items():
        init, step = gr.make_train_step(loss_fn, optax.sgd(0.1), FD, **options)
        try:
            step(init(initial_params()), data)
        except ValueError as error:
            said[name] = str(error)
    return said


def main():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    groups, dbp = (
        functools.partial(train, loss_fn, FD, ascent_groups=8),
        functools.partial(train, loss_fn, gr.dbp_gradreg(gamma=0.05)),
    )
    fd, plain = functools.partial(train, loss_fn, FD), functools.partial(train, loss_fn, None)
    accumulated = functools.partial(train, gr.microbatched(loss_fn, 4), FD)
    half, tuned = (gr.relative_gradreg(strength=strength) for strength in (0.5, None))
    relative = functools.partial(train, loss_fn, half)
    itself = functools.partial(train, loss_fn, tuned, held_out=True)
    function = functools.partial(gr.fd_value_and_grad, **PENALTY)
    wrapped = functools.partial(fd, make=plain_loop)

    def of_loss(loss):
        return jax.value_and_grad(gr.regularized_loss(loss, FD))

    one = {"plain": plain()[0], "fd": fd()[0], "dbp": dbp()[0], "groups": groups()[0]}
    one |= {"relative": relative()[0], "self-tuned": itself()[0]}
    runs = {
        "plain, data-parallel": ("plain", plain(mesh)),
        "plain, FSDP": ("plain", plain(mesh, fsdp=True)),
        "fd, data-parallel": ("fd", fd(mesh)),
        "fd, FSDP": ("fd", fd(mesh, fsdp=True)),
        "dbp, data-parallel": ("dbp", dbp(mesh)),
        "groups, data-parallel": ("groups", groups(mesh)),
        "groups, FSDP": ("groups", groups(mesh, fsdp=True)),
        "relative, data-parallel": ("relative", relative(mesh)),
        "relative, FSDP": ("relative", relative(mesh, fsdp=True)),
        "self-tuned, data-parallel": ("self-tuned", itself(mesh)),
        "micro-batches, data-parallel": ("fd", accumulated(mesh)),
        "shard_map, common ascent": ("fd", train_in_shard_map(mesh, False, function)),
        "shard_map, own ascent": ("groups", train_in_shard_map(mesh, True, function)),
        "loss, data-parallel": ("fd", wrapped(mesh)),
        "loss, FSDP": ("fd", wrapped(mesh, fsdp=True)),
        "loss, pmap": ("groups", train_in_pmap()),
        "loss, shard_map, common ascent": ("fd", train_in_shard_map(mesh, False, of_loss)),
        "loss, shard_map, own ascent": ("groups", train_in_shard_map(mesh, True, of_loss)),
    }
    with jax.set_mesh(explicit):
        runs["fd, explicit mesh"] = ("fd", fd(explicit))
        runs["loss, explicit mesh"] = ("fd", wrapped(explicit))
        runs["groups, explicit mesh"] = ("groups", groups(explicit))
        runs["micro-batches, explicit mesh"] = ("fd", accumulated(explicit))
        report = {"refusals": refusals()}
    for name, (reference, (params, moved, stayed)) in runs.items():
        expected = np.concatenate([np.ravel(x) for x in jax.tree.leaves(one[reference])])
        found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
        report[name] = {
            "error": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
            "stayed": stayed,
            **moved,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
