"""Optax's own contract suite, as installed, run on this package's transformations.

``optax/contrib/_common_test.py`` puts every optimizer of its tables through eight expectations:
extra arguments and no recompilation, convergence under ``lax.scan``, ``inject_hyperparams``,
dtypes, ``MultiSteps``, stability of the state, learning rate schedules. It is executed here up to
its test class, its tables are replaced by ours, and the class is executed as it stands. The suite
hands the loss to one kind of optimizer only, those called ``sophia``, as ``obj_fn=``: so that is
what ours are called there.
"""

import importlib.util
import inspect
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradreg_optax as gr

# Everything but the learning rate is small: the suite asks for convergence to 3% in 30 000 steps,
# also on Rosenbrock's function, whose largest curvature of 1000 makes gamma * curvature of order
# one here, and SAM's radius bounds how close it comes.
_TABLE = (
    {"transformation": "fd_gradreg", "gamma": 1e-3, "epsilon": 1e-3},
    {"transformation": "dbp_gradreg", "gamma": 1e-3},
    {"transformation": "gradient_norm_penalty", "gamma": 1e-3, "epsilon": 1e-3},
    {"transformation": "sam", "rho": 1e-3},
    {"transformation": "asam", "rho": 1e-3},
    {"transformation": "flooding", "level": 0.0},
    {
        "transformation": "fd_gradreg",
        "gamma": 1e-3,
        "epsilon": 1e-3,
        "scheme": "central",
        "interval": 3,
    },
)


