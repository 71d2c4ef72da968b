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
_SMALL = 1e-3
_TRANSFORMATIONS = {
    "fd_gradreg": lambda small: gr.fd_gradreg(gamma=small, epsilon=small, interval=3),
    "dbp_gradreg": lambda small: gr.dbp_gradreg(gamma=small),
    "asam": lambda small: gr.asam(rho=small),
    "flooding": lambda small: gr.flooding(level=-small),
    "sam": lambda small: gr.sam(rho=small),
    "gradient_norm_penalty": lambda small: gr.gradient_norm_penalty(gamma=small, epsilon=small),
}
# One difference and one product: their hyperparameters, dtypes and MultiSteps are tried.
_THROUGHOUT = 2


def factory(transformation, learning_rate, small=_SMALL):
    """One of our transformations in front of Adam, with the loss under the name that the suite
    uses."""
    tx = optax.chain(_TRANSFORMATIONS[transformation](small), optax.adam(learning_rate))

    def update(updates, state, params=None, *, obj_fn, **extra_args):
        return tx.update(updates, state, params, value_fn=obj_fn, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def contract_suite():
    spec = importlib.util.find_spec("optax.contrib._common_test")
    source = pathlib.Path(spec.origin).read_text(encoding="utf-8")
    tables, tests = source.split("class ContribTest(", 1)
    module = types.ModuleType("optax_contract")
    exec(compile(tables, spec.origin, "exec"), vars(module))
    plain = {"opt_name": "sophia", "wrapper_name": None, "wrapper_kwargs": None}
    options = [{"learning_rate": 1e-2, "transformation": name} for name in _TRANSFORMATIONS]
    ours = tuple(plain | {"opt_kwargs": one} for one in options)
    module._MAIN_OPTIMIZERS_UNDER_TEST = ours
    module._ALL_OPTIMIZERS_UNDER_TEST = ours[:_THROUGHOUT]
    module._get_opt_factory = lambda name: factory
    suite = "class ContribTest(" + tests.split("if __name__")[0]
    exec(compile(suite, spec.origin, "exec"), vars(module))
    return module


ContribTest = contract_suite().ContribTest  # pytest collects it here


def test_the_suite_holds_all_of_its_expectations_for_each_of_ours():
    """At least eleven cases for each row throughout, and five for all: were the suite to change its
    tables or its names, it would not silently shrink."""
    cases = [name for name in dir(ContribTest) if name.startswith("test_")]
    assert len(cases) >= 11 * _THROUGHOUT + 5 * len(_TRANSFORMATIONS)
    public = {name: getattr(gr, name) for name in gr.__all__}
    homes = ("gradreg_optax._transforms", "gradreg_optax._special_cases")
    ours = {k for k, v in public.items() if inspect.isfunction(v) and v.__module__ in homes}
    assert set(_TRANSFORMATIONS) == ours
