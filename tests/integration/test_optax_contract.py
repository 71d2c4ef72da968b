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

import optax

import gradreg_optax as gr

# Everything but the learning rate is small: the suite asks for convergence to 3% in 30 000 steps,
# also on Rosenbrock's function, whose largest curvature of 1000 makes gamma * curvature of order
# one here, and SAM's radius bounds how close it comes.
_TABLE = (
    {"transformation": "fd_gradreg", "gamma": 1e-3, "epsilon": 1e-3, "interval": 3},
    {"transformation": "dbp_gradreg", "gamma": 1e-3},
    {"transformation": "asam", "rho": 1e-3},
    {"transformation": "flooding", "level": 0.0},
    {"transformation": "sam", "rho": 1e-3},
    {"transformation": "gradient_norm_penalty", "gamma": 1e-3, "epsilon": 1e-3},
)
# One difference and one product: their hyperparameters, dtypes and MultiSteps are tried.
_THROUGHOUT = _TABLE[:2]


def factory(
    transformation: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float | None = None,
    epsilon: float | None = None,
    rho: float | None = None,
    level: float | None = None,
    interval: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One of our transformations in front of Adam, with the loss under the name that the suite
    uses."""
    options = {"gamma": gamma, "epsilon": epsilon, "rho": rho, "level": level, "interval": interval}
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
    plain = {"opt_name": "sophia", "wrapper_name": None, "wrapper_kwargs": None}
    ours = tuple(plain | {"opt_kwargs": {"learning_rate": 1e-2, **row}} for row in _TABLE)
    module._MAIN_OPTIMIZERS_UNDER_TEST = ours
    module._ALL_OPTIMIZERS_UNDER_TEST = ours[: len(_THROUGHOUT)]
    module._get_opt_factory = lambda name: factory
    suite = "class ContribTest(" + tests.split("if __name__")[0]
    exec(compile(suite, spec.origin, "exec"), vars(module))
    return module


ContribTest = contract_suite().ContribTest  # pytest collects it here


def public_transformations():
    home = "gradreg_optax._transforms"
    return {
        name
        for name in gr.__all__
        if inspect.isfunction(getattr(gr, name)) and getattr(gr, name).__module__ == home
    }


def test_the_suite_holds_all_of_its_expectations_for_each_of_ours():
    """At least eleven cases for each row throughout, and five for all: were the suite to change its
    tables or its names, it would not silently shrink."""
    cases = [name for name in dir(ContribTest) if name.startswith("test_")]
    assert len(cases) >= 11 * len(_THROUGHOUT) + 5 * len(_TABLE)
    assert {row["transformation"] for row in _TABLE} == public_transformations()