def factory(
    transformation: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float | None = None,
    epsilon: float | None = None,
    rho: float | None = None,
    level: float | None = None,
    scheme: str | None = None,
    interval: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One of our transformations in front of Adam, with the loss under the name that the suite
    uses."""
    options = {
        "gamma": gamma,
        "epsilon": epsilon,
        "rho": rho,
        "level": level,
        "scheme": scheme,
        "interval": interval,
    }
    given = {name: value for name, value in options.items() if value is not None}
    tx = optax.chain(getattr(gr, transformation)(**given), optax.adam(learning_rate))

    def update(updates, state, params=None, *, obj_fn, **extra_args):
        return tx.update(updates, state, params, value_fn=obj_fn, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def contract_suite() -> types.ModuleType:
    spec = importlib.util.find_spec("optax.contrib._common_test")
    source = pathlib.Path(spec.origin).read_text(encoding="utf-8")
    tables, tests = source.split("class ContribTest(", 1)
    module = types.ModuleType("optax_contract")
    exec(compile(tables, spec.origin, "exec"), vars(module))
    ours = tuple(
        {
            "opt_name": "sophia",
            "opt_kwargs": {"learning_rate": 1e-2, **row},
            "wrapper_name": None,
            "wrapper_kwargs": None,
        }
        for row in _TABLE
    )
    module._MAIN_OPTIMIZERS_UNDER_TEST = module._ALL_OPTIMIZERS_UNDER_TEST = ours
    module._get_opt_factory = lambda name: factory
    exec(
        compile("class ContribTest(" + tests.split("if __name__")[0], spec.origin, "exec"),
        vars(module),
    )
    return module


ContribTest = contract_suite().ContribTest  # pytest collects it here


def public_transformations():
    home = "gradreg_optax.transforms"
    return {
        name
        for name in gr.__all__
        if inspect.isfunction(getattr(gr, name)) and getattr(gr, name).__module__ == home
    }


def test_the_suite_holds_all_of_its_expectations_for_each_of_ours():
    """Sixteen cases for each row: were the suite to change its tables or its names, it would not
    silently shrink."""
    cases = [name for name in dir(ContribTest) if name.startswith("test_")]
    assert len(cases) >= 16 * len(_TABLE)
    assert {row["transformation"] for row in _TABLE} == public_transformations()


def loss_fn(params, target):
    return jnp.sum((jnp.tanh(params["a"]) @ params["b"] - target) ** 2)


PARAMS = {
    "a": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.array([0.5, -1.0, 2.0], np.float32),
}
TARGET = np.array([1.0, -1.0], np.float32)
SGD = optax.sgd(0.1)
VALUE_AND_GRAD = jax.jit(jax.value_and_grad(loss_fn))

# Every wrapper that forwards extra arguments, around or behind a transformation T in chain(T, sgd):
# none of them changes the answer.
WRAPPERS = {
    "named_chain": lambda make, options, sgd: optax.named_chain(
        ("gradreg", make(**options)), ("sgd", sgd)
    ),
    "inject_hyperparams": lambda make, options, sgd: optax.chain(
        optax.inject_hyperparams(make)(**options), sgd
    ),
    "conditionally_transform": lambda make, options, sgd: optax.chain(
        optax.conditionally_transform(make(**options), lambda step: step >= 0), sgd
    ),
    "conditionally_mask": lambda make, options, sgd: optax.chain(
        make(**options), optax.conditionally_mask(sgd, lambda step: step >= 0)
    ),
    "apply_if_finite behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.apply_if_finite(sgd, 3)
    ),
    "clip behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.clip_by_global_norm(1e3), sgd
    ),
    "masked behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.masked(sgd, True)
    ),
    "partition behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.partition({"x": sgd, "y": sgd}, {"a": "x", "b": "y"})
    ),
    "flatten behind": lambda make, options, sgd: optax.chain(make(**options), optax.flatten(sgd)),
    "MultiSteps of one around": lambda make, options, sgd: _forwarding(
        optax.MultiSteps(optax.chain(make(**options), sgd), 1)
    ),
    "MultiSteps of one behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.MultiSteps(sgd, 1).gradient_transformation()
    ),
    "reduce_on_plateau behind": lambda make, options, sgd: optax.chain(
        make(**options), sgd, optax.contrib.reduce_on_plateau()
    ),
    "split_real_and_imaginary behind": lambda make, options, sgd: optax.chain(
        make(**options), optax.contrib.split_real_and_imaginary(sgd)
    ),
}


def _forwarding(multi_steps):
    return optax.GradientTransformationExtraArgs(multi_steps.init, multi_steps.update)


def two_steps(tx):
    params, state = jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)
    for _ in range(2):
        value, grads = VALUE_AND_GRAD(params, TARGET)
        updates, state = tx.update(
            grads, state, params, value=value, value_fn=lambda p: loss_fn(p, TARGET)
        )
        params = optax.apply_updates(params, updates)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])


@pytest.fixture(scope="module", params=_TABLE[:6], ids=lambda row: row["transformation"])
def in_a_chain(request):
    """(transformation, its options, the parameters after two steps of chain(transformation,
    sgd))."""
    name = request.param["transformation"]
    make, options = (
        getattr(gr, name),
        {option: 0.1 for option in request.param if option != "transformation"},
    )
    expected = two_steps(optax.chain(make(**options), SGD))
    assert name == "flooding" or np.abs(two_steps(SGD) - expected).max() > 1e-3
    return make, options, expected


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_transformation_in_every_wrapper_is_the_one_in_a_chain(in_a_chain, wrapper):
    make, options, expected = in_a_chain
    found = two_steps(WRAPPERS[wrapper](make, options, SGD))
    np.testing.assert_allclose(
        found, expected, rtol=1e-5, atol=1e-6
    )  # float32, two steps of size 0.1


def test_lookahead_passes_nothing_on_and_takes_a_loss_of_the_parameters_alone():
    """Its update has no extra arguments: a loss at construction works, ``value_fn=`` does not."""
    params = optax.LookaheadParams(*(jax.tree.map(jnp.asarray, PARAMS),) * 2)
    tx = optax.lookahead(
        optax.chain(
            gr.fd_gradreg(lambda p: loss_fn(p, TARGET), gamma=0.1, epsilon=0.1), optax.sgd(0.1)
        ),
        5,
        0.5,
    )
    grads = jax.grad(loss_fn)(params.fast, TARGET)
    updates, _ = tx.update(grads, tx.init(params), params)
    _, expected = gr.fd_value_and_grad(loss_fn, gamma=0.1, epsilon=0.1)(params.fast, TARGET)
    for name in PARAMS:
        np.testing.assert_allclose(updates.fast[name], -0.1 * expected[name], rtol=1e-5)
